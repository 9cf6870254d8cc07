"Reading answers exactly, intervals that hold, comparisons that do not cry wolf, a cache that sees changed media."
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from video_vlm.data import Sample, VideoVLMError
from video_vlm.evaluation import (EvaluationConfig, EvaluationError, Item, Prediction, Task, accuracy, batched, bootstrap_interval, by_skill, caption_metrics, caption_task,
    clustered_interval, compare, contamination, extract_choice, grounding_metrics, iou, load_run, match_answer, mean_score, openai_answer, paired_difference, parse_spans,
    position_bias, ranks, retrieval_metrics, run_task, shuffle_options, simulate_coverage, slices, summary, task_from_samples)

OPTS = ["a red square", "a blue circle", "red", "two"]
HARD = [
    ("The answer is (B) because A shows a red square and C is wrong", 1), ("B", 1), ("(d)", 3), ("**C.**", 2), (r"$\boxed{D}$", 3), ("Answer: B", 1), ("A", 0), ("a", 0), ("A.", 0),
    ("I think A is tempting, but the correct answer is C.", 2), ("The answer is not A. The answer is B.", 1), ("A red square.", 0), ("a blue circle", 1), ("red", 2), ("A)", 0), ("[A]", 0),
    ("It is red", 2), ("B. a red square", 1), ("A or B", None), ("The answer is A or B", None), ("Both A and C", None), ("A blue circle moves", 1), ("", None), ("A: a red square", 0),
    ("I cannot tell", None), ("There is a red square, not a blue circle", 0), ("<think>A? no</think> D", 3), ("Option C", 2), ("The answer is a blue circle", 1), ("a) a red square", 0),
    ("(A) and (B)", None), ("C is correct", 2), ("two", 3), ("2", 3), ("E", None), ("The correct option is D) two", 3), ("Not B", None), ("not a red square but a blue circle", 1),
    ("Best option:(A) a red square", 0), ("The best answer is A", 0), ("I would choose B", 1), ("My answer: (c)", 2), ("answer is b", 1), ("The answer is: **B**", 1),
    ("The answer is **(B)** a blue circle.", 1), ("Option A is wrong; option B is right.", 1), ("The answer cannot be A, so it must be B", 1), ("B, because A is not possible", 1),
    ("Final Answer: $\\boxed{\\text{C}}$", 2), ("<answer>B</answer>", 1), ("The correct answer is B: a blue circle. A is wrong because there is no red square.", 1), ("A, B", None),
    ("A and B", None), ("A/B", None), ("None of the above", None), ("I am not sure, but I think the answer is D.", 3), ("The answer is A. Wait, the answer is C.", 2),
    ("The option that fits best is B.", 1), ("B\nThe circle is blue.", 1), ("Answer is (B) and not (A)", 1), ("Neither A nor B", None), ("The answer isn't B", None),
    ("It is not (B), it is (C)", 2), ("the red one", 2), ("In the video, a red square and a blue circle move", None), ("D two", 3), ("(B) a blue circle or (A) a red square", None),
    ("I", None), ("Answer: A red square", 0), ("Answer: A blue circle", 1), ("The answer is A red square", 0), ("choice (B)", 1), ("(B).", 1), ("'B'", 1), ("`B`", 1), ("（B）", 1),
    ("answer:B", 1), ("Answer：B", 1), ("the answer is B) a blue circle", 1), ("The answer would be A, not B.", 0), ("Between A and B, the answer is B", 1), ("The correct letter is C", 2),
    ("C!", 2), ("It's C.", 2), ("C - red", 2), ("(C", 2), ("The answer is (A) or (B)", None), ("Answer: A, B", None), ("Answer: A and C", None), ("Answer: none", None),
    ("It is A red square", 0), ("I would go with C", 2), ("I pick D because it fits", 3), ("It is A or B", None), ("B since the circle is blue", 1), ("It is B", 1),
    ("It's not B, it's C", 2), ("Not A. B.", 1), ("a red or a blue circle", None)]


@pytest.mark.parametrize("text,want", HARD)
def test_extract_choice(text, want): assert extract_choice(text, OPTS) == want


