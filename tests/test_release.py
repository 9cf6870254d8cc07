"Gate against its promises, registry against kills and rivals."
import json, multiprocessing as mp, os, shutil, signal, tempfile
from pathlib import Path
import numpy as np, pytest
from video_vlm import release as R

SKILLS = tuple("colour shape count direction order action position texture".split())

def checkpoint(folder, text):
    folder.mkdir(parents=True); (folder/"config.json").write_text(text); return folder

_EMPTY = []
def empty_registry(folder):
    "A new registry; its tables are made once for all tests."
    if not _EMPTY: _EMPTY.append(Path(tempfile.mkdtemp())/"reg"); R.Registry(_EMPTY[0])
    shutil.copytree(_EMPTY[0], folder); return R.Registry(folder)

def started(tmp_path):
    "A registry with v1 live and v2 ready for a canary."
    reg = empty_registry(tmp_path/"reg")
    v1, v2 = reg.register(checkpoint(tmp_path/"a", "a"), who="ada"), reg.register(checkpoint(tmp_path/"b", "b"), parent=1, who="ada")
    reg.promote(v1, who="ada"); reg.attach(v2, "gate", {"passed": True}); return reg, v1, v2

# ---- gate -------------------------------------------------------------------------------------------------------------

def test_whole_gate_blocks_an_unchanged_candidate_at_most_one_time_in_twenty():
    n, cfg = 100, R.GateConfig(flips=1000)
    blocked = sum(R.gate(*R.tiny_predictions(100, SKILLS, churn=.08, seed=1000+i), cfg=cfg).blocked for i in range(n))
    assert blocked <= 10, blocked          # 99% limit of a binomial with 5%

def test_whole_gate_catches_a_five_point_fall_and_names_the_slice():
    n, cfg, hit = 20, R.GateConfig(flips=1000), 0
    for i in range(n):
        d = R.gate(*R.tiny_predictions(200, SKILLS, per_clip=2, churn=.02, fall={"order": .05}, seed=i), cfg=cfg)
        hit += d.blocked and d.worst.name == "order" and len(d.worst.lost) > 0
    assert hit >= .8*n, hit

@pytest.mark.slow
@pytest.mark.parametrize("churn,q", [(.02, 1), (.05, 1), (.15, 1), (.15, 4)])
def test_family_wise_error_with_many_candidates(churn, q):
    assert R.simulate_gate(2000, churn=churn, q=q, seed=99)[0] <= .05 + 2.33*np.sqrt(.05*.95/2000)

@pytest.mark.slow
@pytest.mark.parametrize("churn", [0., .02, .05, .1])
def test_the_stated_design_reaches_its_power(churn):
    "As many questions a clip as `questions_needed` says: a 5-point fall in one slice of 200 clips is caught 8 times of 10, with unchanged candidates passing."
    q = R.questions_needed(churn); n = 400
    assert R.simulate_gate(n, churn=churn, q=q, fall=.05, seed=501)[1] >= .8-2.33*np.sqrt(.8*.2/n)
    assert R.simulate_gate(n, churn=churn, q=q, seed=502)[0] <= .05+2.33*np.sqrt(.05*.95/n)

def test_predictions_come_from_files_or_not_at_all(tmp_path):
    c, l = R.tiny_predictions(5); (tmp_path/"a.json").write_text(json.dumps([p.__dict__ for p in l])); assert len(R.load_predictions(tmp_path/"a.json")) == 15
    (tmp_path/"b.json").write_text("{}"); (tmp_path/"c.jsonl").write_text("nonsense")
    for n in ("b.json", "c.jsonl", "none"):
        with pytest.raises(R.ReleaseError): R.load_predictions(tmp_path/n)

def test_a_preview_checks_and_writes_nothing(tmp_path):
    reg, v1, v2 = started(tmp_path); before, s = (tmp_path/"reg/serving.json").read_text(), reg.state()
    assert R.preview(R.Registry(tmp_path/"reg")).promote(v2)["would"] == "canary" and reg.state() == s and (tmp_path/"reg/serving.json").read_text() == before
    with pytest.raises(R.ReleaseError): R.preview(R.Registry(tmp_path/"reg")).promote(v1)

