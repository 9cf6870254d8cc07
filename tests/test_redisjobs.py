"Jobs in a real Redis server: each once, whoever dies. Skipped, with this message, where there is no redis-server."
import os, shutil, signal, socket, subprocess, sys, threading, time
from collections import Counter
import pytest

pytest.importorskip("redis", reason="the package redis is not installed: pip install redis")
from video_vlm.data import VideoVLMError
from video_vlm.redisjobs import RedisJobs, redis_eraser

SERVER = {}   # again: kill -9 and start

@pytest.fixture(scope="module")
def url(tmp_path_factory):
    if not shutil.which("redis-server"): pytest.skip("no redis-server here (apt install redis-server): jobs in Redis were NOT tried")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    home = tmp_path_factory.mktemp("redis"); start = lambda: subprocess.Popen(["redis-server", "--port", str(port), "--dir", str(home), "--appendonly", "yes", "--appendfsync", "always"], stdout=subprocess.DEVNULL)
    p = [start()]
    def up():
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as c:
                    c.sendall(b"PING\r\n")
                    if c.recv(16).startswith(b"+PONG"): return                              # and not: loading
            except OSError: pass
            time.sleep(.05)
    def again(): p[0].kill(); p[0].wait(); p[0] = start(); up()
    up(); SERVER["again"] = again
    yield f"redis://127.0.0.1:{port}/0"
    p[0].kill(); p[0].wait()

def house(url, name, **kw): return RedisJobs(url, prefix=f"t{name}", **kw)

def test_every_job_is_taken_once_by_twelve_workers(url):
    boss = house(url, 1); took, houses = [], [house(url, 1) for _ in range(4)]
    for i in range(120): boss.add(f"vid-{i}", f"t{i % 3}", f"c{i}", "{}"); boss.add(f"vid-{i}", f"t{i % 3}", f"c{i}", "{}")
    def work(h):
        while (j := h.take()): took.append(j["id"]); h.set(j["id"], "done", 1.)
    ts = [threading.Thread(target=work, args=(houses[k % 4],)) for k in range(12)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert Counter(took) == {f"vid-{i}": 1 for i in range(120)} and boss.counts() == dict(done=120)
    assert [len(boss.of(f"t{k}")) for k in range(3)] == [40, 40, 40] and boss.of("nobody") == []
    for h in [boss, *houses]: h.close()

WORKER = "import sys, time; from video_vlm.redisjobs import RedisJobs; j = RedisJobs(sys.argv[1], prefix='t2', lease=1.); print(j.take()['id'], flush=True); time.sleep(60)"

def test_a_killed_worker_costs_its_lease_and_three_cost_the_job(url):
    h = house(url, 2, lease=1.); h.add("vid-a", "t", "c", "{}")
    for k in range(3):
        p = subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline().strip() == "vid-a" and h.take() is None
        time.sleep(1.5); assert h.take() is None                                             # alive: its lease is renewed
        os.kill(p.pid, signal.SIGKILL); p.wait(); time.sleep(1.3)
    assert h.take() is None and h.get("vid-a")["state"] == "failed" and "three times" in h.get("vid-a")["error"]
    h.add("vid-a", "t", "c", "{}"); assert h.counts() == dict(failed=1)                      # asked for again, but not wanted again
    h.add("vid-a", "t", "c", "{}", again=True); assert h.counts() == dict(queued=1) and h.get("vid-a")["tries"] == 0
    assert h.take()["tries"] == 1; h.give_back("vid-a"); assert h.counts() == dict(queued=1) and h.get("vid-a")["tries"] == 0     # an orderly stop
    h.close()

def test_states_change_only_where_they_may_and_all_is_there_after_a_restart(url):
    h = house(url, 3)
    for i in "abcd": h.add(i, "t", f"c{i}", "{}")
    h.take(); h.cancel("a"); h.set("a", "done", 1.); assert h.get("a")["state"] == "cancelled"
    h.take(); h.set("b", "running", .5); h.set("b", "done", 1.); h.hook("b", '{"url": "x"}'); h.hook("nobody", "x")
    before = (h.counts(), h.get("b")); SERVER["again"]()
    h = house(url, 3); assert (h.counts(), h.get("b")) == before and [r["id"] for r in h.recover()] == ["b"] and h.get("nobody") is None
    assert h.drop("cb", "other") == 0 and h.drop("cb", "t") == 1 and h.get("b") is None and h.counts() == dict(queued=2, cancelled=1)
    h.add("a", "t", "ca", "{}", lost=True); assert h.get("a")["state"] == "cancelled"
    h.close()

def test_erasure_finds_what_the_queue_holds(url):
    from video_vlm.tombstones import Subject
    h = RedisJobs(url, prefix="te"); gone = "a" * 64
    h.add("1", "acme", gone, "{}"); h.add("2", "acme", "b" * 64, '{"path": "/m/' + gone + '.mp4"}'); h.add("3", "other", "c" * 64, "{}")
    e = redis_eraser(url, "te"); s = Subject("video", gone); assert e.find(s, [gone]) == ["1", "2"]
    e.delete(s, [gone], e.find(s, [gone])); assert e.find(s, [gone]) == [] and h.counts() == dict(queued=1)
    t = Subject("tenant", "other"); assert e.find(t, []) == ["3"] and e.owns(t) == {"c" * 64}
    h.close()

@pytest.mark.slow
def test_a_gateway_indexes_from_redis(url, tmp_path):
    import httpx
    from test_gateway import House
    from video_vlm.data import tiny_clips
    from video_vlm.serving import tiny_checkpoint
    clips = tiny_clips(tmp_path / "clips"); h = House(tmp_path / "serve", tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "clips", queue=url)
    try:
        id = httpx.post(h.url + "/v1/videos", json=dict(url=f"file://{clips[0]}"), timeout=60).json()["id"]
        for _ in range(600):
            if (s := httpx.get(h.url + f"/v1/videos/{id}").json())["status"] == "done": break
            time.sleep(.1)
        assert s["status"] == "done" and h.gw.book.one("select 1 from jobs") is None and h.gw.queue.get(id)["state"] == "done"
        assert httpx.get(h.url + "/v1/videos").json()["data"][0]["id"] == id and 'jobs{state="done"} 1.0' in httpx.get(h.url + "/metrics").text
    finally: h.close()

def test_no_server_is_one_clear_line():
    with pytest.raises(VideoVLMError, match="cannot be reached"): RedisJobs("redis://127.0.0.1:1/0")
    with pytest.raises(VideoVLMError, match="cannot be reached"): RedisJobs("http://x")
