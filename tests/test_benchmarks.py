"Our scores against those of the official code, to four decimals, wherever reference scores are at hand."
import json
from pathlib import Path

import numpy as np
import pytest

from video_vlm import benchmarks as bm
from video_vlm.evaluation import run_task, shuffle_options
from video_vlm.data import VideoVLMError

BENCH = Path(__file__).parents[2] / "shared" / "data" / "bench"
needs_bench = pytest.mark.skipif(not BENCH.is_dir(), reason=f"no reference scores in {BENCH}")
needs_java = pytest.mark.skipif(not bm.has_java(), reason="METEOR and the PTB tokenizer need a `java` command and pycocoevalcap")


def load(name): return json.loads((BENCH / name).read_text())


def close(ours, theirs, path="", tol=5e-5):
    "Every number of `theirs` is in `ours`, to four decimals; returns how many were compared."
    if isinstance(theirs, dict): return sum(close(ours[k], v, f"{path}/{k}", tol) for k, v in theirs.items())
    if isinstance(theirs, list): return sum(close(a, b, f"{path}/{i}", tol) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    if isinstance(theirs, bool) or not isinstance(theirs, (int, float)): return 0
    assert abs(ours - theirs) < tol, f"{path}: ours {ours}, official {theirs}"
    return 1


@needs_bench
@needs_java
@pytest.mark.parametrize("name", ["edge_cases", *(pytest.param(n, marks=pytest.mark.slow) for n in ("msvd_val_human", "msvd_val_half_swapped", "msrvtt_val120_human"))])
def test_captioning(name):
    d, ref = BENCH / "captioning", load(f"captioning/{name}.scores.json")
    ours = bm.score_file("captioning", d / f"{name}.refs.json", d / f"{name}.preds.json")
    assert ours["tokenizer"] == "ptb"
    assert close(ours, ref["scores"]) == 7
    assert close(ours["per_item"], ref["per_item"]) == 7 * ref["n"]


@needs_bench
@needs_java
@pytest.mark.parametrize("name", ["edge_cases", "msvd_val_human", "msrvtt_val120_human"])
def test_ptb_tokenizer(name):
    d, ref = BENCH / "captioning", load(f"captioning/{name}.ptb_tokenized.json")
    refs, preds = load(f"captioning/{name}.refs.json"), load(f"captioning/{name}.preds.json")
    flat, want = [r for i in refs for r in refs[i]], [r for i in refs for r in ref["refs"][i]]
    assert [" ".join(t) for t in bm.ptb_tokenize(flat)] == want            # in one of these sets a caption has a carriage return: the official shift
    assert [" ".join(t) for t in bm.ptb_tokenize([preds[i] for i in refs])] == [ref["preds"][i] for i in refs]


@needs_bench
@pytest.mark.parametrize("name", ["edge_cases", "msvd_val_human", "msvd_val_half_swapped", "msrvtt_val120_human"])
def test_own_bleu_rouge_cider_need_no_java(name):
    "On the official tokens our own BLEU, ROUGE-L and CIDEr-D are the official ones, aggregate and item by item."
    from video_vlm.evaluation import bleu, cider, rouge_l
    tok, ref = load(f"captioning/{name}.ptb_tokenized.json"), load(f"captioning/{name}.scores.json")
    ids = list(ref["per_item"])
    P, R = [tok["preds"][i].split() for i in ids], [[r.split() for r in tok["refs"][i]] for i in ids]
    c, rl = cider(P, R), [rouge_l(p, r) for p, r in zip(P, R)]
    ours = {f"Bleu_{k+1}": b for k, b in enumerate(bleu(P, R))} | {"CIDEr": c.mean(), "ROUGE_L": np.mean(rl)}
    close(ours, {k: v for k, v in ref["scores"].items() if k != "METEOR"})
    for n, i in enumerate(ids):
        item = {f"Bleu_{k+1}": b for k, b in enumerate(bleu([P[n]], [R[n]]))} | {"CIDEr": c[n], "ROUGE_L": rl[n]}
        close(item, {k: v for k, v in ref["per_item"][i].items() if k != "METEOR"}, i)


def test_captions_without_java_say_so():
    out = bm.metric("captioning").score(["a dog runs"], [["a dog is running"]], java=False)
    assert "METEOR" not in out and out["skipped"].startswith("METEOR: needs") and out["tokenizer"] == "python"


@needs_bench
@needs_java
def test_activitynet_captions():
    d, ref = BENCH / "activitynet_captions", load("activitynet_captions/val60.scores.json")
    assert close(bm.score_file("activitynet_captions", d / "val60.ref_val_1.json", d / "val60.submission.json"), ref["refs=val_1"]) == 9 * 5


@needs_bench
def test_qvhighlights():
    d = BENCH / "qvhighlights"
    ours = bm.score_file("qvhighlights", d / "highlight_val_release.jsonl", d / "sample_val_preds.jsonl")
    assert close(ours, load("qvhighlights/sample_val_preds.scores.json"), tol=1e-9) >= 100


@needs_bench
def test_nextqa():
    d = BENCH / "nextqa"
    assert close(bm.score_file("nextqa", d / "val.csv", d / "HGA_val_preds.json"), load("nextqa/HGA_val_preds.scores.json")["exact"]) >= 30


@needs_bench
def test_activitynet_qa_with_its_quirk():
    d, ref = BENCH / "activitynet_qa", load("activitynet_qa/pred_val_example.scores.json")
    ours = bm.score_file("activitynet_qa", d / "val_a.json", d / "pred_val_example.json")
    for k, v in ref["exact"].items():
        if k.isdigit(): assert ours["counts"][k] == [v["correct"], v["total"]]
    assert abs(ours["All"] - ref["exact"]["all"]["acc"]) < 1e-9
    assert abs(ours["Free_sound"] - ref["exact"]["free_correct_denominator"]["acc"]) < 1e-9
    printed = dict(l.strip().split(": ") for l in ref["official_stdout"].splitlines() if l.startswith("\t"))
    for k, v in printed.items(): assert f"{ours[k]:.4f}" == v, k            # 'Free' is the official slip


@needs_bench
@pytest.mark.parametrize("kind", ["multi-choice", "yes_no", "caption_matching"])
def test_tempcompass(kind):
    d, ref = BENCH / "tempcompass", load(f"tempcompass/video-llava.{kind}.scores.json")
    ours = bm.score_file("tempcompass", d, d / f"video-llava.{kind}.preds.json")
    assert close(ours, ref["exact"]) >= 20
    assert ours["ratings"] == [r[3] for r in ref["per_question"]]
    fine = eval(ref["official_stdout"].splitlines()[2])                     # printed as a Python dict of percents
    assert {k: round(100 * v["acc"], 1) for k, v in ours["fine"].items()} == pytest.approx(fine, abs=.051)
    assert f"Match Success Rate={100 * ours['match_rate']:.1f}" in ref["official_stdout"]


@needs_bench
def test_charades_sta_both_conventions():
    d = BENCH / "charades_sta"
    ours = bm.score_file("charades_sta", d / "charades_sta_test.txt", d / "test800_preds.jsonl")
    assert close(ours, {k: v for k, v in load("charades_sta/test800_preds.scores.json").items() if k not in ("exact_half", "note")}) == 20
    assert ours["R1_ge"]["0.5"] > ours["R1_gt"]["0.5"]


@needs_bench
@pytest.mark.parametrize("name", ["msrvtt300", "msrvtt120_ties"])
def test_retrieval_and_ties(name):
    ref = load(f"msrvtt_retrieval/{name}.scores.json")
    ours = bm.score_file("msrvtt_retrieval", BENCH / "msrvtt_retrieval/msrvtt_jsfusion_1kA_test.csv", BENCH / f"msrvtt_retrieval/{name}.sim.npz")
    assert close(ours, {k: ref[k] for k in ("text_to_video", "video_to_text")}) == 40
    assert len(bm.load_retrieval(BENCH / "msrvtt_retrieval/msrvtt_jsfusion_1kA_test.csv")) == 1000


@needs_bench
def test_published_answers_get_the_official_scores_in_a_run_too(tmp_path):
    "Windows, saliency and similarities that others published, given as a model's answers: the run's figures, and those of the file it leaves, are the official ones."
    d = BENCH / "qvhighlights"; said = {r["qid"]: r for r in bm.read_rows(d / "sample_val_preds.jsonl")}
    task = bm.load_task("qvhighlights", d / "highlight_val_release.jsonl"); task = bm.replace(task, items=tuple(i for i in task.items if int(i.id) in said))
    run = run_task(task, lambda i, p: json.dumps({"windows": said[int(i.id)]["pred_relevant_windows"], "saliency": said[int(i.id)]["pred_saliency_scores"]}), tmp_path / "qv")
    again = bm.score_file("qvhighlights", d / "highlight_val_release.jsonl", tmp_path / "qv/submission.jsonl")
    ref = {k: v for k, v in load("qvhighlights/sample_val_preds.scores.json").items() if k in again}
    assert len(said) == len(run.predictions) and again == run.summary["official"] and close(run.summary["official"], ref) > 20
    d = BENCH / "msrvtt_retrieval"; sim = np.load(d / "msrvtt120_ties.sim.npz")["sim"]; task = bm.load_task("msrvtt_retrieval", d / "msrvtt_jsfusion_1kA_test.csv")
    at = {i.id: n for n, i in enumerate(task.items)}
    run = run_task(bm.replace(task, items=task.items[:len(sim)]), lambda i, p: json.dumps(sim[:, at[i.id]].tolist()) if len(p.split("\n")) == len(sim) else "", tmp_path / "ret")
    ref = load("msrvtt_retrieval/msrvtt120_ties.scores.json")
    assert close(run.summary["official"], {k: ref[k] for k in ("text_to_video", "video_to_text")}) == 40 and run.summary["official"]["brief"]["T2V R1"] == ref["text_to_video"]["clip4clip"]["R1"]
    assert run.summary["accuracy"] == pytest.approx(ref["text_to_video"]["tie_free"]["pessimistic"]["R1"]) and "rank" in run.predictions[0].answer


@needs_bench
@needs_java
@pytest.mark.slow
def test_published_events_get_the_official_scores_in_a_run_too(tmp_path):
    d = BENCH / "activitynet_captions"; said = load("activitynet_captions/val60.submission.json")["results"]
    run = run_task(bm.load_task("activitynet_captions", d / "val60.ref_val_1.json"), lambda i, p: json.dumps(said.get(i.id, [])), tmp_path / "dense")
    ref = load("activitynet_captions/val60.scores.json")["refs=val_1"]
    assert close(run.summary["official"], ref) == 9 * 5
    assert json.loads((tmp_path / "dense/submission.json").read_text())["results"].keys() >= {i for i in said if said[i]}


@needs_bench
def test_pope():
    d = BENCH / "pope"
    ours = bm.score_file("pope", d / "coco_pope_random.jsonl", d / "coco_random_answers.jsonl")
    lines = load("pope/coco_random.scores.json")["official_stdout"].splitlines()
    assert [ours[k] for k in ("TP", "FP", "TN", "FN")] == [int(x) for x in lines[1].split()]
    names = {"Accuracy": "accuracy", "Precision": "precision", "Recall": "recall", "F1 score": "f1", "Yes ratio": "yes_ratio"}
    for l in lines[2:]: assert abs(ours[names[l.split(": ")[0]]] - float(l.split(": ")[1])) < 5e-5


@needs_bench
def test_mvbench_both_rules():
    d = BENCH / "mvbench"
    ours = bm.score_file("mvbench", d / "json", d / "responses.jsonl")
    ref = load("mvbench/responses.scores.json")["scores"]
    assert ref["_all"].pop("official_raised") == 0 and close(ours, ref) == 63
    for r in map(json.loads, (d / "responses.jsonl").read_text().splitlines()):
        assert bm.mvbench_official(r["response"], r["answer"], r["gt_letter"]) == r["official_check_ans"], r["response"]
        assert (bm.lmms_letter(r["response"]) == r["gt_letter"]) == bool(r["lmms_eval_mcq_acc"]), r["response"]


@needs_bench
def test_our_own_reading_of_mvbench_answers_is_what_was_meant():
    "The made-up responses know which letter was intended: ours must find it in every answer that says one."
    from video_vlm.evaluation import extract_choice
    rows = [json.loads(l) for l in (BENCH / "mvbench/responses.jsonl").read_text().splitlines()]
    read = [extract_choice(r["response"], r["candidates"]) for r in rows]
    said = [(r, i) for r, i in zip(rows, read) if r["response"].strip()]
    wrong = [(r["response"], r["candidates"], r["intended_letter"], i) for r, i in said if i is None or bm.LETTERS[i] != r["intended_letter"]]
    assert len(wrong) == 0, wrong[:5]
    assert all(i is None for r, i in zip(rows, read) if not r["response"].strip())


@needs_bench
def test_xstest():
    d, ref = BENCH / "xstest", load("xstest/llama2orig.scores.json")
    f = d / "llama2orig_completions_labelled.csv"
    assert bm.score_file("xstest", d / "xstest_prompts.csv", f) == ref["strmatch_label"]
    human = bm.score_file("xstest", d / "xstest_prompts.csv", f, column="final_label")
    assert human == ref["final_label"]
    rows = bm.read_rows(f)
    assert all(bm.refusal_label(r["completion"]) == r["strmatch_label"] for r in rows)


@needs_bench
@pytest.mark.parametrize("name,data,n", [("mvbench", "mvbench/json", 4000), ("nextqa", "nextqa/val.csv", 4996), ("activitynet_qa", "activitynet_qa/val_q.json", 18000),
    ("tempcompass", "tempcompass/questions_multi-choice.json", 1580), ("tempcompass", "tempcompass/questions_yes_no.json", 2453),
    ("tempcompass", "tempcompass/questions_caption_matching.json", 1503), ("charades_sta", "charades_sta/charades_sta_test.txt", 3720),
    ("pope", "pope/coco_pope_random.jsonl", 3000), ("xstest", "xstest/xstest_prompts.csv", 450), ("captioning", "captioning/msvd_val_human.refs.json", 100),
    ("qvhighlights", "qvhighlights/highlight_val_release.jsonl", 1550), ("activitynet_captions", "activitynet_captions/val60.ref_val_1.json", 60), ("msrvtt_retrieval", "msrvtt_retrieval/msrvtt_jsfusion_1kA_test.csv", 1000)])
def test_published_annotation_files_load(name, data, n):
    task = bm.load_task(name, BENCH / data)
    assert len(task.items) == n and all(task.prompt(i) for i in task.items[:50])


@needs_bench
def test_a_perfect_and_a_constant_model_on_real_annotations(tmp_path):
    task = bm.load_task("nextqa", BENCH / "nextqa/val.csv")
    perfect = run_task(task, lambda i, p: bm.LETTERS[i.options.index(i.truth)])
    assert perfect.summary["accuracy"] == 1 and perfect.summary["official"]["all"]["acc"] == 1
    always = run_task(task, lambda i, p: "A")
    assert .15 < always.summary["accuracy"] < .25 and always.summary["position_bias"]["chosen"][0] == 1
    t = bm.load_task("tempcompass", BENCH / "tempcompass/questions_caption_matching.json")
    assert run_task(t, lambda i, p: i.facts["gold"]).summary["official"]["avg"]["acc"] == 1
    small = bm.replace(bm.load_task("charades_sta", BENCH / "charades_sta/charades_sta_test.txt"))
    said = run_task(bm.replace(small, items=small.items[:100]), lambda i, p: f"from {i.span[0]}s to {i.span[1]}s")
    assert said.summary["official"]["mIoU_top1"] == pytest.approx(1) and said.summary["accuracy"] == pytest.approx(1)


def test_mvbench_official_rule_survives_shuffled_options(tmp_path):
    from video_vlm.evaluation import EvaluationConfig
    (tmp_path / "moving_count.json").write_text(json.dumps([{"video": f"{i}.mp4", "question": "?", "candidates": ["1", "2", "3"], "answer": str(1 + i % 3)} for i in range(60)]))
    task = bm.load_task("mvbench", tmp_path)
    r = run_task(task, lambda i, p: f"({bm.LETTERS[i.options.index(i.truth)]}) {i.truth}", cfg=EvaluationConfig(shuffle_options=True, seed=3))
    assert r.summary["official"]["all"]["acc"] == 1 and len({p.options for p in r.predictions}) > 3


def test_other_formats_load(tmp_path):
    put = lambda n, o: ((tmp_path / n).parent.mkdir(exist_ok=True), (tmp_path / n).write_text(json.dumps(o)))
    put("vmme.json", [{"video_id": "001", "videoID": "abc", "duration": "short", "domain": "Knowledge", "questions": [
        {"question_id": "001-1", "task_type": "Counting", "question": "How many?", "options": ["A. one", "B. two", "C. three", "D. four"], "answer": "C"}]}])
    t = bm.load_task("videomme", tmp_path / "vmme.json")
    assert (t.items[0].options, t.items[0].truth, t.items[0].clip) == (("one", "two", "three", "four"), "three", "abc")
    r = run_task(t, lambda i, p: "The best answer is C.")
    assert r.summary["official"]["short"]["acc"] == 1 and r.summary["official"]["Counting"]["total"] == 1
    put("mlvu/1_plotQA.json", [{"video": "m.mp4", "duration": 9.5, "question": "?", "candidates": ["x", "y"], "answer": "y", "question_type": "plotQA"}])
    assert run_task(bm.load_task("mlvu", tmp_path / "mlvu"), lambda i, p: "(B) y").summary["official"]["m_avg"] == 1
    put("lvb_val.json", [{"id": "a_0", "video_id": "a", "video_path": "a.mp4", "question": "?", "candidates": ["x", "y", "z"], "correct_choice": 2, "question_category": "T2A", "duration_group": 60, "duration": 44.}])
    assert run_task(bm.load_task("longvideobench", tmp_path / "lvb_val.json"), lambda i, p: "C").summary["official"]["60"]["acc"] == 1
    put("test_qa.json", [{"answer": "guitar", "id": 5, "question": "what is a man playing?", "video_id": 1301}])
    t = bm.load_task("msvd_qa", tmp_path / "test_qa.json")
    assert t.items[0].skill == "what" and run_task(t, lambda i, p: "guitar").summary["official"]["what"]["acc"] == 1
    assert bm.load_task("msrvtt_qa", tmp_path / "test_qa.json").items[0].clip == "video1301"


def test_videos_are_found_by_their_published_name(tmp_path):
    (tmp_path / "deep").mkdir(); (tmp_path / "deep" / "abc.webm").write_bytes(b"x")
    assert bm.find_video(tmp_path, "abc.mp4").endswith("abc.webm") and bm.find_video(tmp_path, "zzz") == ""


def test_judge_is_named_and_unread_is_wrong():
    from video_vlm.evaluation import Prediction
    ps = [Prediction(str(i), str(i), "qa", "", "what?", a, "guitar", 0.) for i, a in enumerate(["a guitar", "drums", "piano"])]
    said = iter(['{"same": "yes", "score": 5}', '{"same": "no", "score": 0}', "I cannot say"])
    new, out = bm.judged(ps, lambda p: next(said), "toy")
    assert [p.score for p in new] == [1, 0, 0] and out["protocol"] == "judge:toy" and out["unread"] == 1 and out["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("call", [
    lambda t: bm.load_task("mvbench", t / "missing"), lambda t: bm.load_task("no_such", t), lambda t: bm.score_file("videomme", t, t),
    lambda t: bm.score_file("nextqa", t / "a.csv", t / "b.json"), lambda t: bm.metric("nothing"), lambda t: bm.read_charades(t / "c.txt"),
    lambda t: bm.highlight_scores([{"qid": 1}], [{"qid": 2}])])
def test_errors_say_what_is_wrong(tmp_path, call):
    (tmp_path / "c.txt").write_text("not a line\n")
    with pytest.raises(VideoVLMError) as e: call(tmp_path)
    assert len(str(e.value)) > 15


def test_metrics_are_evaluate_metrics_and_need_no_network(monkeypatch):
    import evaluate, socket
    def refuse(*a, **k): raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    m = bm.metric("pope")
    assert isinstance(m, evaluate.Metric)
    m.add_batch(predictions=[json.dumps("Yes."), json.dumps("No.")], references=[json.dumps("yes"), json.dumps("yes")])
    assert m.compute()["accuracy"] == .5