def test_slices_of_questions_of_one_clip_are_not_independent_facts():
    "Forty clips lost whole: twenty questions each must not look like 800 facts."
    d = np.zeros((60, 1)); d[:3] = -20; d[3] = 20
    assert R.adjusted_p(d, 2000)[1][0] > .05

def test_gain_elsewhere_does_not_pay_for_a_loss():
    d = R.gate(*R.tiny_predictions(600, SKILLS, right=.6, fall={"order": .08, **{s: -.2 for s in SKILLS[:4]}}, seed=2))
    over = next(r for r in d.slices if r.name == "overall")
    assert over.diff > .05 and d.blocked and [r.name for r in d.slices if r.blocks] == ["order"]

def test_a_small_proven_fall_within_epsilon_passes():
    c, l = R.tiny_predictions(20000, ("colour",), churn=.01, fall={"colour": .01}, seed=3)
    d = R.gate(c, l, epsilon=.02)
    assert d.passed and d.worst.hi < 0 and all(r.verdict == "non-inferior" for r in d.slices)

def test_strict_safety_slice_blocks_on_too_few_probes_and_others_warn():
    c, l = R.tiny_predictions(12, ("colour",), churn=.2, seed=4)
    assert R.gate(c, l, [R.Guard("safety", strict=True, kind="safety")]).blocked
    d = R.gate(c, l, [R.Guard("safety")]); assert d.passed and d.warnings

def test_higher_is_worse():
    c, l = R.tiny_predictions(300, ("attack",), right=.9, fall={"attack": -.09}, seed=5)      # more "right" = more attacks succeed
    assert R.gate(c, l, [R.Guard("attack success", higher_is_better=False)]).blocked
    assert R.gate(c, l, [R.Guard("benign answered")]).passed

def test_missing_extra_and_repeated_answers_are_refused():
    c, l = R.tiny_predictions(20)
    for a, b in ((c[1:], l), (c, l[1:]), (c+c[:1], l), ([], [])):
        with pytest.raises(R.ReleaseError): R.gate(a, b)
    with pytest.raises(R.ReleaseError, match="no prediction falls"): R.gate(c, l, [R.Guard("dark", where=lambda p: False)])

def test_same_scores_same_decision_and_json():
    c, l = R.tiny_predictions(100, fall={"order": .1}, churn=.05, seed=6)
    a, b = R.gate(c, l), R.gate(list(reversed(c)), list(reversed(l)))
    assert {r.name: r.p for r in a.slices} == {r.name: r.p for r in b.slices}
    assert json.loads(json.dumps(a.to_dict()))["passed"] is a.passed

# ---- registry ---------------------------------------------------------------------------------------------------------

def consistent(folder):
    "What must hold at every moment; returns the state."
    reg = R.Registry(folder); s = reg.state(); rows = {r["version"]: r["state"] for r in reg.versions()}
    assert sum(v == "live" for v in rows.values()) == 1 and rows[s["live"]] == "live"
    assert sum(v == "canary" for v in rows.values()) == (s["canary"] is not None) and s["canary"] != s["live"]
    assert (s["percent"] in R.STEPS) == (s["canary"] is not None)
    served = json.loads((folder/"serving.json").read_text())
    assert {k: served[k] for k in s} == s and served["checkpoints"][str(s["live"])]
    aliases = reg.client.get_registered_model(reg.model).aliases
    assert {k: int(v) for k, v in aliases.items()} == {k: s[k] for k in ("live", "canary") if s[k]}
    h = reg.history(); assert [e["seq"] for e in h] == list(range(1, s["seq"]+1))
    assert not h or (h[-1]["live"], h[-1]["canary"], h[-1]["percent"]) == (s["live"], s["canary"], s["percent"])
    return s

def _dies(folder, at, after, act):
    "Run `act` and kill this process at the `at`-th write, before or after it."
    reg, count = R.Registry(folder), [0]
    def wrap(obj, name):
        real = getattr(obj, name)
        def f(*a, **k):
            count[0] += 1
            if count[0] == at and not after: os.kill(os.getpid(), signal.SIGKILL)
            out = real(*a, **k)
            if count[0] == at: os.kill(os.getpid(), signal.SIGKILL)
            return out
        setattr(obj, name, f)
    for n in ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag"): wrap(reg.client, n)
    wrap(R.os, "replace"); act(reg); os._exit(17)

