"Search in an object store: the index in a bucket of a real S3 server on this machine (moto), which several processes and writers share."
import importlib.util, os, socket, subprocess, sys, time, urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_search import tokens
from video_vlm.search import Index, SearchError, rows_of, search, sample_recall, similar

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not all(map(importlib.util.find_spec, ("moto", "flask"))), reason="no local S3 server: install moto (requirements-nodeps.txt)")]

@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    "s3://BUCKET of a fresh server; its address and keys are in the environment, as a user would put them there."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", open(tmp_path_factory.mktemp("s3")/"log", "w")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    keys = dict(AWS_ENDPOINT=url, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="us-east-1", AWS_ALLOW_HTTP="true"); old = {k: os.environ.get(k) for k in keys}
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"{url}/moto-api/", timeout=5); break
            except OSError: assert server.poll() is None, "the S3 server died"; time.sleep(.5)
        urllib.request.urlopen(urllib.request.Request(f"{url}/videos", method="PUT")); os.environ.update(keys)
        yield "s3://videos"
    finally:
        for k, v in old.items(): os.environ.pop(k, None) if v is None else os.environ.update({k: v})
        server.kill(); server.wait(); log.close()

def test_the_life_of_an_index_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); ix = Index(f"{bucket}/life", "f"*64, 16)
    ix.upsert([r for i in range(8) for r in rows_of(f"clip{i}", tokens(6, i), tenant="ab"[i % 2], captions=[f"number {i} zebra"])])
    assert len(ix) == 16 and {h.tenant for h in search(ix, "zebra", k=20, tenant="a")} == {"a"} == {h.tenant for h in search(ix, "zebra", np.ones(16), k=20, tenant="a")}
    other = Index(f"{bucket}/life", "f"*64, 16); ix.delete("clip0", "a"); assert len(other) == 14 and not {"clip0"} & {h.clip for h in search(other, "zebra", k=20, tenant="a")}
    other.upsert(rows_of("clip2", tokens(3, 9), tenant="a", captions=["an okapi"])); assert [h.clip for h in search(ix, "okapi", tenant="a")] == ["clip2"] and len(ix) == 13      # replaced as a whole, seen at once
    ix.compact(); assert sample_recall(ix, 5, 5) == 1 and ix.stats()["rows"] == 13 and similar(ix, "clip1", 2, "b") and set(ix.versions("a")) == {"clip2", "clip4", "clip6"}
    with pytest.raises(SearchError, match="cannot be compared"): Index(f"{bucket}/life", "g"*64, 16)
    assert not list(tmp_path.iterdir())                                                 # nothing beside: no folder named s3:

def test_writers_that_meet_lose_nothing(bucket):
    with ThreadPoolExecutor(3) as pool: made = list(pool.map(lambda _: Index(f"{bucket}/race", "f"*64, 16), range(3)))          # three that make it at once
    with ThreadPoolExecutor(3) as pool: list(pool.map(lambda k: made[k % 3].upsert(rows_of(f"c{k}", tokens(3, k), captions=["gnu"])), range(9)))
    assert {h.clip for h in search(made[0], "gnu", k=20)} == {f"c{k}" for k in range(9)}

def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(SearchError, match="s3://nothing/ix cannot be opened .NoSuchBucket.: is the bucket there") as e: Index("s3://nothing/ix", "f"*64, 16)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300