def test_extract_choice_of_other_shapes():
    assert extract_choice("B", ["yes", "no"]) == 1 and extract_choice("C", ["yes", "no"]) is None
    assert extract_choice("no", ["yes", "no"]) == 1 and extract_choice("No.", ["no", "not sure", "yes"]) == 0
    assert extract_choice("b", ["c", "b", "a"]) == 1                      # options that are letters: the exact text wins
    assert extract_choice("dark red", ["red", "dark red"]) == 1
    assert extract_choice("The person sat down", ["stand up", "sit down"]) is None
    assert extract_choice("anything", []) is None
    for i in range(4):                                                   # never raises, whatever comes
        for junk in ("\\boxed{", "((((", "answer is", "A" * 5000, "\x00", "🦊", "answer: (", "[]", "<think>"): assert extract_choice(junk, OPTS[:i]) in (None, 0, 1, 2, 3)


@pytest.mark.parametrize("pred,truth,want", [("Red.", "red", True), ("The answer is red", "red", True), ("red or blue", "red", False), ("not red", "red", False), ("three", "3", True),
    ("There are 3.", "three", True), ("3.0", "3", False), ("yes, it moves", "yes", True), ("No. It does not", "no", True), ("yes or no", "yes", False), ("nobody", "no", False),
    ("", "red", False), ("", "", False), ("RED SQUARE", "the red square", True), ("upper left", "up left", False), ("it vanishes", "vanishes", False)])
def test_match_answer(pred, truth, want): assert match_answer(pred, truth) is want


def test_match_answer_with_options_and_aliases():
    assert match_answer("(B)", "blue", ["red", "blue"]) and not match_answer("(A)", "blue", ["red", "blue"])
    assert match_answer("bike", ["bicycle", "bike"])


@pytest.mark.parametrize("text,want", [("from 1.5s to 3.0s", [(1.5, 3.)]), ("3.0s - 1.5s", [(1.5, 3.)]), ("between 0:12 and 1:05", [(12., 65.)]), ("1:00:00 to 1:00:10", [(3600., 3610.)]),
    ("it starts at 2", []), ("2 to 4 and 6 to 8", [(2., 4.), (6., 8.)])])
def test_parse_spans(text, want): assert parse_spans(text) == want


@pytest.mark.parametrize("clips,p,icc,per", [(25, .6, .2, (1, 9)), (50, .9, .3, (1, 12)), (200, .75, .5, (1, 4)), (60, .5, 0., (1, 1)), (150, .97, .1, (2, 6)), (40, .2, .3, (5, 5))])
def test_coverage_of_the_interval(clips, p, icc, per):
    assert .93 <= simulate_coverage(clips, per, p, icc, reps=3000, seed=11) <= .975


def test_coverage_of_means_that_are_not_shares():
    "Overlaps in 0..1 (not 0 or 1) and unbounded scores keep the promise too."
    rng = np.random.default_rng(0)
    for unit in (True, False):
        hits = 0
        for _ in range(400):
            n = rng.integers(1, 6, 60)
            level = np.clip(rng.beta(4, 3, 60), 0, 1) if unit else rng.normal(4 / 7, .2, 60)
            v = np.clip(level.repeat(n) + rng.uniform(-.02, .02, n.sum()), 0, 1) if unit else level.repeat(n) + rng.normal(0, .3, n.sum())
            lo, hi = mean_score(v, np.arange(60).repeat(n), n_boot=0).ci95
            hits += lo <= 4 / 7 <= hi
        assert .92 <= hits / 400 <= .98


@pytest.mark.parametrize("seed", range(4))
def test_bootstrap_and_analytic_agree(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 10, 150); s = rng.binomial(n, rng.beta(3, 2, 150))
    assert np.allclose(clustered_interval(s, n), bootstrap_interval(s, n), atol=.012)


def test_intervals_at_the_edges():
    one = mean_score([1, 1, 1], ["a", "a", "a"])
    assert one.ci95 == (0., 1.)                                           # one clip says nothing about others
    all_right = mean_score(np.ones(40), np.arange(40))
    assert all_right.ci95[1] == 1 and .88 < all_right.ci95[0] < .95
    wide, narrow = mean_score(np.repeat([1, 0] * 10, 10), np.arange(20).repeat(10)), mean_score(np.tile([1, 0], 100), np.arange(200))
    assert np.diff(wide.ci95) > 2.5 * np.diff(narrow.ci95)                # ten copies of an answer are one answer
    with pytest.raises(EvaluationError): mean_score([1, float("nan")], ["a", "b"])
    with pytest.raises(EvaluationError): accuracy([])