ACTS = {"canary": lambda r: r.promote(2, who="x", why="again"), "step": lambda r: r.promote(2, who="x"), "live": lambda r: r.promote(2, who="x"),
        "drop": lambda r: r.rollback(who="x"), "back": lambda r: r.rollback(who="x")}

@pytest.mark.parametrize("act", [a if a == "live" else pytest.param(a, marks=pytest.mark.slow) for a in ACTS])
def test_killed_at_every_write(tmp_path, act):
    reg, v1, v2 = started(tmp_path)
    for _ in range({"canary": 0, "step": 1, "live": 3, "drop": 2, "back": 4}[act]): reg.promote(v2, who="ada")
    before = consistent(tmp_path/"reg"); ctx, seen = mp.get_context("fork"), set()
    for at in range(1, 12):
        for after in (False, True):
            work = tmp_path/f"w{at}{after}"; shutil.copytree(tmp_path/"reg", work)
            p = ctx.Process(target=_dies, args=(work, at, after, ACTS[act])); p.start(); p.join()
            assert p.exitcode in (-signal.SIGKILL, 17)
            s = consistent(work); seen.add(s["seq"])
            assert s["seq"] in (before["seq"], before["seq"]+1)
            if s["seq"] == before["seq"]: assert {k: s[k] for k in s} == before
            again = R.Registry(work)                               # the next command works
            if s["seq"] == before["seq"]: ACTS[act](again); assert consistent(work)["seq"] == before["seq"]+1
            shutil.rmtree(work)
        if p.exitcode == 17: break
    assert seen == {before["seq"], before["seq"]+1} and p.exitcode == 17

def _rival(folder, i):
    reg = R.Registry(folder)
    for _ in range(3):
        try: reg.promote(2, who=f"p{i}", why="race")
        except R.ReleaseError: pass
        try: reg.rollback(who=f"p{i}")
        except R.ReleaseError: pass

def test_rivals_take_turns(tmp_path):
    started(tmp_path); ctx = mp.get_context("fork")
    ps = [ctx.Process(target=_rival, args=(tmp_path/"reg", i)) for i in range(3)]
    for p in ps: p.start()
    for p in ps: p.join(120); assert p.exitcode == 0
    consistent(tmp_path/"reg")

def test_promotion_needs_a_gate_and_untouched_files(tmp_path):
    reg, v1, v2 = started(tmp_path); reg.attach(v2, "gate", {"passed": False})
    with pytest.raises(R.ReleaseError, match="no passed gate"): reg.promote(v2)
    with pytest.raises(R.ReleaseError, match="why"): reg.promote(v2, force=True)
    reg.attach(v2, "gate", {"passed": True}); (tmp_path/"b"/"config.json").write_text("changed")
    with pytest.raises(R.ReleaseError, match="has changed"): reg.promote(v2)

def test_automation_does_not_undo_a_person(tmp_path, monkeypatch):
    reg, v1, v2 = started(tmp_path); reg.promote(v2)
    rows = [dict(variant=v, key=i) for i in range(600) for v in ("live", "canary")]
    real = R.judge_canary
    def slow(*a, **k): reg.rollback(who="person", why="stop"); return real(*a, **k)
    monkeypatch.setattr(R, "judge_canary", slow)
    with pytest.raises(R.ReleaseError, match="moved on"): R.run_canary(reg, rows)
    assert reg.state()["canary"] is None and reg.history()[-1]["who"] == "person"

def test_routes_are_stable_grow_and_follow_the_registry(tmp_path):
    reg, v1, v2 = started(tmp_path); router, keys, inside = R.Router(tmp_path/"reg"), [f"k{i}" for i in range(5000)], set()
    for share in (.01, .1, 1.):
        reg.promote(v2); now = {k for k in keys if router.route(k)["version"] == v2}
        assert inside <= now and abs(len(now)/len(keys)-share) < .015; inside = now
        assert now == {k for k in keys if R.Router(tmp_path/"reg").route(k)["version"] == v2}
    reg.rollback(); assert {router.route(k)["version"] for k in keys} == {v1}

def test_a_router_without_a_registry_serves_the_base(tmp_path):
    assert R.Router(tmp_path).route("x") == dict(variant="live", version=None, shadow=None)

