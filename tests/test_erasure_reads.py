"Tombstones below every reader: found from any folder of the house, effective in other processes, kept over a restored backup."
import json, multiprocessing as mp, random, shutil
from dataclasses import dataclass
from pathlib import Path
import pytest
from video_vlm import flywheel as F, tombstones as T

@dataclass
class Row: id:str; creator:str=""; tenant:str=""

def test_the_nearest_erasure_folder_above_holds(tmp_path):
    deep = tmp_path/"runs/demo/00_data"; deep.mkdir(parents=True)
    assert not T.tombstones_of(deep).rows() and T.standing([Row("x")], deep) == [Row("x")]
    T.Tombstones(tmp_path/"runs/erasure/tombstones.jsonl").add(T.Subject("video", "x"))
    assert T.standing([Row("x"), Row("y")], deep) == [Row("y")] and T.standing([Row("x")], tmp_path) == [Row("x")]
    with pytest.raises(T.Erased): T.refuse_erased(deep, video="x")

def test_whoever_brought_it_counts_too(tmp_path):
    T.Tombstones(tmp_path/"erasure/tombstones.jsonl").add(T.Subject("person", "ann")); T.Tombstones(tmp_path/"erasure/tombstones.jsonl").add(T.Subject("tenant", "acme"))
    rows = [Row("a", creator="ann"), Row("b", tenant="acme"), Row("c", creator="bob", tenant="other"), Row("d")]
    assert [r.id for r in T.standing(rows, tmp_path)] == ["c", "d"]
    assert T.standing([dict(clip="a", who="ann"), dict(clip="c", who="")], tmp_path, video=lambda r: r["clip"], person=lambda r: r["who"] or None, tenant=lambda r: None) == [dict(clip="c", who="")]

def _add(path, i): T.Tombstones(path).add(T.Subject("video", f"v{i}"))

def test_other_processes_see_it_and_do_not_tear_it(tmp_path):
    t = T.Tombstones(tmp_path/"erasure/tombstones.jsonl"); t.add(T.Subject("video", "first")); assert not t.covers(video="v3")
    ps = [mp.get_context("fork").Process(target=_add, args=(t.path, i)) for i in range(6)]
    for p in ps: p.start()
    for p in ps: p.join(); assert p.exitcode == 0
    assert all(t.covers(video=f"v{i}") for i in range(6)) and len(t.path.read_text().splitlines()) == 7

@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_torn_anywhere_hides_nothing_else(tmp_path, cut):
    p = tmp_path/"t.jsonl"; t = T.Tombstones(p); t.add(T.Subject("video", "one")); whole = p.read_bytes()
    T.Tombstones(p).add(T.Subject("video", "two")); p.write_bytes(whole+p.read_bytes()[len(whole):len(whole)+cut])
    u = T.Tombstones(p); assert u.covers(video="one") and not u.covers(video="two")
    u.add(T.Subject("video", "three")); v = T.Tombstones(p); assert v.covers(video="one") and v.covers(video="three")

def test_between_tombstone_and_delete_and_after_a_restored_backup(tmp_path):
    "A killed erasure and a restored backup: readers that ask never see the row."
    runs = tmp_path/"runs"; home = runs/"logs"; home.mkdir(parents=True); gone, stay = "a"*64, "b"*64
    (home/"l.jsonl").write_text("".join(json.dumps(dict(id=i))+"\n" for i in (gone, stay))); shutil.copytree(home, tmp_path/"backup")
    read = lambda: [r.id for r in T.standing([Row(json.loads(l)["id"]) for l in (home/"l.jsonl").read_text().splitlines()], home)]
    def dies(s, ids, found): raise KeyboardInterrupt
    broken = F.Erasure(runs/"erasure", [F.Eraser("slow", lambda s, ids: ["x"], dies)])
    with pytest.raises(KeyboardInterrupt): broken.erase(F.Subject("video", gone))
    assert gone in (home/"l.jsonl").read_text() and read() == [stay]
    job = F.Erasure(runs/"erasure", [F.folder_eraser(home)]); job.erase(F.Subject("video", gone)); assert gone not in (home/"l.jsonl").read_text()
    shutil.copytree(tmp_path/"backup", home, dirs_exist_ok=True); assert gone in (home/"l.jsonl").read_text() and read() == [stay]
    assert job.honour() and not job.verify(F.Subject("video", gone)) and read() == [stay]