def preds(scores, clips, **kw): return [Prediction(f"q{i}", str(c), "qa", kw.get("skill", "s"), "", "", "", float(s)) for i, (s, c) in enumerate(zip(scores, clips))]


def test_paired_comparison():
    rng = np.random.default_rng(2)
    clips = np.arange(100).repeat(4); a = rng.random(400) < .6
    b = a | (rng.random(400) < .2)
    c = compare(preds(a, clips), preds(b, clips))
    assert c.significant and c.ci95[0] > 0 and c.losses == 0 and c.wins == int((b & ~a).sum()) and c.diff == pytest.approx(b.mean() - a.mean())
    back = compare(preds(b, clips), preds(a, clips))
    assert back.diff == pytest.approx(-c.diff) and back.p == pytest.approx(c.p)
    same = compare(preds(a, clips), preds(a, clips))
    assert same.p == 1 and same.diff == 0
    with pytest.raises(EvaluationError, match="different questions"): compare(preds(a, clips), preds(a[:-1], clips[:-1]))
    with pytest.raises(EvaluationError, match="unique"): compare(preds(a, clips) * 2, preds(a, clips))


def test_three_lucky_questions_are_no_finding():
    a = np.zeros(200); b = a.copy(); b[:3] = 1
    c = compare(preds(a, range(200)), preds(b, range(200)))
    assert c.p == pytest.approx(.25)                                      # 2 of the 8 sign patterns; a normal approximation would claim 0.08


def test_power_at_the_minimum_detectable_effect():
    "At an effect of size mde, the test finds something in about four cases of five."
    rng, G, m, found, sizes = np.random.default_rng(0), 80, 4, 0, []
    for _ in range(200):
        q = rng.beta(4, 2, G).repeat(m)
        a, b = rng.random(G * m) < q, rng.random(G * m) < np.clip(q + .1, 0, 1)
        c = paired_difference(a, b, np.arange(G).repeat(m)); found += c.significant; sizes.append(c.mde)
    effect = .1 * .94                                                     # a little is lost to clipping at 1
    from scipy.stats import norm
    expected = norm.cdf(2.8 * effect / np.mean(sizes) - 1.96)
    assert abs(found / 200 - expected) < .12


