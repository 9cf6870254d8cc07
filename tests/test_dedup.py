"Near-duplicates: real pairs, killed runs, incremental runs, the guard, the index."
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from video_vlm import dedup as D
from video_vlm.bench.dedup import incremental_figures, make_pairs, measure_pairs, moving_discs, read_pairs, scale_run, scale_sizes
from video_vlm.data import VideoVLMError, ingest, IngestConfig, load_clips, open_stage, write_video
from video_vlm.dedup import (DedupConfig, MIRROR, Signature, align_hashes, candidates, candidates_on_disk, cluster, compare, content_box, dedup, frame_hashes, hamming,
                             load_clusters, lookup, same_text, signature)

CFG, QUIET = DedupConfig(progress=False, workers=1), IngestConfig(progress=False)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("clips")
    for k in range(4): write_video(d/f"{k}.mp4", moving_discs(k, seconds=3.), fps=12)
    write_video(d/"0_mirror.mp4", moving_discs(0, seconds=3.)[:, :, ::-1].copy(), fps=12, crf=30)
    return d

def test_made_pairs(tmp_path):
    rows = make_pairs(tmp_path, 2)
    figures, *_ = measure_pairs(rows, tmp_path, CFG, 1)
    assert (figures["precision"], figures["recall"]) == (1., 1.), figures["missed"] + figures["accused"]

@pytest.mark.slow
def test_real_pairs_meet_the_bars(shared_data, note):
    rows = read_pairs(shared_data/"neardup"/"pairs.csv")
    f, *_ = measure_pairs(rows, shared_data, CFG, os.cpu_count() or 1)
    note("near-duplicates", {k: f[k] for k in ("precision", "recall", "recall_easy", "recall_medium", "recall_hard")})
    assert f["precision"] >= .98 and f["recall_easy"] >= .97 and f["recall_medium"] >= .92 and f["recall_hard"] >= .65, f["missed"] + f["accused"]

def test_some_real_pairs(shared_data):
    d = shared_data/"neardup"; s = lambda n: signature(d/n, CFG)
    base = s("bottles.mp4")
    assert compare(base, s("bottles__combo_mirror_crop_low.mp4")).is_duplicate
    assert not compare(s("cam_p1.mp4"), s("cam_p2.mp4")).is_duplicate

def test_signature_survives_the_disk(folder, tmp_path):
    s = signature(folder/"0.mp4", CFG); r = Signature.load(s.save(tmp_path/"x.npz"))
    assert all(np.array_equal(getattr(s, k), getattr(r, k)) for k in ("times", "thumbs", "hashes", "points", "descs")) and (s.size, s.box) == (r.size, r.box)

def test_still_one_frame_and_flat_clips(tmp_path):
    one = write_video(tmp_path/"one.mp4", moving_discs(1)[:1], fps=10); flat = write_video(tmp_path/"flat.mp4", np.full((12, 64, 64, 3), 90, np.uint8), fps=6)
    a, b = signature(one, CFG), signature(flat, CFG)
    assert not compare(a, b).is_duplicate and not compare(b, a).is_duplicate
    assert not compare(b, signature(write_video(tmp_path/"flat2.mp4", np.full((12, 64, 64, 3), 200, np.uint8), fps=6), CFG)).is_duplicate

def test_letterbox_is_cut_off():
    g = np.zeros((6, 90, 120), np.uint8); g[:, 15:75] = np.random.default_rng(0).integers(0, 255, (6, 60, 120))
    assert content_box(g) == (0, 15, 120, 75)

