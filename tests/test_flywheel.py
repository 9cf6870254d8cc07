"Mining, labels, data set versions and parity, with other seeds than the notebook's."
import json, random
from fractions import Fraction
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from video_vlm import flywheel as F
from video_vlm.data import Sample, write_video
from video_vlm.dedup import DedupConfig
from video_vlm.splits import load_splits

def rows(n=3000, seed=0, dark=.04):
    rng = np.random.default_rng(seed); out = []
    for i in range(n):
        d = rng.random() < dark; wrong = rng.random() < (.6 if d else .08)
        out.append(dict(id=f"r{i}", video=f"v{i%2000}", person="p", tenant="t", consent=True, condition="dark" if d else "day", question="?", answer="red", wrong=wrong,
                        feedback=-1 if wrong and rng.random() < .3 else 0, shadow="blue" if wrong and rng.random() < .7 else "red", confidence=float(np.clip(rng.normal(.5 if wrong else .85, .15), 0, 1))))
    return out

@pytest.mark.parametrize("seed", range(4))
def test_a_rare_condition_is_mined_at_five_times_its_rate(seed):
    rs = rows(seed=seed); cases = F.mine(rs, F.FlywheelConfig(seed=seed, budget=120), train_share={"day": 1.})
    assert F.lift(cases, rs, lambda r: r["condition"] == "dark") >= 5 and len(cases) == 120

def test_the_explored_share_is_uniform_and_carries_its_chance():
    rs = rows(1000); seen = np.zeros(1000)
    for s in range(100):
        for c in F.mine(rs, F.FlywheelConfig(budget=200, explore=.5, seed=s)):
            if c.why == ("explore",): seen[int(c.row["id"][1:])] += 1; assert c.propensity == .1
    assert abs(seen.mean()-10) < 1e-9 and seen.std() < 4.5 and abs(seen[[r["wrong"] for r in rs]].mean()-10) < 1.5

def test_budget_and_videos_are_capped():
    rs = [dict(r, video="same") for r in rows(200)]; assert len(F.mine(rs, F.FlywheelConfig(budget=50, explore=0.))) == 2
    assert F.mine([], F.FlywheelConfig()) == [] and len(F.mine(rows(5), F.FlywheelConfig())) <= 5

def test_diversity_spreads_over_clusters():
    rs = [dict(id=f"{i}", video=f"v{i}", condition="", answer="", confidence=.1 if i < 90 else .3) for i in range(100)]
    x = np.array([[1., 0.]]*90+[[0., 1.]]*10)+np.random.default_rng(0).normal(0, .02, (100, 2))
    share = lambda d: np.mean([int(c.row["id"]) >= 90 for c in F.mine(rs, F.FlywheelConfig(budget=10, explore=0., diversity=d), embeddings=x)])
    assert share(0.) == 0 and share(.9) >= .3

def test_without_consent_or_under_a_tombstone_nothing_is_used(tmp_path):
    t = F.Tombstones(tmp_path/"t.jsonl"); t.add(F.Subject("person", "bob")); t.add(F.Subject("video", "v9"))
    rs = [dict(consent=True, person="ann", video="v1", question="mail me: x@y.org"), dict(consent=True, person="bob", video="v1"), dict(consent=True, person="ann", video="v9"), dict(consent=False, person="ann", video="v1")]
    got = F.usable(rs, t); assert len(got) == 1 and "x@y.org" not in got[0]["question"]

@given(st.sampled_from(["24", "25", "30", "30000/1001", "24000/1001", "60000/1001", "12.5", "15"]), st.floats(0, 4*3600))
@settings(max_examples=300, deadline=None)
def test_moments_survive_the_round_trip_within_half_a_frame(rate, t):
    assert abs(F.to_seconds(F.to_frame(t, rate), rate)-t) <= .5/float(Fraction(rate))+1e-6

