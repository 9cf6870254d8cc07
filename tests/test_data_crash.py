"SIGKILL at random moments: the next run ends with the same rows, and measures nothing again that was recorded."
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from video_vlm.data import IngestConfig, ingest, load_clips, open_stage, write_video, _journal

SCRIPT = """
import sys
from video_vlm.data import IngestConfig, ingest
ingest(sys.argv[1], sys.argv[2], IngestConfig(progress=False, workers=2, shard_rows=12))
"""

def make(folder, n):
    folder.mkdir()
    for i in range(n): write_video(folder/f"{i:03d}.mp4", np.full((6, 32, 32, 3), i*5 % 250, np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None], gop=3)
    (folder/"bad.mp4").write_bytes(b"nothing")

def in_shards(out):
    "Paths that are in a Parquet shard; every shard there is must be readable."
    return {u for f in out.glob("clips-*.parquet") for u in pq.read_table(f, columns=["uri"])["uri"].to_pylist()}

def test_killed_and_resumed(tmp_path):
    make(tmp_path/"src", 40); rng = random.Random(0)
    recorded, kills = {}, 0
    for _ in range(6):
        p = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path/"src", tmp_path/"out"], start_new_session=True)
        journal, until = tmp_path/"out"/"journal.jsonl", time.monotonic()+120
        while not journal.exists() and p.poll() is None and time.monotonic() < until: time.sleep(.01)
        time.sleep(rng.uniform(0, .35))
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL); kills += 1
        p.wait()
        rows, begun = _journal(journal)
        again = [k for k, n in recorded.items() if begun.get(k, n) != n] + [k for k in begun if k in in_shards(tmp_path/"out") and journal.exists() and k not in rows]
        assert not again, f"measured again: {again}"
        recorded = {k: begun[k] for k in rows if k in begun}
        if (tmp_path/"out"/"manifest.json").exists(): break
    stage = ingest(tmp_path/"src", tmp_path/"out", IngestConfig(progress=False, workers=2, shard_rows=12))
    clean = ingest(tmp_path/"src", tmp_path/"clean", IngestConfig(progress=False, workers=2, shard_rows=12))
    a, b = (load_clips(s, rejected=True) for s in (stage, clean))
    assert a == b and len(a) == 41 and kills >= 1
    assert open_stage(stage)["counts"]["found"] == 41

def test_half_written_line_is_not_a_row(tmp_path):
    make(tmp_path/"src", 3); out = tmp_path/"out"; out.mkdir()
    (out/"journal.jsonl").write_bytes(b'{"begin": "x"}\n{"uri": "' + str(tmp_path/"src"/"000.mp4").encode() + b'", "id": "abc')
    assert len(load_clips(ingest(tmp_path/"src", out, IngestConfig(progress=False)))) == 3

def test_a_file_that_ends_every_run_is_refused(tmp_path):
    make(tmp_path/"src", 2); out = tmp_path/"out"; out.mkdir(); poison = str(tmp_path/"src"/"001.mp4")
    (out/"journal.jsonl").write_text("".join(json.dumps(dict(begin=poison))+"\n" for _ in range(3)))
    bad = {c.uri: c.reason for c in load_clips(ingest(tmp_path/"src", out, IngestConfig(progress=False)), rejected=True) if c.reason}
    assert bad[poison] == "crashed" and len(bad) == 2