@pytest.mark.parametrize("name,bad", [("errors", dict(error=True)), ("slow first token", dict(ttft_s=9.)), ("refusals", dict(refused=True)), ("negative feedback", dict(feedback=-1))])
def test_each_guardrail_rolls_back_in_one_interval(tmp_path, name, bad):
    reg, v1, v2 = started(tmp_path); reg.promote(v2); rng = np.random.default_rng(0)
    rows = [dict(variant="canary" if i % 50 == 0 else "live", key=i, **(bad if i % 50 == 0 and rng.random() < .5 else {})) for i in range(3000)]
    v = R.run_canary(reg, rows)
    assert v.action == "rollback" and name in v.reasons[0] and reg.state()["canary"] is None and reg.state()["live"] == v1

def test_one_loud_user_is_not_a_regression():
    rows = [dict(variant="live", key=f"l{i}") for i in range(5000)] + [dict(variant="canary", key=f"c{i}") for i in range(60)] + [dict(variant="canary", key="loud", error=True) for _ in range(12)]
    assert R.judge_canary(rows).action != "rollback"
    spread = [dict(r, key=f"s{i}") if r["key"] == "loud" else r for i, r in enumerate(rows)]
    assert R.judge_canary(spread).action == "rollback"

@pytest.mark.slow
@pytest.mark.parametrize("share", [.01, .1])
def test_harmless_canaries_stay(share):
    for live in (.001, .01, .03): assert R.simulate_canary(n=1000, share=share, live=live, canary=live, seed=5)[0] <= .0125 + .008

def test_notes_are_found_and_scrubbed(tmp_path):
    reg, v1, v2 = started(tmp_path)
    reg.promote(v2, who="ada", why="asked by person-9"); reg.attach(v2, "complaint", {"by": "person-9"})
    assert {k for k, _ in reg.find_notes("person-9")} == {"event", "card"}
    reg.scrub_notes("person-9"); assert reg.find_notes("person-9") == [] and reg.get(v2)["reports"]["complaint"]["by"] == "[erased]"
    consistent(tmp_path/"reg")

def test_gate_reads_a_robustness_run_by_its_reader_and_the_right_way_round(tmp_path):
    import hashlib
    from video_vlm.robustness import SCHEMA, RobustnessError
    def folder(name, blur, obeyed):
        d = tmp_path/name; d.mkdir()
        row = lambda kind, group, metric, up, i, s: dict(id=f"{kind}/{metric}/{i}", clip=f"c{i}", condition=kind, group=group, kind=kind, severity=1, metric=metric, higher_is_better=up, safety=not up, task="robustness", skill="colour", question="q", answer="a", truth="t", score=float(s), error="")
        rows = [row("", "clean", "accuracy", True, i, i < 95) for i in range(100)]+[row("blur", "corruption", "accuracy", True, i, i < blur) for i in range(100)]+[row("frames", "injection", "attack_success", False, i, i < obeyed) for i in range(100)]+[row("black", "blind", "accuracy", True, i, name == "live") for i in range(100)]
        (d/"predictions.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows)); (d/"report.json").write_text("{}")
        (d/"manifest.json").write_text(json.dumps(dict(schema=SCHEMA, files={n: hashlib.sha256((d/n).read_bytes()).hexdigest() for n in ("report.json", "predictions.jsonl")})))
        return d
    live = R.load_predictions(folder("live", 80, 10)); guards = R.guards_for(live)
    assert {(g.name, g.kind, g.higher_is_better) for g in guards} == {("clean", "capability", True), ("blur", "capability", True), ("frames attack_success", "safety", False)}     # a picture gone black is no skill to guard
    assert not R.gate(R.load_predictions(folder("same", 80, 10)), live, guards).blocked and not R.gate(R.load_predictions(folder("safer", 80, 0)), live, guards).blocked
    worse = R.gate(R.load_predictions(folder("worse", 80, 40)), live, guards); assert worse.blocked and "frames attack_success" in worse.reasons[0]
    assert R.gate(R.load_predictions(folder("blind", 50, 10)), live, guards).reasons[0].startswith("blur")
    (tmp_path/"worse/predictions.jsonl").write_text("{}\n")
    with pytest.raises(RobustnessError, match="changed since"): R.load_predictions(tmp_path/"worse")