def test_label_studio_round_trip_and_the_wrong_rate_is_refused():
    case = F.Case(dict(id="r", video="v", question="When?", rate="30000/1001", spans=[(1., 2.)]), 1., ())
    task = F.to_label_studio([dict(case=case, label="then", agreement=1., by="model")])[0]
    done = json.loads(json.dumps(F.annotate(F.annotate(task, "a", "then", [(1.5, 3600.)]), "b", "no")))
    done["annotations"].append(dict(completed_by="c", was_cancelled=True, result=[]))
    got = F.from_label_studio([done]); assert [g["annotator"] for g in got] == ["a", "b"] and abs(got[0]["spans"][0][1]-3600) < .02
    done["data"]["framerate"] = 30.
    with pytest.raises(F.FlywheelError, match="drift"): F.from_label_studio([done])

def test_gold_is_hidden_measures_people_and_weighs_their_votes():
    rng = random.Random(0); tasks = F.to_label_studio([dict(case=F.Case(dict(id=f"r{i}", video="v", question="?"), 1., ()), label="x", agreement=1., by="m") for i in range(300)])
    gold = [dict(task={**t, "data": {**t["data"], "id": f"z{i}"}}, answer="yes") for i, t in enumerate(tasks[:60])]
    queue, key = F.with_gold(tasks, gold, .2); assert len(queue) == 360 and len(key) == 60 and all(set(q["data"]) == set(tasks[0]["data"]) for q in queue)
    skill = dict(good=.97, fair=.85, coin=.5)
    for who, s in skill.items(): queue = [F.annotate(t, who, "yes" if rng.random() < s else "no") for t in queue]
    labels = F.from_label_studio(queue); q = F.annotator_quality(labels, key)
    assert all(q[w][1] <= s <= q[w][2] for w, s in skill.items())
    good, again = F.settle(labels, q, key); assert len(good)+len(again) == 300 and not {g["id"] for g in good} & key.keys()
    assert np.mean([g["answer"] == "yes" for g in good]) > .95

def test_next_data_set_keeps_sides_and_puts_near_duplicates_where_they_belong(tmp_path):
    raw = tmp_path/"raw"; raw.mkdir(); cfg = DedupConfig(workers=1, progress=False)
    def clip(name, seed, crf=23): write_video(raw/name, np.kron(np.random.default_rng(seed).integers(0, 255, (12, 6, 8, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8), fps=5, crf=crf); return raw/name
    def s(id, p): return Sample(id, [dict(role="user", content=[dict(type="video", video=str(p)), dict(type="text", text="?")]), dict(role="assistant", content=[dict(type="text", text="red")])])
    F.next_dataset(tmp_path/"v1", [s(f"a{i}", clip(f"{i}.mp4", i)) for i in range(8)], dedup_cfg=cfg); old = load_splits(tmp_path/"v1/01a_splits")
    lin = F.Lineage(tmp_path/"lineage.jsonl")
    copies = [s(f"c{i}", clip(f"copy{i}.mp4", i, 30)) for i in range(8)]
    card = F.next_dataset(tmp_path/"v2", copies, previous=tmp_path/"v1", lineage=lin, dedup_cfg=cfg); new = load_splits(tmp_path/"v2/01a_splits")
    assert all(new[k] == v for k, v in old.items()) and len(new) == 16
    from collections import Counter
    assert Counter(new.values()) == Counter({k: 2*v for k, v in Counter(old.values()).items()})        # each copy beside its original
    assert card["samples"] == 16 and f"dataset:{card['version']}" in lin.closure({next(iter(new))})[1]

def test_parity_finds_the_planted_difference():
    rng = np.random.default_rng(0); toks = {i: rng.normal(size=(2, 4, 8)).astype(np.float16) for i in range(50)}
    logged = [dict(video=i, token_hash=F.token_hash(t if i != 7 else np.nextafter(t, np.float16(9)))) for i, t in toks.items()]
    assert [d["row"]["video"] for d in F.check_parity(logged, lambda r: toks[r["video"]])] == [7]
    assert .005 < np.mean([F.in_parity_sample(i) for i in range(20000)]) < .015

@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_loop_with_other_seeds(tmp_path, seed):
    r = F.flywheel_demo(tmp_path, seed)
    assert r["lift"] >= 5 and r["after"]["dark"]-r["before"]["dark"] >= .1 and r["bad_candidate"]["blocked"] and r["candidate"]["live"] and r["online_regression"]["canary"] == [(1, "rollback")]
