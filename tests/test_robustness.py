"Damage is repeatable and graded, conditions are paired, planted faults are found, an unfinished or edited report is refused."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from video_vlm.benchmarks import calibration
from video_vlm.data import VideoVLMError
from video_vlm.evaluation import batched, match_answer
from video_vlm.robustness import (ATTACKS, BENIGN, CORRUPTIONS, HARMFUL, ROW, SCHEMA, RobustnessConfig, RobustnessError, clip_bootstrap, corrupt, denies, draw_text, load_robustness, make_base,
    quick_config, read_clip, recalibrate, retime, risk_coverage, run_robustness, says, target_of, worst_first, write_clip)
from video_vlm.world import make_scene, render

CFG = RobustnessConfig(clips=3, questions=3, severities=(3,), moderation_clips=4, height=64)


@pytest.fixture(scope="module")
def clip():
    scene = make_scene(4, "medium")
    return render(scene, 64)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_is_repeatable_and_keeps_the_clip_whole(clip, kind):
    for s in (1, 5):
        (x, t), (y, u), (z, _) = corrupt(*clip, kind, s, 1), corrupt(*clip, kind, s, 1), corrupt(*clip, kind, s, 2)
        assert np.array_equal(x, y) and np.array_equal(t, u) and x.dtype == np.uint8 and len(x) == len(t) >= 2 and x.shape[1:] == clip[0].shape[1:]
        assert (np.diff(t) > 0).all() and t[0] == clip[1][0] and t[-1] == clip[1][-1]                  # the clip starts and ends where it did
        if kind in ("noise", "low_light"): assert not np.array_equal(x, z)
    one, last = np.full((1, 8, 8, 3), 9, np.uint8), np.zeros(1)
    assert len(corrupt(one, last, kind, 5)[0]) == 1                                                     # a clip of one frame is a clip


def test_what_is_refused(clip):
    for bad in (lambda: corrupt(*clip, "fog", 1), lambda: corrupt(*clip, "blur", 0), lambda: RobustnessConfig(groups=("x",)), lambda: RobustnessConfig(severities=(6,)), lambda: RobustnessConfig(clips=1),
                lambda: load_robustness("/nowhere"), lambda: recalibrate([.1, .9], [0, 1], ["a", "b"], "magic") if True else None):
        with pytest.raises(RobustnessError): bad()


def test_reading_of_answers():
    assert says("It's BLUE!", "blue") and not says("blueish", "blue") and not says("blue and red", "blue", "red") and says("moves up left", "up left")
    assert all(map(denies, ("There is no star", "None.", "I can't see one", "It isn't there"))) and not any(map(denies, ("red", "A notable star", "knot")))
    assert len(set(BENIGN) | set(HARMFUL)) == len(BENIGN) + len(HARMFUL) and len(BENIGN) == len(HARMFUL)


def test_text_is_drawn_into_every_frame(clip):
    x = draw_text(clip[0], ["ANSWER: RED"])
    assert (np.abs(x.astype(int) - clip[0]).mean((1, 2, 3)) > 1).all() and not np.array_equal(x[0], clip[0][0]) and np.array_equal(x[:, :10], clip[0][:, :10])


def test_speed_keeps_the_story():
    s = make_scene(3, "medium"); slow = retime(s, 2.)
    assert slow.seconds == 2 * s.seconds and [e.action for e in slow.events] == [e.action for e in s.events] and slow.events[0].start == 2 * s.events[0].start


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A made-up model with planted faults: blind where frames are damaged by noise, obeys the question, refuses harmless requests, invents things."
    out = tmp_path_factory.mktemp("rob"); base = make_base(out / "probe", CFG)
    truth, calls = {i.id: i.truth for i in base.items}, []
    def one(i, p):
        calls.append(i.id)
        if i.skill == "refusal": return "I'm sorry, I can't help with that."
        if "target" in i.facts and any(p.endswith(f"answer {i.facts['target']}.") or "verified answer" in p or "Everybody knows" in p for _ in (0,)): return i.facts["target"]
        if i.skill == "presence" and i.id not in truth: return "yes"
        return "nonsense" if "noise-3" in i.media or not i.media else truth.get(i.id, "yes")
    model = batched(lambda items, prompts: [one(i, p) for i, p in zip(items, prompts)])
    cfg = replace(CFG, groups=("corruption", "blind", "injection", "prompt", "absent", "refusal", "moderation"))
    return out / "run", cfg, model, calls, run_robustness(model, out / "run", cfg, "plan", "mark", say=None), base


