"release, erase, flywheel and experiment as a person types them: help with examples, dry runs that change nothing, one line for a mistake."
import json, re
from dataclasses import asdict
from pathlib import Path
import numpy as np, pytest
from typer.testing import CliRunner
from video_vlm import release as R
from video_vlm.cli import app
from video_vlm.data import VideoVLMError

def say(*words):
    r = CliRunner().invoke(app, [str(w) for w in words])
    if isinstance(r.exception, VideoVLMError): return 2, str(r.exception)
    assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
    return r.exit_code, r.output

def write(path, preds): path.write_text("".join(json.dumps(asdict(p))+"\n" for p in preds)); return path

@pytest.mark.parametrize("words", ["release list", "release show", "release register", "release promote", "release rollback", "release gate", "erase", "flywheel demo", "experiment"])
def test_help_has_an_example(words):
    code, out = say(*words.split(), "--help"); assert code == 0 and re.search(r"Examples?:", out)

def test_a_version_from_candidate_to_live_and_back(tmp_path):
    at = ("--registry", tmp_path/"reg")
    for n in "ab": (tmp_path/n).mkdir(); (tmp_path/n/"w").write_text(n); assert say("release", "register", tmp_path/n, *at)[0] == 0
    assert say("release", "promote", 1, *at)[0] == 0
    assert "no passed gate" in say("release", "promote", 2, *at)[1]
    cand, live = R.tiny_predictions(100, seed=1); c, l = write(tmp_path/"c.jsonl", cand), write(tmp_path/"l.jsonl", live)
    worse, _ = R.tiny_predictions(100, fall={"count": .3}, seed=1)
    code, out = say("release", "gate", write(tmp_path/"w.jsonl", worse), l, "--html", tmp_path/"g.html", "--version", 2, *at); assert code == 1 and "count" in out and (tmp_path/"g.html").exists()
    assert say("release", "gate", c, l, "--version", 2, *at)[0] == 0
    before = (tmp_path/"reg/serving.json").read_text()
    code, out = say("release", "promote", 2, "--dry-run", *at); assert code == 0 and "would canary" in out and (tmp_path/"reg/serving.json").read_text() == before
    for share in ("1%", "10%", "100%"): assert share in say("release", "promote", 2, *at)[1]
    assert "live 2" in say("release", "promote", 2, *at)[1]
    assert "would rollback: live 1" in say("release", "rollback", "--dry-run", *at)[1] and "live 1" in say("release", "rollback", "--why", "test", *at)[1]
    assert json.loads(say("release", "show", 2, *at)[1])["state"] == "retired" and "retired" in say("release", "list", *at)[1]

def test_erase_says_first_and_does_then(tmp_path):
    runs = tmp_path/"runs"; (runs/"logs").mkdir(parents=True); f = runs/"logs/l.jsonl"
    f.write_text("".join(json.dumps(dict(person=p, answer="red"))+"\n" for p in ("ann@example.org", "bob"))); before = f.read_text()
    code, out = say("erase", "--person", "ann@example.org", "--dry-run", "--runs", runs); assert code == 0 and "would remove" in out and f.read_text() == before and not (runs/"erasure").exists()
    code, out = say("erase", "--person", "ann@example.org", "--runs", runs); assert code == 0 and "certificate" in out and "ann@" not in f.read_text() and "bob" in f.read_text()
    f.write_text(before); assert "1 subjects" in say("erase", "--again", "--runs", runs)[1] and "ann@" not in f.read_text()
    assert "one of --video" in say("erase", "--video", "a", "--person", "b", "--runs", runs)[1]

def test_experiment_from_files(tmp_path):
    rng = np.random.default_rng(0); e, o = tmp_path/"e.jsonl", tmp_path/"o.jsonl"
    rows = [dict(experiment="x", key=f"u{i}", variant=str(rng.choice(["a", "b"])), time=float(i), tenant="t", propensity=.5) for i in range(2000)]
    e.write_text("".join(json.dumps(r)+"\n" for r in rows)); o.write_text("".join(json.dumps(dict(key=r["key"], time=r["time"]+1, stars=float(rng.normal(3+(r["variant"] == "b"))), errors=0, requests=2))+"\n" for r in rows))
    args = ("experiment", e, o, "--name", "x", "--variants", "a=0.5,b=0.5", "--metric", "stars")
    code, out = say(*args, "--metric", "errors/requests:lower:guard=0.01", "--html", tmp_path/"r.html"); assert code == 0 and "better" in out and "ok" in out and (tmp_path/"r.html").exists()
    assert "no exposure" in say(*args[:4], "y", *args[5:])[1] and "no field" in say(*args[:-1], "smiles")[1]
    assert "STOPPED" in say(*args[:6], "a=0.2,b=0.8", *args[7:])[1]
