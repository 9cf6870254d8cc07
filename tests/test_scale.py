"Engines: a Ray cluster gives the rows of one machine; a worker that is killed is replaced; without ray, one clear line."
import os, signal, sys
from functools import partial
import numpy as np, pytest
from video_vlm.data import IngestConfig, MediaError, VideoVLMError, ingest, load_clips, open_stage, thread_map, tiny_clips, write_video
from video_vlm.dedup import DedupConfig, dedup, load_clusters
from video_vlm.scale import encode_clips, engine_of, load_keys, ray_map, start_ray

QUIET, DEDUP = IngestConfig(progress=False, workers=1), DedupConfig(progress=False, workers=1)

def test_without_ray_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(VideoVLMError, match=r"video_vlm\[scale\]"): start_ray()
    with pytest.raises(VideoVLMError, match="local, ray"): engine_of("spark")
    assert engine_of("local") is None

def test_thread_map_takes_items_when_it_is_free():
    taken = []
    def endless():
        i = 0
        while True: taken.append(i); yield i; i += 1
    done = []
    for x, y in thread_map(lambda x: x*x, endless(), 2):
        done.append(y)
        if len(done) == 5: break
    assert set(done) <= {x*x for x in taken} and len(taken) <= 8

def test_an_engine_that_loses_items(tmp_path):
    tiny_clips(tmp_path/"src")
    def losing(fn, items):
        for x in items: yield x, OSError("gone")
    clips = load_clips(ingest(tmp_path/"src", tmp_path/"00", QUIET, engine=losing), rejected=True)
    assert [c.reason for c in clips] == ["crashed"]*2 and "gone" in clips[0].detail

# -- a real Ray on this machine, two workers ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="ray is not installed: pip install 'video_vlm[scale]'")
    ray = start_ray(num_cpus=2)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])         # workers know the packages of this machine, not pytest's modules
    yield ray; ray.shutdown()

def dies_once(x, folder):
    mark = f"{folder}/{x}"
    if x == 3 and not os.path.exists(mark): open(mark, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
    return x*10

def dies(x): os.kill(os.getpid(), signal.SIGKILL) if x == 1 else None; return x

def fails(x): raise MediaError("timeout", str(x))

@pytest.mark.slow
def test_a_killed_worker_is_replaced(cluster, tmp_path):
    assert sorted(ray_map(partial(dies_once, folder=str(tmp_path)), range(6))) == [(x, 10*x) for x in range(6)]
    assert (tmp_path/"3").exists(), "one was killed"
    got = dict(ray_map(dies, range(3), tries=1)); assert got[0] == 0 and got[2] == 2 and isinstance(got[1], Exception)

@pytest.mark.slow
def test_an_error_of_the_function_is_raised(cluster):
    with pytest.raises(MediaError) as e: list(ray_map(fails, range(2)))
    assert e.value.code == "timeout"

@pytest.mark.slow
def test_the_same_rows(cluster, tmp_path):
    from video_vlm.encoder import VideoEncoder, tiny_encoder_config
    src = tmp_path/"src"; src.mkdir(); tiny_clips(src); (src/"bad.mp4").write_bytes(b"nothing")
    for k in range(3): x = np.kron(np.random.default_rng(k).integers(0, 255, (6, 20, 3), np.uint8), np.ones((8, 8, 1), np.uint8)); write_video(src/f"{k}.mp4", np.stack([x[:, i:i+96] for i in range(24)]), fps=12)
    one, two = (ingest(src, tmp_path/n, QUIET, engine=e) for n, e in (("one", None), ("two", ray_map)))
    assert load_clips(one, rejected=True) == load_clips(two, rejected=True) and open_stage(one)["counts"] == open_stage(two)["counts"]
    a, b = (dedup(s, tmp_path/f"{s.name}_dedup", DEDUP, engine=e) for s, e in ((one, None), (two, ray_map)))
    assert load_clusters(a) == load_clusters(b)
    for p in (a/"signatures").rglob("*.npz"):
        with np.load(p) as x, np.load(b/p.relative_to(a)) as y: assert all(np.array_equal(x[k], y[k]) for k in x.files)
    VideoEncoder(tiny_encoder_config()).save_pretrained(tmp_path/"enc"); plan = dict(fps=2., max_frames=4, progress=False)
    a, b = (encode_clips(s, tmp_path/"enc", tmp_path/f"{s.name}_tokens", engine=e, **plan) for s, e in ((one, None), (two, ray_map)))
    assert load_keys(a) == load_keys(b) and len(load_keys(a)) == 5
