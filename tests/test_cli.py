"The command as a shell sees it: one clear line and exit code 2 for a mistake, no traceback."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from video_vlm.data import tiny_clips

def cli(*words, cwd=None):
    r = subprocess.run([sys.executable, "-c", "from video_vlm.cli import main; main()", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300)
    return r.returncode, r.stdout, r.stderr

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp("files")
    good = tiny_clips(d)[0]
    (d/"text.mp4").write_text("hello\n"*100)
    (d/"empty.mp4").write_bytes(b"")
    (d/"cut.mp4").write_bytes(Path(good).read_bytes()[:300])
    return d, good

@pytest.mark.parametrize("name", ["nowhere.mp4", "text.mp4", "empty.mp4", "cut.mp4", "."])
def test_ask_says_what_is_wrong(files, name):
    code, out, err = cli("ask", files[0]/name, "What is this?")
    assert code == 2 and not out
    lines = [l for l in err.splitlines() if l.strip()]
    assert len(lines) == 1 and lines[0].startswith("video-vlm: ") and "Traceback" not in err, err

@pytest.mark.parametrize("words", [("ask", "GOOD", "what?", "--model", "no/such/model"), ("bench", "nonsense"), ("world", "--n", "0", "--out", "x"), ("world", "--level", "extreme", "--out", "x"),
                                   ("ingest", "no/such/folder"), ("dedup", "no/such/folder"), ("split", "no", "such"), ("serve", "--engine", "fast")])
def test_other_mistakes(files, words, tmp_path):
    code, out, err = cli(*[files[1] if w == "GOOD" else w for w in words], cwd=tmp_path)
    lines = [l for l in err.splitlines() if l.strip()]
    assert code == 2 and lines and lines[-1].startswith("video-vlm: ") and "Traceback" not in err, err

def test_ask_answers_a_real_file(files, tmp_path):
    code, out, err = cli("ask", files[1], "How many objects are there?", cwd=tmp_path)
    assert code == 0 and out.strip(), err

def test_every_command_has_help_with_an_example():
    code, out, _ = cli("--help")
    assert code == 0
    for c in ("ask", "demo", "world", "ingest", "serve", "bench"):
        code, text, _ = cli(c, "--help")
        assert code == 0 and "Example" in text, c

def test_doctor_names_every_preset():
    code, out, _ = cli("doctor")
    assert code == 0 and all(p in out for p in ("tiny", "smol", "base", "large"))

def test_bench_lists_its_names():
    code, out, _ = cli("bench")
    assert code == 0 and "demo" in out.split()

def test_bench_takes_the_options_of_its_run():
    code, out, err = cli("bench", "dedup", "--pairs", "no.csv"); assert code == 2 and "no.csv" in err and "Traceback" not in err
    code, out, err = cli("bench", "dedup", "--colour", "red"); assert code == 2 and "--pairs, --videos, --scale" in err

def test_world_writes_clips(tmp_path):
    code, out, err = cli("world", "--n", 3, "--out", tmp_path/"w", "--size", 64)
    assert code == 0 and len(list((tmp_path/"w"/"clips").glob("*.mp4"))) == 3, err
