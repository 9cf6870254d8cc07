"Splits: stable, disjoint, audited; planted leaks are found; benchmarks are taken out."
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from video_vlm.bench.dedup import moving_discs
from video_vlm.data import Clip, IngestConfig, VideoVLMError, ingest, load_clips, open_stage, write_video
from video_vlm.dedup import DedupConfig, dedup, load_clusters
from video_vlm.filters import FilterConfig, Rule, filter_clips
from video_vlm.splits import (Leak, SplitConfig, assign, atoms, audit, audit_clips, benchmark_texts, decontaminate, check_columns, load_removed, load_splits, side, split, text_overlap, unit_hash, _place, _spare)

CFG = DedupConfig(progress=False, workers=1)
def clip(i, **kw): return Clip(id=f"{i:05d}", uri=f"{i}.mp4", duration=4., **kw)
def alone(clips): return {c.id: c.id for c in clips}

def test_a_clip_never_changes_its_split():
    old = [clip(i) for i in range(500)]; new = [clip(i) for i in range(500, 900)]
    a, b = assign(old, alone(old)), assign(old+new, alone(old+new))
    assert all(b[k] == v for k, v in a.items())

def test_growth_that_bridges_two_sides_moves_nothing():
    clips = [clip(i) for i in range(40)]; at = alone(clips); sides = assign(clips, at)
    a, b = next(k for k, v in sides.items() if v == "train"), next(k for k, v in sides.items() if v == "test")
    bridge = clip(99); both = {**{k: v for k, v in at.items()}, a: a, b: a, bridge.id: a}
    rows = {r["id"]: r["split"] for r in _place([*clips, bridge], both, SplitConfig(), sides)}
    assert rows[a] == "train" and rows[b] == "test" and rows[bridge.id] == ""

def test_seed_and_fractions():
    c = [clip(i) for i in range(4000)]; one, two = assign(c, alone(c)), assign(c, alone(c), SplitConfig(seed=1))
    assert one != two and one == assign(c, alone(c))
    n = Counter(one.values()); assert abs(n["train"]/4000-.7) < .03 and abs(n["test"]/4000-.2) < .03

def test_ties_by_creator_and_source():
    c = [clip(0, creator="x"), clip(1, creator="x", flags=["source_video=v"]), clip(2, flags=["source_video=v"]), clip(3)]
    at = atoms(c, {}); assert len({at[k.id] for k in c[:3]}) == 1 and at[c[3].id] != at[c[0].id]

def test_by_time_puts_the_newest_into_test():
    c = [clip(i, collected_at=f"2026-01-{i+1:02d}") for i in range(20)]; s = assign(c, alone(c), SplitConfig((.6, .2, .2), by_time=True))
    order = [s[k.id] for k in c]; assert order == sorted(order, key=("train", "val", "test").index) and set(order) == {"train", "val", "test"}
    s = assign(c, alone(c), SplitConfig(by_time=True, before=("2026-01-05", "2026-01-10"))); assert Counter(s.values()) == dict(train=5, val=5, test=10)

def test_stratified_is_closer_than_chance():
    c = [clip(i, flags=[f"k={'a' if i % 5 else 'b'}"]) for i in range(400)]; s = assign(c, alone(c), SplitConfig(stratify=("k",)))
    rare = [s[k.id] for k in c if k.flags == ["k=b"]]; assert abs(rare.count("train")/len(rare)-.7) < .12

def test_a_column_that_is_none_is_refused():
    c = [replace(clip(i, codec="h264" if i % 5 else "vp9", flags=[f"k={i % 2}"]), duration=float(2**(i % 3))) for i in range(300)]; check_columns(c, ("codec", "k", "duration"))
    for bad in ("mood", "captions", "id", ""):
        with pytest.raises(VideoVLMError, match="no clip has a column .*codec"): check_columns(c, (bad,))
    s = assign(c, alone(c), SplitConfig(stratify=("codec", "duration"))); share = lambda f: [np.mean([f(k) for k in c if s[k.id] == n]) for n in ("train", "val", "test")]
    assert np.ptp(share(lambda k: k.codec == "vp9")) < .06 and np.ptp(share(lambda k: k.duration == 4.)) < .06
    with pytest.raises(VideoVLMError, match="by time"): SplitConfig(stratify=("codec",), by_time=True)

def test_planted_leaks_of_metadata():
    c = [clip(0, creator="x", captions=[dict(text="a dog jumps over the fence")]), clip(1, creator="x"), clip(2, captions=[dict(text="A dog jumps over  the fence")]),
         clip(3, flags=["source_video=v"]), clip(4, flags=["source_video=v"])]
    s = dict(zip((k.id for k in c), ("train", "test", "val", "train", "val")))
    a = audit_clips(c, s, [("00003", "00002", .97)]); assert a.by_kind == dict(creator=1, source_video=1, footage=1, caption=1) and a.n_leaks == 3
    assert audit_clips(c, s, captions_leak=True).n_leaks == 3

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    d = tmp_path_factory.mktemp("built"); v = d/"v"; v.mkdir()
    for k in range(6): write_video(v/f"{k}.mp4", moving_discs(k, seconds=3.), fps=12)
    write_video(v/"0_low.mp4", moving_discs(0, seconds=3.), fps=12, crf=38); write_video(v/"1_part.mp4", moving_discs(1, seconds=3.)[9:], fps=12)
    (v/"2_same.mp4").write_bytes((v/"2.mp4").read_bytes())
    st = ingest(v, d/"00", IngestConfig(progress=False)); de = dedup(st, d/"01", CFG)
    return d, st, de

