"The command as a shell sees it: one clear line and exit code 2 for a mistake, no traceback."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from video_vlm.cli import _train_page, app
from video_vlm.data import IngestConfig, VideoVLMError, ingest, load_clips, tiny_clips
from video_vlm.preference import Pair, save_pairs

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
    names = [[c.name or c.callback.__name__.replace("_", "-")] for c in app.registered_commands] + [[g.name, c.name] for g in app.registered_groups for c in g.typer_instance.registered_commands]
    assert len(names) > 30
    for words in names:
        r = CliRunner().invoke(app, [*words, "--help"])
        assert r.exit_code == 0 and ("Example" in r.output or words == ["doctor"]), words

def call(*words):
    "The command in this process: (exit code, stdout, message of the typed error)."
    r = CliRunner().invoke(app, list(map(str, words)))
    assert r.exception is None or isinstance(r.exception, (VideoVLMError, SystemExit)), r.exception
    return r.exit_code, r.output, str(r.exception or "")

def test_a_model_describes_clips_once_and_signs(tmp_path):
    tiny_clips(tmp_path/"v"); ingest(tmp_path/"v", tmp_path/"00_ingest", IngestConfig(progress=False))
    assert "2 clips described by model:checkpoints/tiny" in call("caption", tmp_path/"00_ingest", "--model", "tiny")[1]
    assert "0 clips described" in call("caption", tmp_path/"00_ingest", "--model", "tiny")[1] and (tmp_path/"tokens"/"entries").is_dir()
    assert all(c.captions[0]["by"] == "model:checkpoints/tiny" and c.captions[0]["known_at"] for c in load_clips(tmp_path/"00_ingest"))
    assert "not a finished stage" in call("caption", tmp_path)[2] and "not a finished stage" in call("encode", tmp_path)[2]

def test_subtitles_beside_a_video_are_read_with_it(tmp_path, monkeypatch):
    import video_vlm.model as m
    clip, asked, real = Path(tiny_clips(tmp_path)[0]), [], m.answer; monkeypatch.setattr(m, "answer", lambda *a: asked.append(a[4]) or real(*a))
    lines = [f"{i+1}\n00:00:0{i},000 --> 00:00:0{i},900\nword {i}\n" for i in range(2)]; clip.with_suffix(".srt").write_text("\n".join(lines))
    assert call("ask", clip, "What is said?", "--model", "tiny")[0] == call("ask", clip, "What is said?", "--model", "tiny", "--end", 1)[0] == 0
    assert [[s["text"] for s in a] for a in asked] == [["word 0", "word 1"], ["word 0"]]
    clip.with_suffix(".srt").write_text("1\n00:00:00,000 --> 00:00:01,900\n" + "many words "*5000); code, out, _ = call("ask", clip, "What is said?", "--model", "tiny")
    assert code == 0 and not asked[2] and "does not fit and is left out" in out

def test_what_is_written_is_written_here(tmp_path):
    code, out, err = cli("train", "--data", "x", "--out", "s3://bucket/y", cwd=tmp_path); assert code == 2 and "local or mounted" in err and not any(tmp_path.iterdir())

def test_people_measure_the_judge(tmp_path):
    save_pairs([Pair(f"v{i}.mp4", "What?", f"good {i}", f"bad {i}", "facts") for i in range(20)], tmp_path/"pairs.jsonl")
    assert call("gold", tmp_path, "--out", tmp_path/"g.jsonl")[0] == 0 and call("gold", tmp_path, "--out", tmp_path/"t.json", "--n", 5)[0] == 0
    assert len(json.loads((tmp_path/"t.json").read_text())) == 5 and "<View>" in (tmp_path/"t.xml").read_text()
    rows = [json.loads(l) for l in (tmp_path/"g.jsonl").read_text().splitlines()]
    for i, r in enumerate(rows): r["better"] = "tie" if i == 0 else "a" if r["a"].startswith("good") else "b"
    (tmp_path/"f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = call("gold", tmp_path, "--labels", tmp_path/"f.jsonl")
    assert code == 0 and "20 pairs: people agree with the judge on 95%" in out and out.count("differs:") == 1
    (tmp_path/"x.json").write_text("[1]"); (tmp_path/"y.jsonl").write_text("no json")
    for words, said in (((), "give --out"), (("--labels", tmp_path/"x.json"), "no file that people filled in"), (("--labels", tmp_path/"y.jsonl"), "no file that people filled in"), (("--labels", tmp_path/"g.jsonl"), "0 rows are in both")):
        assert said in call("gold", tmp_path, *words)[2], words

def test_words_that_are_wrong_are_said_before_anything_is_loaded(tmp_path):
    tiny_clips(tmp_path/"v")
    assert "no engine 'spark'" in call("ingest", tmp_path/"v", "--out", tmp_path/"o", "--engine", "spark")[2] and "at least 1" in call("train", "--data", tmp_path, "--out", tmp_path/"o", "--processes", 0)[2]

def test_a_training_log_becomes_a_page(tmp_path):
    row = dict(grad_norm=1., lr=1e-3, lr_lm=1e-3, tokens=10, padding=.05, skipped=False, why="", tokens_per_s=100, mfu=.2, memory_mb=500, seconds=1.)
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(dict(row, step=i, loss=3-i/10, **(dict(val_accuracy=.5) if i in (4, 9) else {})))+"\n" for i in range(10)))
    for f in ("recipe.json", "manifest.json"): (tmp_path/f).write_text("{}")
    text = _train_page(tmp_path).read_text(); assert text.count("<svg") == 4 and "50.0%" in text and "2.100" in text

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

def test_a_preset_is_a_name_for_its_checkpoint(tmp_path, monkeypatch):
    from video_vlm.cli import chosen, packaged
    monkeypatch.chdir(tmp_path)
    assert chosen("tiny") == chosen(None) == str(packaged()) and chosen("org/model") == "org/model" and chosen("tiny", "http://host/v1") == "tiny"
    (tmp_path/"tiny").mkdir(); assert chosen("tiny") == "tiny"          # a folder of that name is meant