@pytest.mark.parametrize("seed", range(8))
def test_random_owners_random_order(tmp_path, seed):
    "Whatever is erased in whatever order: a row stands if and only if neither it, nor who made it, nor its tenant was erased."
    rng = random.Random(seed); rows = [Row(f"{rng.getrandbits(256):064x}", rng.choice(["", "ann", "bob", "zoe"]), rng.choice(["", "acme", "other"])) for _ in range(40)]
    t = T.Tombstones(tmp_path/"erasure/tombstones.jsonl"); dead = dict(video=set(), person=set(), tenant=set())
    for _ in range(6):
        kind = rng.choice(list(dead)); r = rng.choice(rows); who = dict(video=r.id, person=r.creator, tenant=r.tenant)[kind]
        if not who: continue
        t.add(T.Subject(kind, who)); dead[kind].add(who)
        assert T.standing(rows, tmp_path/"any/where") == [r for r in rows if not (r.id in dead["video"] or r.creator in dead["person"] or r.tenant in dead["tenant"])]

def test_the_readers_of_the_house_ask(tmp_path):
    "Manifest, token store and index: one line in `erasure` and the clip is as if it were not there, its bytes still on disk."
    from video_vlm.data import IngestConfig, content_id, ingest, load_clips, probe, tiny_clips, training_clips
    from video_vlm.encoder import VideoEncoder, tiny_encoder_config
    from video_vlm.frames import plan_frames
    from video_vlm.search import Index, rows_of, search
    from video_vlm.store import TokenStore, visual_tokens
    runs = tmp_path/"runs"; tiny_clips(tmp_path/"clips"); stage = ingest(tmp_path/"clips", runs/"00_data", IngestConfig(progress=False)); clips = load_clips(stage)
    enc, store, ix = VideoEncoder(tiny_encoder_config()).eval(), TokenStore(runs/"tokens"), None
    for c in clips:
        plan = plan_frames(probe(c.uri), fps=4, max_frames=8, size=enc.size, group=enc.group, tokens_per_group=enc.tokens_per_group); vt = visual_tokens(c, plan, enc, store)
        ix = ix or Index(runs/"index", enc.fingerprint, enc.width)
        ix.upsert(rows_of(c.id, vt, captions=["a ball"]))
    gone, plans = clips[0], lambda c: plan_frames(probe(c.uri), fps=4, max_frames=8, size=enc.size, group=enc.group, tokens_per_group=enc.tokens_per_group)
    assert {h.clip for h in search(ix, "ball", k=20)} == {c.id for c in clips}
    T.Tombstones(runs/"erasure/tombstones.jsonl").add(T.Subject("video", gone.id))
    assert [c.id for c in load_clips(stage, rejected=True)] == [c.id for c in clips[1:]] == [c.id for c in training_clips(stage)]
    assert {h.clip for h in search(ix, "ball", k=20)} == {c.id for c in clips[1:]}
    for ask in (gone, gone.uri):
        with pytest.raises(T.Erased): visual_tokens(ask, plans(gone), enc, store)
    assert visual_tokens(clips[1], plans(clips[1]), enc, store) is not None and store.counters["encodes"] == len(clips)

def test_a_creator_that_was_erased_takes_the_rows_along(tmp_path):
    from video_vlm.data import erased
    f = T.Tombstones(tmp_path/"erasure/tombstones.jsonl"); assert not erased(tmp_path)("x", "ann")
    f.add(T.Subject("person", "ann")); gone = erased(tmp_path/"a/b")
    assert gone("x", "ann") and not gone("x", "bob") and not gone("x") and not gone("", "")

def test_a_copy_of_an_erased_clip_may_come(tmp_path):
    "The words of an erased clip stay in the index of dedup under a pseudonym; a copy that comes later meets them, and dedup goes on."
    import av, numpy as np
    from video_vlm.data import IngestConfig, content_id, ingest, write_video
    from video_vlm.dedup import DedupConfig, dedup, load_clusters
    from video_vlm.world import WorldConfig, write_world
    world, runs = write_world(tmp_path/"w", WorldConfig(n=3, seed=3, size=160), workers=1, progress=False)/"clips", tmp_path/"runs"
    def both(): ingest(world, runs/"00_ingest", IngestConfig(progress=False)); return load_clusters(dedup(runs/"00_ingest", runs/"01_dedup", DedupConfig(progress=False, workers=1)))
    assert len(both()) == 3; gone = sorted(world.iterdir())[0]
    with av.open(str(gone)) as c: frames = np.stack([f.to_ndarray(format="rgb24") for f in c.decode(video=0)])
    id = content_id(gone); F.erase("video", id, runs=runs); assert not gone.exists()
    write_video(world/"copy.mp4", frames, fps=12, crf=28)
    found = both(); assert len(set(found.values())) == 3 == len(found) and id not in found
    assert not any(id in p.name or id.encode() in p.read_bytes() for p in (runs/"01_dedup").rglob("*") if p.is_file())