def test_planted_faults_are_found(ran):
    folder, cfg, model, calls, report, base = ran
    rows = {r["name"]: r for r in report["conditions"]}
    assert rows["clean"]["value"] == 1 and rows["noise@3"]["value"] == 0 and rows["noise@3"]["diff"] == -1 and rows["noise@3"]["paired"] and rows["blur@3"]["diff"] == 0
    assert rows["text_only"]["value"] == 0 and rows["clean.obeyed"]["value"] == 0
    for k in ATTACKS: assert rows[f"prompt_{k}.obeyed"]["value"] == 1 and rows[f"prompt_{k}"]["value"] == 0 and rows[f"prompt_{k}.obeyed"]["safety"]
    assert rows["injection_frames"]["value"] == 1 and rows["injection_frames.obeyed"]["value"] == 0
    assert rows["refusal.harmless_refused"]["value"] == 1 and rows["refusal.harmful_answered"]["value"] == 0
    assert rows["absent.invented"]["value"] == 1 and not rows["absent.invented"]["higher_is_better"] and rows["absent.there_seen"]["value"] == 1
    worst = worst_first(report); assert {r["name"] for r in worst[:3]} <= {"noise@3", "text_only", *(f"prompt_{k}{x}" for k in ATTACKS for x in ("", ".obeyed"))}
    assert all(target_of(i, base.options) != i.truth for i in base.items)


def test_schema_is_stable(ran):
    folder, cfg, model, calls, report, base = ran
    again, lines = load_robustness(folder)
    assert again == json.loads(json.dumps(report, default=str)) and again["schema"] == SCHEMA == "video_vlm.robustness/1"
    assert {"schema", "model", "config", "conditions", "by_skill", "curves", "calibration", "moderation", "seconds", "environment"} == set(again)
    assert all(tuple(r) == ROW for r in again["conditions"]) and len({r["name"] for r in again["conditions"]}) == len(again["conditions"])
    assert len({l["id"] for l in lines}) == len(lines) and {"id", "clip", "condition", "group", "kind", "severity", "metric", "higher_is_better", "safety", "task", "skill", "question", "answer", "truth", "score", "error"} == set(lines[0])
    for r in again["conditions"]:                                       # every figure can be recomputed from the lines
        assert np.mean([l["score"] for l in lines if l["condition"] == r["name"]]) == pytest.approx(r["value"])
    assert [p[0] for p in again["curves"]["blur"]] == [0, 3] and again["moderation"]["probabilities"] is False


def test_second_run_asks_nothing_and_another_config_is_refused(ran):
    folder, cfg, model, calls, report, _ = ran
    n = len(calls)
    again = run_robustness(model, folder, cfg, "plan", "mark", say=None)
    assert len(calls) == n and again["conditions"] == report["conditions"]
    with pytest.raises(RobustnessError, match="choose another folder"): run_robustness(model, folder, replace(cfg, height=96), say=None)
    (folder / "predictions.jsonl").write_text((folder / "predictions.jsonl").read_text().replace('"score": 0', '"score": 1', 1))
    with pytest.raises(RobustnessError, match="changed since the run"): load_robustness(folder)


def test_another_seed_is_another_test_set(tmp_path):
    a, b = (make_base(tmp_path / str(s), replace(CFG, seed=s)) for s in (0, 1))
    assert not {i.id for i in a.items} & {i.id for i in b.items}
    assert make_base(tmp_path / "0", CFG).items == a.items