def test_mirrored_hash_is_one_xor_away():
    g = np.random.default_rng(0).integers(0, 255, (1, 8, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    h, m = (frame_hashes(x, (0, 0, 64, 64))[0][0] for x in (g, g[:, :, ::-1]))
    assert hamming(h, m ^ MIRROR) <= 2

def test_chains_of_weak_links_do_not_join_strangers():
    groups, refused = cluster(6, [(0, 1, .99), (2, 3, .99), (4, 5, .99), (1, 2, .89), (3, 4, .88)])
    assert len(set(groups)) == 2 and refused == [(3, 4, .88)]
    assert len(set(cluster(4, [(0, 1, .99), (2, 3, .99), (0, 2, .89), (1, 3, .88)])[0])) == 1

def test_index_on_disk_equals_index_in_memory():
    rng = np.random.default_rng(0); keys, owner = rng.integers(0, 500, 4000).astype(np.uint64), np.repeat(np.arange(100), 40)
    a, b = candidates(keys, owner, 100, CFG), None
    import tempfile
    with tempfile.TemporaryDirectory() as d: b = candidates_on_disk([(keys[:2000], owner[:2000]), (keys[2000:], owner[2000:])], 100, d, replace(CFG, min_votes=2.5), 4)
    big = lambda p, v: {tuple(x) for x, y in zip(p.tolist(), v) if y > 4}
    assert big(*a) == big(*b)

def test_a_word_of_everybody_costs_little():
    n = 20000; keys, owner = np.zeros(n, np.uint64), np.arange(n)
    t = time.time(); candidates(keys, owner, n, CFG); assert time.time()-t < 20

def test_run_again_does_nothing_and_grows(folder, tmp_path):
    src = tmp_path/"src"; shutil.copytree(folder, src); st = ingest(src, tmp_path/"00", QUIET); out = dedup(st, tmp_path/"01", CFG)
    before, made = load_clusters(out), {p: p.stat().st_mtime_ns for p in (out/"signatures").rglob("*.npz")}
    assert len(before) == 5 and len(set(before.values())) == 4
    write_video(src/"late.mp4", moving_discs(2, seconds=3.)[6:], fps=12, crf=30); ingest(src, st, QUIET); dedup(st, out, CFG); after = load_clusters(out)
    assert len(after) == 6 and len(set(after.values())) == 4, "the trimmed copy found its cluster"
    assert all(p.stat().st_mtime_ns == t for p, t in made.items()), "old signatures were not made again"

def test_segments_are_merged_and_find_the_same(tmp_path):
    rng = np.random.default_rng(0); keys, owner = rng.integers(0, 300, 8000).astype(np.uint64), np.repeat(np.arange(200), 40); q, who = rng.integers(0, 300, 80).astype(np.uint64), np.repeat(np.arange(2), 40)
    for k in range(8): part = owner//25 == k; D._write_segment(tmp_path, keys[part], owner[part]-25*k, [str(i) for i in range(25*k, 25*k+25)]); D._publish(tmp_path)
    segments = list(D._segments(tmp_path)); assert len(segments) == 1 and segments[0][2] == [str(i) for i in range(200)]
    order = np.argsort(keys, kind="stable"); whole = keys[order], owner[order], segments[0][2]; many = replace(CFG, bucket=10**6)
    (a, b), (c, d) = lookup(q, who, segments[0], many), lookup(q, who, whole, many); assert sorted(zip(a[:, 0], a[:, 1], b.round(3))) == sorted(zip(c[:, 0], c[:, 1], d.round(3)))
    D._write_segment(tmp_path, keys[:40], owner[:40], ["late"]); D._publish(tmp_path); assert [len(s[2]) for s in D._segments(tmp_path)] == [200, 1], "a small one is not worth a merge"

def test_killed_between_candidates_and_index(folder, tmp_path, monkeypatch):
    st = ingest(folder, tmp_path/"00", QUIET)
    def dies(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(D, "_publish", dies)
        with pytest.raises(KeyboardInterrupt): dedup(st, tmp_path/"01", CFG)
    (tmp_path/"01"/"candidates.jsonl").unlink()          # or even before they were on disk
    with open(tmp_path/"01"/"compared.jsonl", "a") as f: f.write('{"a": "half')
    for _ in range(2): assert len(set(load_clusters(dedup(st, tmp_path/"01", CFG)).values())) == 4

def test_another_config_is_refused(folder, tmp_path):
    st = ingest(folder, tmp_path/"00", QUIET); dedup(st, tmp_path/"01", CFG)
    with pytest.raises(VideoVLMError, match="another DedupConfig"): dedup(st, tmp_path/"01", replace(CFG, threshold=.9))

def test_broken_clip_is_recorded(folder, tmp_path):
    src = tmp_path/"src"; shutil.copytree(folder, src); st = ingest(src, tmp_path/"00", QUIET)
    (src/"3.mp4").write_bytes(b"gone bad"); out = dedup(st, tmp_path/"01", CFG)
    assert open_stage(out)["counts"]["failed"] == 1 and len(load_clusters(out)) == 5

@pytest.mark.slow
def test_killed_run_goes_on(folder, tmp_path):
    st = ingest(folder, tmp_path/"00", QUIET)
    code = f"from video_vlm.dedup import *; dedup({str(st)!r}, {str(tmp_path/'01')!r}, DedupConfig(progress=False, workers=1))"
    p = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    for _ in range(600):
        if list((tmp_path/"01").rglob("*.npz")) or p.poll() is not None: break
        time.sleep(.1)
    try: os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    p.wait()
    assert len(set(load_clusters(dedup(st, tmp_path/"01", CFG)).values())) == 4

def test_same_text():
    t = ["a red square moves to the left and then stops", "A red square moves to the left, and then stops.", "three dogs run over the snow in winter"]
    assert [p[:2] for p in same_text(t)] == [(0, 1)]
    assert same_text(t, embed=lambda x: np.eye(3)[[0, 0, 0]])[-1][:2] == (1, 2)

def test_synthetic_scale_is_right_before_it_is_fast():
    r = scale_run(1000, CFG); assert r["recall"] > .95 and r["wrong"] == 0
    assert incremental_figures(CFG, 2000, 100)["incremental"]["recall"] > .95
    assert scale_sizes("1e3, 2e4", False) == (1000, 20000) and scale_sizes("", False) == () and scale_sizes(None, True)[-1] == 20000
    with pytest.raises(VideoVLMError): scale_sizes("many", False)

def test_a_pair_that_shares_common_words_in_many_files_is_found(tmp_path):
    "Ten copies share all their words, so each word is common; their votes are spread over the files."
    n, rng = 400, np.random.default_rng(0); words = rng.integers(0, 2**34, (n, 60)).astype(np.uint64); words[:10] = words[0]; keys, owner = words.ravel(), np.repeat(np.arange(n), 60)
    a, b = candidates(keys, owner, n, CFG)[0], candidates_on_disk([(keys, owner)], n, tmp_path, CFG, 64)[0]
    assert set(map(tuple, a.tolist())) == set(map(tuple, b.tolist())) and len({int(x) for p in b for x in p if x < 10}) == 10
