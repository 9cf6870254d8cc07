"Search: filters hold, two processes see each other's rows, citations are checked, hostile text is only text."
import subprocess, sys
from dataclasses import dataclass

import numpy as np
import pytest
from video_vlm.encoder import VisualTokens
from video_vlm.search import Hit, Index, SearchConfig, SearchError, check_citations, fuse, index_clips, rows_of, sample_recall, search, segments

def tokens(seconds, seed, D=16): return VisualTokens(np.random.default_rng(seed).normal(size=(seconds*2, 4, D)).astype(np.float16), np.arange(seconds*2)/2, np.arange(seconds*2)/2+.5, f"k{seed}")

@pytest.fixture
def index(tmp_path):
    ix = Index(tmp_path/"ix", "f"*64, 16)
    for i in range(30): ix.upsert(rows_of(f"clip{i}", tokens(6, i), tenant="ab"[i % 2], captions=[f"number {i} zebra"]))
    return ix

@pytest.mark.parametrize("seconds", [1, 2, 3, 4, 5, 9, 61])
@pytest.mark.parametrize("cfg", [SearchConfig(), SearchConfig(segment=1., overlap=0.), SearchConfig(segment=8., overlap=7.5)])
def test_every_moment_is_in_a_segment(seconds, cfg):
    vt = tokens(seconds, 0)
    parts = segments(vt, cfg)
    assert {float(t) for p in parts for t in p.starts} == set(vt.starts.tolist())
    assert all(len(p.tokens) == len(p.starts) for p in parts)

@pytest.mark.parametrize("mode", ["text", "vector", "both"])
def test_a_tenant_sees_only_its_own(index, mode):
    kw = dict(text=None if mode == "vector" else "zebra", vector=None if mode == "text" else tokens(6, 1).tokens.astype(float).mean((0, 1)))
    for tenant in "ab":
        hits = search(index, k=30, tenant=tenant, **kw)
        assert len(hits) >= 15 and {h.tenant for h in hits} == {tenant}
    assert search(index, k=5, tenant="c", **kw) == []

@pytest.mark.parametrize("tenant", ["a' OR '1'='1", "a'; DROP TABLE segments; --", "\"a\"", "a%", ""])
def test_a_tenant_name_is_never_a_filter(index, tenant):
    assert search(index, "zebra", k=30, tenant=tenant) == []
    index.delete("clip1' OR '1'='1")
    assert search(index, "zebra", k=1)

@pytest.mark.parametrize("text", ["\"", "zebra AND (", "field:zebra", "zebra^4 ~", "*", "🦓", "zebra\x00"])
def test_strange_queries_are_only_words(index, text): search(index, text, k=3)

def test_another_process_finds_new_rows_at_once(index, tmp_path):
    index.upsert(rows_of("fresh", tokens(4, 77), captions=["a unique giraffe"]))
    code = f"from video_vlm.search import Index, search; print(search(Index({str(tmp_path/'ix')!r}, 'f'*64, 16), 'giraffe', k=1)[0].clip)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "fresh"

def test_upsert_replaces_and_delete_stays_deleted_after_compaction(index):
    n = len(index)
    index.upsert(rows_of("clip3", tokens(6, 3), tenant="b", captions=["now a lion"]))
    assert len(index) == n and search(index, "lion", k=1)[0].clip == "clip3"
    index.delete("clip3"); index.compact()
    assert not search(index, "lion", k=1) and all(h.clip != "clip3" for h in search(index, "zebra", k=60))

def test_recall_against_brute_force(index): assert sample_recall(index, queries=10) == 1.

def test_what_cannot_be_searched_is_refused(index, tmp_path):
    with pytest.raises(SearchError, match="nothing to search"): search(index, " ")
    with pytest.raises(SearchError, match="at least 1"): search(index, "a", k=0)
    with pytest.raises(SearchError, match="shape"): search(index, vector=np.zeros(3))
    with pytest.raises(SearchError, match="another width"): index.upsert([dict(id="x", vector=np.zeros(3))])
    with pytest.raises(SearchError, match="cannot be compared"): Index(tmp_path/"ix", "e"*64, 16)
    with pytest.raises(SearchError, match="no clips"): index_clips(tmp_path/"none", [], None, None, "f", progress=False)

def test_fusion_prefers_what_both_rankings_name():
    a, b, c = (Hit(x, 0., 1., 0.) for x in "abc")
    assert [h.clip for h in fuse([[a, b], [c, b]])][0] == "b"

def test_invented_citations_are_removed_and_counted():
    hits = [Hit("abc", 2., 6., 1.)]
    text, good, bad = check_citations("First [abc 2.0s-3.0s], then [abc 5.0s-9.0s] and [zzz 1.0s-2.0s], [abc 4s-3s].", hits)
    assert len(good) == 1 and bad == 3 and "zzz" not in text and "[abc 2.0s-3.0s]" in text
