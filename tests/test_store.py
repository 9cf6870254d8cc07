"The store under many processes, kills, damage, a full disk and erasure. Children are real processes; kills are SIGKILL."
import errno, multiprocessing as mp, os, pickle, random, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import pytest
from video_vlm.data import VideoVLMError, tiny_clips, probe
from video_vlm.encoder import VisualTokens
from video_vlm.frames import FramePlan, plan_frames
from video_vlm.store import DamagedEntry, TokenStore, pack, token_key, unpack, visual_tokens

fork = mp.get_context("fork")
def key(i): return f"{i:03x}{i:061x}"   # the first three digits choose the lock
def entry(i, M=64, D=32): return VisualTokens(np.full((M, 16, D), i % 97, np.float16), np.arange(M)*.5, np.arange(M)*.5+.5, key(i))
def is_entry(vt, i): return vt.key == key(i) and (vt.tokens == i % 97).all()
def start(fn, *args):
    p = fork.Process(target=fn, args=args, daemon=True); p.start(); return p
def until(what, seconds=60):
    end = time.time()+seconds
    while not what():
        assert time.time() < end, "waited too long"
        time.sleep(.01)
def noted(log, vt, seconds=0):
    with open(log, "a") as f: f.write("x")   # one byte an encode, from whichever process
    time.sleep(seconds); return vt

def ask(folder, log, i, gate, out, seconds):
    store = TokenStore(folder); gate.wait()
    vt = store.get_or_encode(key(i), lambda: noted(log, entry(i), seconds), "clip")
    out.put((is_entry(vt, i), store.counters["encodes"]))

def test_hundred_processes_one_encode(tmp_path):
    gate, out, log = fork.Event(), fork.Queue(), tmp_path/"log"
    ps = [start(ask, tmp_path/"s", log, 5, gate, out, .3) for _ in range(100)]
    gate.set(); got = [out.get(timeout=240) for _ in ps]
    for p in ps: p.join(30)
    assert log.read_text() == "x" and all(ok for ok, _ in got) and sum(n for _, n in got) == 1

def test_hundred_threads_one_encode(tmp_path):
    store, log = TokenStore(tmp_path/"s"), tmp_path/"log"
    with ThreadPoolExecutor(100) as pool: got = list(pool.map(lambda _: store.get_or_encode(key(5), lambda: noted(log, entry(5), .3), "c"), range(100)))
    assert log.read_text() == "x" and all(is_entry(v, 5) for v in got) and store.counters["misses"] == 1

def test_killed_holder_blocks_nobody(tmp_path):
    folder, log, gate, out = tmp_path/"s", tmp_path/"log", fork.Event(), fork.Queue(); gate.set()
    holder = start(ask, folder, log, 7, gate, out, 600)
    until(lambda: log.exists())                    # it holds the lock and encodes
    second = start(ask, folder, log, 7, gate, out, 0)
    time.sleep(.5); assert log.read_text() == "x"   # the second one waits
    os.kill(holder.pid, signal.SIGKILL); holder.join()
    assert out.get(timeout=60) == (True, 1); second.join(30)
    assert log.read_text() == "xx"

def test_hanging_holder_is_overtaken(tmp_path):
    folder, log, gate, out = tmp_path/"s", tmp_path/"log", fork.Event(), fork.Queue(); gate.set()
    holder = start(ask, folder, log, 7, gate, out, 600)
    try:
        until(lambda: log.exists())
        store = TokenStore(folder, wait_s=.3)
        assert is_entry(store.get_or_encode(key(7), lambda: entry(7)), 7) and store.counters["overtaken"] == 1
    finally: os.kill(holder.pid, signal.SIGKILL); holder.join()

def write_for_ever(folder, seed, ready, max_bytes):
    store, rng = TokenStore(folder, max_bytes=max_bytes, memory_items=0), random.Random(seed); ready.set()
    while True: i = rng.randrange(40); store.put(entry(i, D=256), f"clip{i}")

@pytest.mark.parametrize("max_bytes", [None, 12_000_000])
def test_killed_writers_leave_no_half_entry(tmp_path, max_bytes):
    folder, rng = tmp_path/"s", random.Random(0)
    for round in range(12):
        readies = [fork.Event() for _ in range(2)]
        ps = [start(write_for_ever, folder, 10*round+j, r, max_bytes) for j, r in enumerate(readies)]
        for r in readies: assert r.wait(60)
        time.sleep(rng.uniform(.02, .15))
        for p in ps: os.kill(p.pid, signal.SIGKILL)
        for p in ps: p.join()
    store = TokenStore(folder, max_bytes=max_bytes, memory_items=0)
    files = list((folder/"entries").rglob("*.safetensors"))
    assert files and all(is_entry(unpack(f.read_bytes(), f.stem), int(f.stem[:3], 16)) for f in files)
    store.put(entry(99), "last")                     # nobody is locked out, and the ledger is right again
    assert max_bytes is None or store.stats()["bytes"] <= max_bytes
    store._sweep(older=0); assert not list((folder/"tmp").iterdir())
    for i in range(40): store.erase(f"clip{i}")      # every entry is found through the index
    assert store.stats()["entries"] == 1

