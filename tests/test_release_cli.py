"release, erase, flywheel and experiment as a person types them: help with examples, dry runs that change nothing, one line for a mistake."
import json, re
from dataclasses import asdict
from pathlib import Path
import numpy as np, pytest
from video_vlm import release as R

def write(path, preds): path.write_text("".join(json.dumps(asdict(p))+"\n" for p in preds)); return path

@pytest.mark.parametrize("words", ["release list", "release show", "release register", "release promote", "release rollback", "release gate", "release watch", "release shadow", "erase", "flywheel demo", "flywheel mine", "flywheel accept", "flywheel parity", "flywheel calibrate", "experiment"])
def test_help_has_an_example(words, say):
    code, out = say(*words.split(), "--help"); assert code == 0 and re.search(r"Examples?:", out)

def test_a_version_from_candidate_to_live_and_back(tmp_path, say):
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

def test_a_canary_is_watched_on_the_log_of_a_server(tmp_path, say):
    from video_vlm.flywheel import RequestLog
    at = ("--registry", tmp_path/"reg"); log = RequestLog(tmp_path/"serve/log")
    for n in "abc": (tmp_path/n).mkdir(); (tmp_path/n/"w").write_text(n); assert say("release", "register", tmp_path/n, *at)[0] == 0
    assert say("release", "promote", 1, *at)[0] == 0 and "no version is on canary" in say("release", "watch", tmp_path/"serve", *at)[1]
    def serve(n, **bad):
        for i in range(n): arm = "live" if i % 3 else "canary"; log.request(f"{i}", variant=arm, version=here[arm], **(dict(ttft_s=.1, refused=False, error=False) | (bad if arm == "canary" else {})))
    say("release", "promote", 2, "--force", "--why", "test", *at); here = R.Registry(tmp_path/"reg").state(); serve(30)
    code, out = say("release", "watch", tmp_path/"serve", "--once", *at); assert code == 0 and "wait: 10 of 500" in out, out
    code, out = say("release", "watch", tmp_path/"serve", "--once", "--min-requests", 10, *at); assert code == 0 and "advance" in out and R.Registry(tmp_path/"reg").state()["percent"] == 10
    (tmp_path/"serve/log/requests.jsonl").unlink(); serve(90, error=True)
    code, out = say("release", "watch", tmp_path/"serve", "--every", 1, *at); assert code == 1 and "rollback: errors" in out and R.Registry(tmp_path/"reg").state()["canary"] is None
    assert "does not exist" in say("release", "watch", tmp_path/"nowhere", *at)[1] and "above 0" in say("release", "watch", tmp_path/"serve", "--every", 0, *at)[1]

def test_a_shadow_is_set_ended_and_compared(tmp_path, say):
    from video_vlm.flywheel import RequestLog
    at = ("--registry", tmp_path/"reg"); log = RequestLog(tmp_path/"serve/log")
    for n in "ab": (tmp_path/n).mkdir(); (tmp_path/n/"w").write_text(n); say("release", "register", tmp_path/n, *at)
    say("release", "promote", 1, *at)
    assert "shadow 2 on 10%" in say("release", "shadow", 2, "--share", .1, *at)[1] and R.Registry(tmp_path/"reg").state()["shadow"] == 2
    assert "no version 9" in say("release", "shadow", 9, *at)[1] and "between 0 and 1" in say("release", "shadow", 2, "--share", 3, *at)[1]
    assert "no request with a shadow" in say("release", "shadow", "--serve", tmp_path/"serve", *at)[1]
    for i in range(20): log.request(f"{i}", consent=True, answer="red", shadow="Red" if i % 4 else "blue", shadow_version=2)
    assert "75.0% of 20 answers" in say("release", "shadow", "--serve", tmp_path/"serve", *at)[1]
    assert "shadow - on 0%" in say("release", "shadow", *at)[1] and R.Registry(tmp_path/"reg").state()["shadow"] is None

def test_erase_says_first_and_does_then(tmp_path, say):
    runs = tmp_path/"runs"; (runs/"logs").mkdir(parents=True); f = runs/"logs/l.jsonl"
    f.write_text("".join(json.dumps(dict(person=p, answer="red"))+"\n" for p in ("ann@example.org", "bob"))); before = f.read_text()
    code, out = say("erase", "--person", "ann@example.org", "--dry-run", "--runs", runs); assert code == 0 and "would remove" in out and f.read_text() == before and not (runs/"erasure").exists()
    code, out = say("erase", "--person", "ann@example.org", "--runs", runs); assert code == 0 and "certificate" in out and "ann@" not in f.read_text() and "bob" in f.read_text()
    f.write_text(before); assert "1 subjects" in say("erase", "--again", "--runs", runs)[1] and "ann@" not in f.read_text()
    assert "one of --video" in say("erase", "--video", "a", "--person", "b", "--runs", runs)[1]

def test_what_is_to_be_made_again_is_listed_until_it_was(tmp_path, say):
    runs = tmp_path/"runs"; runs.mkdir(); assert "nothing was erased there yet" in say("erase", "--due", "--runs", runs)[1]
    (runs/"lineage.jsonl").write_text(json.dumps(dict(id="model-3", parents=["v1"], kind="model", regenerate=True))+"\n"); (runs/"l.jsonl").write_text(json.dumps(dict(video="v1"))+"\n")
    assert say("erase", "--video", "v1", "--runs", runs)[0] == 0 and re.search(r"\d{4}-\d\d-\d\d  model-3", say("erase", "--due", "--runs", runs)[1])
    assert "on no list" in say("erase", "--done", "model-4", "--runs", runs)[1] and "nothing is left" in say("erase", "--done", "model-3", "--runs", runs)[1]

def test_experiment_from_files(tmp_path, say):
    rng = np.random.default_rng(0); e, o = tmp_path/"e.jsonl", tmp_path/"o.jsonl"
    rows = [dict(experiment="x", key=f"u{i}", variant=str(rng.choice(["a", "b"])), time=float(i), tenant="t", propensity=.5) for i in range(2000)]
    e.write_text("".join(json.dumps(r)+"\n" for r in rows)); o.write_text("".join(json.dumps(dict(key=r["key"], time=r["time"]+1, stars=float(rng.normal(3+(r["variant"] == "b"))), errors=0, requests=2))+"\n" for r in rows))
    args = ("experiment", e, o, "--name", "x", "--variants", "a=0.5,b=0.5", "--metric", "stars")
    code, out = say(*args, "--metric", "errors/requests:lower:guard=0.01", "--html", tmp_path/"r.html"); assert code == 0 and "better" in out and "ok" in out and (tmp_path/"r.html").exists()
    assert "no exposure" in say(*args[:4], "y", *args[5:])[1] and "no field" in say(*args[:-1], "smiles")[1]
    assert "STOPPED" in say(*args[:6], "a=0.2,b=0.8", *args[7:])[1]
    assert "clusters cannot carry" in say(*args, "--cluster", "tenant")[1] and "no field 'shop'" in say(*args, "--cluster", "shop")[1]
