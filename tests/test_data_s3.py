"Stages and sources in an object store: a real S3 server on this machine (moto), a run that is killed, two machines."
import importlib.util, os, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
from video_vlm.data import IngestConfig, VideoVLMError, file_system, ingest, load_clips, send_stage, stage_copy, tiny_clips

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not all(map(importlib.util.find_spec, ("moto", "flask"))), reason="no local S3 server: install moto (requirements-nodeps.txt)")]
QUIET = IngestConfig(progress=False, workers=1)

@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    "s3://BUCKET of a fresh server with two videos in it; its address and keys are in the environment, as a user would put them there."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    url, d = f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("s3"); keys = dict(AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1"); old = {k: os.environ.get(k) for k in keys}
    with open(d/"log", "w") as log: server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"{url}/moto-api/", timeout=5); break
            except OSError: assert server.poll() is None, "the S3 server died"; time.sleep(.5)
        urllib.request.urlopen(urllib.request.Request(f"{url}/videos", method="PUT")); os.environ.update(keys); fs, _ = file_system("s3://videos")
        for c in tiny_clips(d/"v"): fs.put_file(str(c), f"videos/in/{c.name}")
        yield "s3://videos"
    finally:
        for k, v in old.items(): os.environ.pop(k, None) if v is None else os.environ.update({k: v})
        server.kill(); server.wait()

def start(machine, *words): return subprocess.Popen([sys.executable, "-c", "from video_vlm.cli import main; main()", *words], env={**os.environ, "VIDEO_VLM_STAGES": str(machine)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
def run(machine, *words): p = start(machine, *words); out, err = p.communicate(timeout=300); return p.returncode, out, err

def test_stages_in_a_bucket_on_two_machines(bucket, tmp_path):
    one, two, fs = tmp_path/"one", tmp_path/"two", file_system(bucket)[0]
    p = start(one, "ingest", f"{bucket}/in", "--out", f"{bucket}/00"); until = time.time()+200
    while time.time() < until and not list(one.rglob("media/*.mp4")) and p.poll() is None: time.sleep(.02)
    os.killpg(p.pid, signal.SIGKILL); p.communicate(); assert not fs.exists("videos/00/manifest.json"), "what is not finished is not there"
    code, out, err = run(one, "ingest", f"{bucket}/in", "--out", f"{bucket}/00"); assert code == 0 and "2 found, 2 usable" in out and f"files sent to {bucket}/00" in out, err
    code, out, err = run(two, "dedup", f"{bucket}/00", "--out", f"{bucket}/01"); assert code == 0 and "2 clips in 2 clusters" in out, err
    code, out, err = run(one, "split", f"{bucket}/00", f"{bucket}/01", "--out", f"{bucket}/01a"); assert code == 0 and fs.exists("videos/01a/splits.parquet"), err
    assert not list(Path.cwd().glob("s3:*")) and not list(tmp_path.glob("s3:*"))

def test_the_second_to_finish_overwrites_nothing(bucket, tmp_path):
    url = f"{bucket}/race"; a, b = (ingest(f"{bucket}/in", stage_copy(url, tmp_path/m), QUIET) for m in "ab"); assert send_stage(a, url) > 3
    with pytest.raises(VideoVLMError, match="another machine"): send_stage(b, url)
    assert len(load_clips(stage_copy(url, tmp_path/"c"))) == 2

def test_no_such_bucket_and_no_server_are_one_line(bucket, tmp_path, monkeypatch):
    work = ingest(f"{bucket}/in", stage_copy("s3://nothing/x", tmp_path/"m"), QUIET)
    with pytest.raises(VideoVLMError, match="s3://nothing/x.*not found"): send_stage(work, "s3://nothing/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9"); monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(VideoVLMError, match="s3://videos/00: "): stage_copy("s3://videos/00", tmp_path/"n")