def test_killed_between_temp_and_rename(tmp_path):
    "The worst moment, chosen: the process dies by SIGKILL when the bytes are half written."
    code = f"""
import os, signal, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r}); sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import *
write = pathlib.Path.write_bytes
def half(self, raw):
    write(self, raw[:len(raw)//2]); os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.write_bytes = half
TokenStore({str(tmp_path/"s")!r}).put(entry(3), "clip")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    store = TokenStore(tmp_path/"s")
    assert len(list((tmp_path/"s"/"tmp").iterdir())) == 1 and store.get(key(3)) is None
    assert is_entry(store.get_or_encode(key(3), lambda: entry(3), "clip"), 3)
    assert store.erase("clip") == 1 and not list((tmp_path/"s"/"tmp").iterdir())   # the dead writer's bytes are erased, too

@pytest.mark.parametrize("int8", [False, True])
def test_damage_is_recomputed(tmp_path, int8):
    rng = np.random.default_rng(0)
    vt = VisualTokens(rng.normal(size=(5, 4, 16)).astype(np.float16), np.arange(5.), np.arange(5.)+1, "a"*64)
    good = TokenStore(tmp_path/"s", int8=int8).put(vt, "c")
    raw = (path := TokenStore(tmp_path/"s").path(vt.key)).read_bytes()
    kinds = [raw[:k] for k in range(0, len(raw), 37)] + [raw+b"x"*8, b"\xff"*len(raw), (1 << 62).to_bytes(8, "little")+raw[8:]]
    for _ in range(300):
        bad = bytearray(raw); bad[rng.integers(len(raw))] ^= 1 << rng.integers(8); kinds.append(bytes(bad))
    served = 0
    for bad in kinds:
        path.write_bytes(bad); store = TokenStore(tmp_path/"s", int8=int8)
        got = store.get_or_encode(vt.key, lambda: vt, "c")
        assert (got.tokens == good.tokens).all() and (got.starts == vt.starts).all() and (got.ends == vt.ends).all()
        served += store.counters["damaged"] == 0
    assert served == 0, "some damage was not noticed"

def test_full_disk_does_not_fail_the_request(tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
    store = TokenStore(tmp_path/"s"); monkeypatch.setattr("video_vlm.store.os.replace", full)
    assert is_entry(store.get_or_encode(key(3), lambda: entry(3), "c"), 3)
    assert store.counters["put_errors"] == 1 and not list((tmp_path/"s"/"tmp").iterdir())

def fill(folder, n, seed, out):
    store = TokenStore(folder, max_bytes=2_000_000, memory_items=0); worst = 0
    for i in range(n):
        store.put(entry(1000*seed+i), f"c{i}"); worst = max(worst, store.stats()["bytes"])
    out.put(worst)

def test_size_limit_over_processes(tmp_path):
    out = fork.Queue(); ps = [start(fill, tmp_path/"s", 60, j, out) for j in range(4)]
    worst = [out.get(timeout=120) for _ in ps]
    for p in ps: p.join(30)
    assert max(worst) <= 2_000_000 + 4*70_000, worst     # a scan may meet the entry that is just being added
    assert TokenStore(tmp_path/"s").stats()["bytes"] <= 2_000_000

def test_recently_used_stays(tmp_path):
    store = TokenStore(tmp_path/"s", max_bytes=10*70_000, touch_s=0)
    for i in range(40):
        store.put(entry(i), "c"); assert store.get(key(0)) is not None; time.sleep(.002)
    assert 0 < store.stats()["entries"] <= 10
    links = {f.name for f in (tmp_path/"s"/"index").rglob("*") if f.is_file()}
    assert links == {f.stem for f in (tmp_path/"s"/"entries").rglob("*.safetensors")}   # eviction leaves no dangling links

def test_erasure_reaches_other_processes(tmp_path):
    a, b = TokenStore(tmp_path/"s"), TokenStore(tmp_path/"s")
    a.put(entry(1), "x", "t1"); a.put(entry(2), "x", "t2"); a.put(entry(3), "y", "t1")
    assert all(b.get(key(i)) is not None for i in (1, 2, 3))
    assert a.erase(tenant="t1") == 2 and b.get(key(1)) is None and b.get(key(3)) is None and b.get(key(2)) is not None
    assert a.erase("x") == 1 and a.erase("x") == 0 and b.stats()["entries"] == 0
    b.get_or_encode(key(1), lambda: entry(1), "x", "t1"); assert b.stats()["entries"] == 1   # asked again later: a new request

def test_fork_with_a_held_lock(tmp_path):
    "A worker forked while another thread was inside the store must not hang."
    store, out, before = TokenStore(tmp_path/"s"), fork.Queue(), time.time()
    inside, leave = threading.Event(), threading.Event()
    def slow(): inside.set(); leave.wait(60); return entry(4)
    t = threading.Thread(target=lambda: store.get_or_encode(key(4), slow)); t.start(); inside.wait()
    with store._mutex: p = start(lambda: out.put(is_entry(store.get_or_encode(key(6), lambda: entry(6)), 6)))
    assert out.get(timeout=60); p.join(30); leave.set(); t.join()
    assert time.time()-before < 50

def test_pickle_for_spawned_workers(tmp_path):
    store = pickle.loads(pickle.dumps(TokenStore(tmp_path/"s", max_bytes=10**6, int8=True, memory_items=3)))
    assert (store.max_bytes, store.int8, store.memory_items) == (10**6, True, 3)

def test_failures_reach_all_and_are_not_kept(tmp_path):
    store, calls = TokenStore(tmp_path/"s"), []
    def bad(): calls.append(1); time.sleep(.3); raise VideoVLMError("broken")
    def once(_):
        try: store.get_or_encode(key(1), bad)
        except VideoVLMError as e: return str(e)
    with ThreadPoolExecutor(20) as pool: assert set(pool.map(once, range(20))) == {"broken"}
    assert len(calls) < 20 and is_entry(store.get_or_encode(key(1), lambda: entry(1)), 1)

def test_key_sees_everything():
    plan = FramePlan((0., .5, 1.), 0., 1.5, "fps", 224, 2, 16)
    changed = [FramePlan((0., .5, 1.0000001), 0., 1.5, "fps", 224, 2, 16), FramePlan((0., .5, 1.), 0., 1.6, "fps", 224, 2, 16), FramePlan((0., .5), 0., 1.5, "fps", 224, 2, 16),
               FramePlan((0., .5, 1.), 0., 1.5, "fps", 256, 2, 16), FramePlan((0., .5, 1.), 0., 1.5, "fps", 224, 4, 16), FramePlan((0., .5, 1.), 0., 1.5, "fps", 224, 2, 4)]
    keys = [token_key("c", p, "e") for p in (plan, *changed)] + [token_key("c", plan, "e", "t"), token_key("ce", plan, ""), token_key("", plan, "ce"), token_key("c", plan, "", "e")]
    assert len(set(keys)) == len(keys) and all(len(k) == 64 for k in keys)
    assert token_key("c", FramePlan((0., .5, 1.), 0., 1.5, "keyframes", 224, 2, 16), "e") == keys[0]   # how the times were found does not matter

def test_names_cannot_leave_the_folder(tmp_path):
    store = TokenStore(tmp_path/"s")
    for bad in ("../x", "a"*63, "A"*64, "a"*64+"/..", ""):
        with pytest.raises(VideoVLMError): store.get(bad)
    store.put(entry(1), "../../evil", "/etc/passwd"); assert store.erase("../../evil") == 1
    assert not (tmp_path/"evil").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["s"]

class CountingEncoder:
    "Stands where an encoder stands; says how often it worked."
    fingerprint, size, calls = "e1", 32, 0
    def encode(self, frames, plan):
        self.calls += 1; assert frames.shape == (plan.n_frames, 32, 32, 3)
        return np.repeat(frames.mean((1, 2, 3))[::plan.group, None, None], 4, 1).astype(np.float16)/255

def test_the_one_path(tmp_path):
    clip = tiny_clips(tmp_path/"clips")[1]
    plan, enc = plan_frames(probe(clip), fps=6, max_frames=5, size=32, group=2, tokens_per_group=4), CountingEncoder()
    store = TokenStore(tmp_path/"s"); first = visual_tokens(clip, plan, enc, store)
    assert first.tokens.shape == (plan.n_groups, 4, 1) and first.starts.tolist() == [a for a, _ in plan.group_spans]
    for s in (store, TokenStore(tmp_path/"s"), TokenStore(tmp_path/"s", memory_items=0)):
        assert (visual_tokens(clip, plan, enc, s).tokens == first.tokens).all()
        assert visual_tokens(clip, plan, enc, s, tenant="other") is not None
    assert enc.calls == 2 and store.counters["decodes"] == 2                     # once for each tenant
    os.rename(clip, moved := clip.with_name("moved.mp4")); visual_tokens(moved, plan, enc, store); assert enc.calls == 2   # content, not name
    assert (visual_tokens(moved, plan, enc).tokens == first.tokens).all() and enc.calls == 3
    with pytest.raises(VideoVLMError, match="32"): visual_tokens(moved, plan_frames(probe(moved), size=64), enc, store)
    with pytest.raises(VideoVLMError, match="no such file"): visual_tokens(tmp_path/"none.mp4", plan, enc, store)

def test_changed_file_is_not_kept_under_its_old_name(tmp_path):
    from types import SimpleNamespace
    a, b = tiny_clips(tmp_path/"clips"); enc, store = CountingEncoder(), TokenStore(tmp_path/"s")
    plan = plan_frames(probe(a), max_frames=4, size=32, tokens_per_group=4)
    from video_vlm.data import content_id
    clip = SimpleNamespace(id=content_id(a), uri=str(a)); os.replace(b, a)
    with pytest.raises(VideoVLMError, match="changed since ingestion"): visual_tokens(clip, plan, enc, store)
