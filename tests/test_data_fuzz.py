"Damaged files: no lost run, no hang, every file has a row with a known reason."
import time
from pathlib import Path

import numpy as np
import pytest

from video_vlm.data import IngestConfig, Limits, MediaError, REASONS, ingest, load_clips, write_video
from video_vlm.frames import read_frames_safely

def seeds(folder):
    "Small files of several containers and codecs."
    folder.mkdir(); rng = np.random.default_rng(0)
    x = np.stack([np.roll(rng.integers(0, 255, (36, 48, 3), dtype=np.uint8).repeat(1, 0), i, 1) for i in range(12)])
    kinds = [("a.mp4", {}), ("b.mp4", dict(bframes=3, gop=250, audio=True)), ("c.mkv", {}), ("d.webm", dict(codec="libvpx-vp9")), ("e.avi", dict(codec="mpeg4")), ("f.mov", dict(rotation=90)), ("g.ts", {})]
    return [write_video(folder/n, x, fps=12, **kw).read_bytes() for n, kw in kinds], [n for n, _ in kinds]

def damage(raw, rng):
    "Flip bits, cut, drop or repeat a part."
    b = bytearray(raw); kind = rng.integers(5)
    if kind == 0:
        for i in rng.integers(0, len(b), rng.integers(1, 40)): b[i] ^= 1 << rng.integers(8)
    elif kind == 1: b = b[:rng.integers(0, len(b))]
    elif kind == 2: i = rng.integers(0, len(b)); b[i:i+rng.integers(1, 200)] = b""
    elif kind == 3: i = rng.integers(0, len(b)); b[i:i] = rng.integers(0, 256, rng.integers(1, 400), dtype=np.uint8).tobytes()
    else:
        for i in rng.integers(0, min(len(b), 400), rng.integers(1, 8)): b[i] = rng.integers(256)
    return bytes(b)

def fuzz(tmp_path, n, seed):
    raw, names = seeds(tmp_path/"seeds"); rng = np.random.default_rng(seed); src = tmp_path/"src"; src.mkdir()
    for i in range(n): (src/f"{i:04d}_{names[i % len(raw)]}").write_bytes(damage(raw[i % len(raw)], rng))
    limits = Limits(min_frames=2, timeout_s=20, memory_bytes=2<<30)
    rows = load_clips(ingest(src, tmp_path/"out", IngestConfig(limits=limits, progress=False, workers=2)), rejected=True)
    assert len(rows) == n and all(c.reason in ("", *REASONS) for c in rows)
    read = 0
    for c in rows:
        if c.reason: continue
        try: f = read_frames_safely(c.uri, np.linspace(0, c.duration, 4), 32, limits=limits); read += 1; assert f.data.shape == (4, 32, 32, 3)
        except MediaError as e: assert e.code in REASONS
    return rows, read

def test_fuzz(tmp_path):
    rows, read = fuzz(tmp_path, 60, 0)
    assert 5 < read < 60 and any(c.reason for c in rows)

@pytest.mark.slow
def test_fuzz_1000(tmp_path):
    t = time.monotonic(); rows, read = fuzz(tmp_path, 1000, 1)
    print(f"{len(rows)} files, {read} read, {time.monotonic()-t:.0f} s")