def test_slices_find_the_planted_weakness():
    rng = np.random.default_rng(0)
    rows = [Prediction(f"q{i}", f"c{i // 3}", "qa", "colour", "", "", "", float(rng.random() < (.3 if (i // 3) % 5 == 0 else .8)),
                       facts={"has_audio": (i // 3) % 5 != 0, "duration": float(rng.random() * 10), "fps": 25}) for i in range(600)]
    found = slices(rows)
    assert found[0].name == "has_audio=False" and found[0].p < 1e-4 and all(s.p > .05 for s in found if s.name.startswith("duration"))
    assert [s.score.value for s in found] == sorted(s.score.value for s in found)


def test_grounding_and_retrieval():
    assert iou([0, 10], [5, 15]) == pytest.approx(1 / 3) and iou([0, 1], [5, 6]) == 0 and iou([2, 2], [2, 2]) == 0
    g = grounding_metrics([(0, 5), None], [(0, 10), (0, 1)])
    assert g["r1@0.5"].value == .5 and g["miou"].value == .25
    assert grounding_metrics([(0, 5), None], [(0, 10), (0, 1)], strict=True)["r1@0.5"].value == 0
    sim = np.array([[.9, .9, .1], [.2, .8, .3], [np.nan, .1, np.nan]])
    assert ranks(sim).tolist() == [2, 1, 3] and ranks(sim, ties="optimistic").tolist() == [1, 1, 2] and ranks(sim, ties="expected").tolist() == [1.5, 1, 2.5]
    r = retrieval_metrics(np.eye(20)); assert (r["r@1"], r["mdr"], r["mnr"]) == (1, 1, 1)
    many = retrieval_metrics(np.eye(5)[[0, 0, 1, 4]], truth=[0, 0, 1, 4]); assert many["r@1"] == 1 and many["scores"]["r@1"].n_clips == 3
    with pytest.raises(EvaluationError): retrieval_metrics(np.zeros((2, 3)))


def test_caption_metrics_order_models_sensibly():
    refs = [["a red square moves left", "the red square goes left"], ["a blue circle vanishes", "the blue circle is gone"]]
    good, lazy = caption_metrics(["a red square moves left", "the blue circle is gone"], refs), caption_metrics(["a thing", "a thing"], refs)
    assert good["CIDEr"] > 5 and good["BLEU-4"] == pytest.approx(1, abs=1e-6) and all(good[k] > lazy[k] for k in ("CIDEr", "BLEU-4", "ROUGE-L"))
    with pytest.raises(EvaluationError): caption_metrics(["a"], ["a"])


def items(path="", n=24): return tuple(Item(f"q{i}", f"c{i // 4}", str(path), f"Question {i}?", "yes", ("no", "yes"), "order") for i in range(n))


def test_cache_sees_what_changed(tmp_path):
    film = tmp_path / "clip.mp4"; film.write_bytes(b"frames-1")
    task, asked = Task("t", items(film)), []
    def answer(item, prompt): asked.append(item.id); return "B"
    run = lambda **kw: (asked.clear(), run_task(kw.pop("task", task), answer, tmp_path / "run", **({"plan": "p1", "model": "m1"} | kw)), len(asked))[-1]
    assert (run(), run()) == (24, 0)
    was = film.stat(); film.write_bytes(b"frames-2"); os.utime(film, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert (run(), run()) == (24, 0)                                      # same name, size and date; other content
    assert run(plan="p2") == 24 and run(model="m2") == 24 and run(plan={"fps": 2}) == 24
    assert run(task=replace(task, prompt=lambda i: i.question + " Really?")) == 24
    assert run(task=replace(task, items=tuple(replace(i, span=(0., 1.)) for i in task.items))) == 24
    assert run() == 0                                                     # all earlier answers are still there
    moved = tmp_path / "other.mp4"; film.rename(moved)
    assert run(task=Task("t", items(moved))) == 0                         # the same bytes under another name


def test_resume_after_a_kill(tmp_path):
    task, n = Task("t", items(n=40)), [0]
    def dies(item, prompt):
        n[0] += 1
        if n[0] > 17: raise KeyboardInterrupt
        return "B"
    with pytest.raises(KeyboardInterrupt): run_task(task, dies, tmp_path, EvaluationConfig(batch_size=5))
    with open(tmp_path / "answers.jsonl", "a") as f: f.write('{"key": "torn')
    with pytest.raises(EvaluationError, match="manifest"): load_run(tmp_path)
    run = run_task(task, lambda i, p: "B", tmp_path)
    assert run.asked == 25 and run.summary["accuracy"] == 1
    again = load_run(tmp_path)
    assert again.predictions == run.predictions and again.summary["n"] == 40
    m = json.loads((tmp_path / "manifest.json").read_text())
    assert m["counts"] == {"items": 40, "asked": 25, "errors": 0} and {"items", "prompts", "model", "plan", "config", "files", "environment"} <= m.keys()
    assert run_task(task, lambda i, p: "B", tmp_path).asked == 0          # the torn line did not swallow the next one


def test_broken_clips_cost_their_own_answer_and_are_asked_again(tmp_path):
    task = Task("t", items())
    def fragile(item, prompt):
        if item.clip == "c2": raise VideoVLMError("cannot decode")
        return "B"
    run = run_task(task, fragile, tmp_path)
    assert run.summary["errors"] == 4 and [p.error != "" for p in run.predictions].count(True) == 4 and sum(p.score for p in run.predictions) == 20
    assert run_task(task, lambda i, p: "B", tmp_path).asked == 4          # errors are not cached
    def bug(item, prompt): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): run_task(task, bug)            # a bug is not a bad clip


def test_batched_threaded_and_plain_agree(tmp_path):
    task = Task("t", items(n=30))
    one = lambda i, p: "AB"[int(i.id[1:]) % 3 > 0]
    many = batched(lambda its, ps: [one(i, p) for i, p in zip(its, ps)])
    runs = [run_task(task, one), run_task(task, many, cfg=EvaluationConfig(batch_size=7)), run_task(task, one, cfg=EvaluationConfig(workers=4))]
    assert runs[0].predictions == runs[1].predictions == runs[2].predictions
    short = batched(lambda its, ps: ["A"])
    with pytest.raises(EvaluationError, match="returned 1 answers"): run_task(task, short)
    def partly(its, ps):
        if len(its) > 1 and any(i.clip == "c1" for i in its): raise VideoVLMError("bad batch")
        if its[0].clip == "c1": raise VideoVLMError("bad clip")
        return ["B"] * len(its)
    assert run_task(task, batched(partly)).summary["errors"] == 4


def test_options_order_and_bias():
    task = Task("t", tuple(Item(f"q{i}", f"c{i}", question="?", truth="x", options=("x", "y", "z")) for i in range(300)))
    cfg = lambda s: EvaluationConfig(shuffle_options=True, seed=s)
    a, b = run_task(task, lambda i, p: "A", cfg=cfg(0)), run_task(task, lambda i, p: "A", cfg=cfg(1))
    assert [p.options for p in a.predictions] != [p.options for p in b.predictions]
    assert [p.options for p in a.predictions] == [p.options for p in run_task(task, lambda i, p: "C", cfg=cfg(0)).predictions]
    assert .25 < a.summary["accuracy"] < .42 and a.summary["position_bias"]["p"] < 1e-9
    fair = run_task(task, lambda i, p: "ABC"[i.options.index("x")], cfg=cfg(0))
    assert fair.summary["accuracy"] == 1 and fair.summary["position_bias"]["p"] > .99 and fair.summary["position_bias"]["spread"] == 0


def test_contamination_is_reported_beside_the_score(tmp_path):
    task = Task("t", items())
    run = run_task(task, lambda i, p: "B" if i.clip in ("c0", "c1") else "A", tmp_path, train={"train_clips": ["c0"], "clusters": {"c0": 7, "c1": 7, "c2": 8}})
    c = run.summary["contamination"]
    assert (c["n"], c["clips"], c["clusters"]) == (8, 4, 8) and c["clean"]["accuracy"] == 0 and run.summary["accuracy"] == pytest.approx(1 / 3)
    assert json.loads((tmp_path / "manifest.json").read_text())["contaminated_ids"] == sorted(f"q{i}" for i in range(8))
    assert contamination(task.items)["checked"] is False


def test_tasks_from_samples():
    def sample(i, task, **meta): return Sample(str(i), [{"role": "user", "content": [{"type": "video", "video": f"clip{i}"}, {"type": "text", "text": "When?"}]}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "world", task, "", meta)
    rows = [sample(0, "qa", skill="colour", answer="red", options=["red", "blue"]), sample(1, "ground", skill="when", answer="from 1.0s to 2.0s", span=[1., 2.]), sample(2, "caption", answer="a red square moves")]
    qa = task_from_samples(rows); assert qa.items[0].clip == "clip0" and qa.items[0].options == ("red", "blue") and qa.items[0].question == "When?"
    ground = run_task(task_from_samples(rows, "ground", ("ground",)), lambda i, p: "from 1.0s to 3.0s"); assert ground.summary["accuracy"] == .5
    caps = run_task(caption_task(task_from_samples(rows, "caption", ("caption",))), lambda i, p: "a red square moves"); assert caps.summary["accuracy"] == 1 and "CIDEr" in caps.summary["caption"]
    with pytest.raises(EvaluationError): task_from_samples(rows, tasks=("nothing",))


def test_any_openai_server_is_a_model(tmp_path):
    pytest.importorskip("openai")
    seen = []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"]))); seen.append(body)
            out = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "(B)"}}]}).encode()
            self.send_response(200); self.send_header("content-type", "application/json"); self.send_header("content-length", str(len(out))); self.end_headers(); self.wfile.write(out)
    server = HTTPServer(("127.0.0.1", 0), Handler); threading.Thread(target=server.serve_forever, daemon=True).start()
    film = tmp_path / "c.mp4"; film.write_bytes(b"12")
    try: run = run_task(Task("t", items(film, 3)), openai_answer(f"http://127.0.0.1:{server.server_port}/v1", "m"))
    finally: server.shutdown(); server.server_close()
    assert run.summary["accuracy"] == 1 and seen[0]["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,MTI")
    gone = run_task(Task("t", items(film, 1)), openai_answer("http://127.0.0.1:9/v1", "m", timeout=2, ))
    assert gone.summary["errors"] == 1


def test_summary_is_json_and_import_is_light():
    json.dumps(summary(preds([1, 0, 1], "abc")))
    code = "import sys, video_vlm.evaluation, video_vlm.benchmarks; print([m for m in ('torch', 'transformers', 'evaluate', 'datasets', 'pandas', 'matplotlib', 'sklearn', 'scipy', 'openai') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == "[]", out