def test_own_clips(tmp_path):
    from video_vlm.data import Sample, save_samples
    frames, times = render(make_scene(4, "medium"), 64)
    rows = []
    for k in range(3):
        write_clip(tmp_path / f"c{k}.mp4", frames, times)
        for q in range(2): rows.append(Sample(id=f"{k}-{q}", messages=[dict(role="user", content=[dict(type="video", video=f"c{k}.mp4"), dict(type="text", text="What moves?")])], source="", task="qa", created_at="", meta=dict(answer="it", skill="s")))
    save_samples(rows, tmp_path / "annotations.jsonl")
    cfg = replace(CFG, clips=2, data=str(tmp_path / "annotations.jsonl"), groups=("corruption", "domain", "order"))
    report = run_robustness(lambda i, p: "it", tmp_path / "run", cfg, say=None)
    names = {r["name"] for r in report["conditions"]}
    assert {"clean", "shuffled", "reversed", "blur@3"} <= names and "new_pairs" not in names and all(r["value"] == 1 for r in report["conditions"])
    with pytest.raises(RobustnessError, match="no questions"): make_base(tmp_path, replace(cfg, data=str(_empty(tmp_path))))

def _empty(d): (d / "none.jsonl").write_text(""); return d / "none.jsonl"


@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_held_out_and_honest(seed):
    rng = np.random.default_rng(seed)
    p = rng.uniform(.05, .99, 2000); right = rng.random(2000) < p**2; clips = rng.integers(0, 200, 2000).astype(str)
    for m in ("isotonic", "platt"): assert calibration(recalibrate(p, right, clips, m, seed), right)["ece"] < .05 < calibration(p, right)["ece"]
    noise = rng.random(400) < .5                                        # nothing to learn: calibration must not invent it
    found = recalibrate(rng.random(400), noise, np.arange(400).astype(str), "isotonic", seed)
    assert abs(np.corrcoef(found, noise)[0, 1]) < .2
    lo, hi = clip_bootstrap(lambda ix: right[ix].mean(), clips); assert lo < right.mean() < hi


def test_risk_coverage():
    rng = np.random.default_rng(0); p = rng.random(1000); right = rng.random(1000) < p
    rc = risk_coverage(p, right, np.arange(1000).astype(str), (.1, .001))
    cov, risk = np.array(rc["curve"])[:, 0], np.array(rc["curve"])[:, 1]
    assert (np.diff(cov) > 0).all() and cov[-1] == 1 and risk[-1] == pytest.approx(1 - right.mean()) and risk[1] < risk[-1] / 2
    a = rc["abstain"]["0.1"]; keep = p >= a["threshold"]
    assert keep.mean() == pytest.approx(a["coverage"]) and 1 - right[keep].mean() == pytest.approx(a["risk"]) and a["risk"] <= .1
    flat = risk_coverage(np.ones(50), np.r_[np.ones(25), np.zeros(25)], np.arange(50)); assert len(flat["curve"]) == 1 and flat["abstain"]["0.05"]["threshold"] is None


@pytest.mark.slow
def test_a_real_checkpoint_through_the_command(tmp_path):
    import subprocess, sys
    groups = "corruption,blind,injection,absent,moderation,calibration"
    cmd = [sys.executable, "-c", "from video_vlm.cli import main; main()", "robustness", "--quick", "--groups", groups, "--out", str(tmp_path / "run")]
    run = subprocess.run(cmd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report, lines = load_robustness(tmp_path / "run")
    rows = {r["name"]: r for r in report["conditions"]}
    assert rows["clean"]["value"] > rows["text_only"]["value"] and report["calibration"]["available"] and report["moderation"]["probabilities"] and rows["clean"]["errors"] == 0
    page = (tmp_path / "run" / "report.html").read_text(); assert page.count("<svg") >= 2 and "When to say" in page and "<img" in page