def test_no_leaks_as_made(built):
    d, st, de = built; out = split(st, de, d/"01a", SplitConfig((.5, .2, .3)))
    assert audit(st, out).n_leaks == 0 and set(load_splits(out)) == {c.id for c in load_clips(st)}
    assert load_splits(split(st, de, d/"01a", SplitConfig((.5, .2, .3)))) == load_splits(out)
    with pytest.raises(VideoVLMError, match="another SplitConfig"): split(st, de, out, SplitConfig(seed=3))

def test_planted_reencode_and_part_are_found_without_the_clusters(built):
    import pyarrow as pa, pyarrow.parquet as pq
    d, st, de = built; out = split(st, de, d/"01x"); name = {Path(c.uri).name: c.id for c in load_clips(st)}; s = dict.fromkeys(load_splits(out), "train")
    s[name["0_low.mp4"]] = "test"; s[name["1_part.mp4"]] = "val"
    pq.write_table(pa.table(dict(id=list(s), split=list(s.values()), atom=list(s))), out/"splits.parquet")
    for folder in (de, d/"nowhere"):
        a = audit(st, out, folder, cfg=CFG); assert a.by_kind == dict(footage=2), a
    with pytest.raises(VideoVLMError, match="2 leaks"): a.raise_for_leaks()

def test_decontamination(built, tmp_path):
    d, st, de = built; b = tmp_path/"bench"; b.mkdir(); write_video(b/"q.mp4", moving_discs(0, seconds=3.)[:, :, ::-1].copy(), fps=12)
    out = decontaminate(st, de, tmp_path/"out", videos=b, cfg=CFG); name = {c.id: Path(c.uri).name for c in load_clips(st)}
    assert {name[i] for i in load_removed(out)} == {"0.mp4", "0_low.mp4"} and "footage" in (out/"report.md").read_text()
    assert all(load_splits(split(st, de, tmp_path/"s", exclude=out))[i] == "" for i in load_removed(out))

def test_paraphrases_of_the_dedup_stage_are_warned_about(tmp_path):
    v = tmp_path/"v"; v.mkdir()
    for k, t in enumerate(("a dog jumps over the fence", "over the fence leaps a dog", "a ship leaves the harbour")): write_video(v/f"{k}.mp4", moving_discs(k+7, seconds=3.), fps=12); (v/f"{k}.txt").write_text(t)
    st = ingest(v, tmp_path/"00", IngestConfig(progress=False)); means = lambda texts: np.stack([np.eye(2)[int("dog" in t)] for t in texts]); id = {Path(c.uri).stem: c.id for c in load_clips(st)}
    plain, told = dedup(st, tmp_path/"01", CFG), dedup(st, tmp_path/"02", CFG, embed_text=means)
    for copies, found in ((plain, {}), (told, dict(caption=1))):
        out = split(st, copies, tmp_path/f"s{len(found)}"); s = {id["0"]: "train", id["1"]: "test", id["2"]: "val"}
        import pyarrow as pa, pyarrow.parquet as pq
        pq.write_table(pa.table(dict(id=list(s), split=list(s.values()), atom=list(s))), out/"splits.parquet")
        assert (got := audit(st, out, copies)).by_kind == found and got.n_leaks == 0 and (not found or "paraphrase" in got.warnings[0].detail)

def test_one_clip_of_each_cluster_and_it_stays(built, tmp_path):
    d, st, de = built; name = {Path(c.uri).name: c.id for c in load_clips(st)}; one = SplitConfig(copies=False)
    s = load_splits(split(st, de, tmp_path/"s", one)); spare = [n for n, i in name.items() if not s[i]]
    assert len(spare) == 2 and "1_part.mp4" in spare and spare[0].startswith("0")
    part = name["1_part.mp4"]; first = load_splits(split(st, de, tmp_path/"t", one, exclude={name["1.mp4"]})); assert first[part] and not first[name["1.mp4"]]
    assert _spare([c for c in load_clips(st) if c.id in (part, name["1.mp4"])], load_clusters(de), {name["1.mp4"]}, first) == {name["1.mp4"]}
    with pytest.raises(VideoVLMError, match="another SplitConfig .copies."): split(st, de, tmp_path/"s")

def test_what_a_filter_refused_goes_out_of_the_split(built, tmp_path):
    d, st, de = built; f = filter_clips(st, tmp_path/"f", FilterConfig(progress=False, workers=1).with_rules(duration=Rule(2.5)))
    s = load_splits(split(st, de, tmp_path/"s", exclude=f)); name = {c.id: Path(c.uri).name for c in load_clips(st)}
    assert [name[i] for i, side in s.items() if not side] == [name[i] for i in load_removed(f)] == ["1_part.mp4"] and load_removed(f)[next(i for i in s if not s[i])] == "filter duration"
    with pytest.raises(VideoVLMError, match="decontaminate or filter"): load_removed(de)

def test_a_config_of_an_older_version_is_the_same(built, tmp_path):
    d, st, de = built; out = split(st, de, tmp_path/"s"); c = json.loads((out/"config.json").read_text()); c.pop("copies")
    (out/"config.json").write_text(json.dumps(c)); assert split(st, de, out) == out

def test_texts_of_benchmark_files(tmp_path, shared_data):
    for f, n in (("tempcompass/questions_multi-choice.json", 50), ("nextqa/val.csv", 100)):
        p = shared_data/"bench"/f
        if p.exists(): assert len(benchmark_texts(p)) >= n
    f = tmp_path/"b.json"; f.write_text(json.dumps({"x": [{"q": "what does the man in the red coat hold?"}]}))
    c = [clip(0, captions=[dict(text="What does the man in the red coat hold")]), clip(1, captions=[dict(text="a cat sleeps on the warm window sill")])]
    assert [r[0] for r in text_overlap(c, benchmark_texts(f))] == ["00000"]
    f.write_text("{no json"); pytest.raises(VideoVLMError, benchmark_texts, f)
