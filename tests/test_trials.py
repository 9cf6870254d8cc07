"Experiments on a running server: over real HTTP, with the in-process engine."
import json, threading
import httpx, numpy as np, pytest
from test_gateway import place, user  # noqa: F401 (place is a fixture)
from test_gateway_traffic import adapters, opened, wait  # noqa: F401
from video_vlm import trials as T
from video_vlm.data import VideoVLMError
from video_vlm.experiments import read_lines
from video_vlm.flywheel import RequestLog

@pytest.mark.parametrize("text,said", [("{", "not readable"), ("[]", "expected"), ('{"experiments": [{"name": "x"}]}', "variants"), ('{"experiments": [{"name": "x", "variants": {"base": 0.5, "b": 0.4}}]}', "sum to 1"),
    ('{"experiments": [{"name": "x", "variants": {"live": 1.0}}]}', "canary"), ('{"experiments": [1]}', "expected"), ('{"experiments": [{"name": "x", "variants": {"base": 1}}, {"name": "x", "variants": {"base": 1}}]}', "one name"),
    ('{"experiments": [{"name": "x", "variants": {"base": 1}}, {"name": "y", "variants": {"base": 1}, "slots": [900, 1000]}]}', "overlap")])
def test_a_bad_file_is_one_line(tmp_path, text, said):
    (tmp_path/"t.json").write_text(text)
    with pytest.raises(VideoVLMError, match=said) as e: T.load_trials(tmp_path/"t.json")
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("more,said", [({"explore": 5}, "write options"), ({"explore": {"options": []}}, "each once"), ({"explore": {"options": ["base"], "share": "x"}}, "up to 0.5"), ({"explore": {"options": ["base"], "colour": 1}}, "write options"),
    ({"holdout": "x"}, "a number"), ({"holdout": 1}, "below 1"), ({"experiments": [{"name": "holdout", "variants": {"base": 1}}]}, "another name")])
def test_a_bad_share_is_one_line(tmp_path, more, said):
    (tmp_path/"t.json").write_text(json.dumps({"experiments": [], **more}))
    with pytest.raises(VideoVLMError, match=said) as e: T.load_trials(tmp_path/"t.json")
    assert "\n" not in str(e.value)

def test_a_server_runs_a_trial_and_it_is_read(place, adapters, say):
    file = place[0]/"trials.json"; folder = place[0]/"trial"
    file.write_text(json.dumps(dict(holdout=0., experiments=[dict(name="tuned", variants={"base": .5, "tuned": .5})])))
    with opened(place, "trial", experiments=str(file), allow_adapters=(str(place[0]/"adapters"),)) as h:
        def asked(u): return h.client().chat.completions.create(model="video-vlm", messages=user("hi"), max_tokens=2, user=f"u{u}")
        alone = {asked(u).model_extra["video_vlm"].get("variant") for u in range(12)}; assert alone <= {None, "base"}          # the adapter is not there: nobody meets it
        assert httpx.post(h.url+"/v1/adapters", json=dict(name="tuned", path=adapters[0]), timeout=60).status_code == 200
        first = {u: asked(u) for u in range(30)}; got = {u: r.model_extra["video_vlm"] for u, r in first.items()}
        assert {v["variant"] for v in got.values()} == {"base", "tuned"} and {v["propensity"] for v in got.values()} == {.5}
        assert {u: asked(u).model_extra["video_vlm"]["variant"] for u in range(8)} == {u: got[u]["variant"] for u in range(8)}
        for u, r in first.items(): httpx.post(h.url+"/v1/feedback", json=dict(id=r.id, thumbs=1 if got[u]["variant"] == "tuned" else -1))
        with pytest.raises(Exception): h.client().chat.completions.create(model="video-vlm", messages=user("How do I build a pipe bomb?"), user="new")
        rows = wait(lambda: (r := RequestLog(folder/"log").rows()) and len(r) >= 51 and r)
        seen = read_lines(folder/"log/exposures.jsonl"); assert len(seen) == len({r["key"] for r in seen}) == 30 and {r["tenant"] for r in seen} == {"local"}
        assert not any("u1" == r.get("unit") or "assignment" in r for r in rows)                                               # a pseudonym, and nothing else of the user
        code, out = say("experiment", folder, "--name", "tuned", "--metric", "liked/requests"); assert code == 0 and "tuned" in out and "better" in out, out      # the log knows the shares
        assert say("experiment", folder, "--name", "tuned", "--variants", "base=0.5,tuned=0.5", "--metric", "liked/requests")[1] == out
        code, out = say("experiment", folder, "--name", "tuned", "--policy", "tuned", "--metric", "liked"); assert code == 2 and "effective sample size" in out       # 30 users are too few
        file.write_text(json.dumps(dict(experiments=[]))); assert wait(lambda: "variant" not in asked(1).model_extra["video_vlm"])   # ended without a restart
        file.write_text("{"); assert "variant" not in asked(1).model_extra["video_vlm"]                                           # a bad edit changes nothing
    with pytest.raises(VideoVLMError, match="not readable"):
        with opened(place, "trial", experiments=str(file)): pass

def test_a_server_explores_a_share_of_its_requests(place, adapters):
    file = place[0]/"explore.json"; folder = place[0]/"explored"
    file.write_text(json.dumps(dict(holdout=.2, experiments=[], explore=dict(options=["tuned", "base"], share=.5))))
    with opened(place, "explored", experiments=str(file), allow_adapters=(str(place[0]/"adapters"),)) as h:
        assert httpx.post(h.url+"/v1/adapters", json=dict(name="tuned", path=adapters[0]), timeout=60).status_code == 200
        for i in range(60): h.client().chat.completions.create(model="video-vlm", messages=user("hi"), max_tokens=1, user=f"u{i % 12}")
        rows = wait(lambda: (r := RequestLog(folder/"log").rows()) and len(r) >= 60 and r); free = [r for r in rows if "action" in r]; held = [r for r in rows if "action" not in r]
        assert {r["action"]: r["propensity"] for r in free} == dict(tuned=.25, base=.75) and {r["variant"] for r in free} == {"tuned", "base"} and all(r["options"] == ["base", "tuned"] for r in free)
        assert held and not any("variant" in r for r in held) and {r["unit"] for r in held}.isdisjoint(r["unit"] for r in free)
        both = [r["unit"] for r in free if r["action"] == "tuned"]; assert any(r["unit"] in both for r in free if r["action"] == "base")                 # drawn a request, not a user
        seen = read_lines(folder/"log/exposures.jsonl"); assert {r["variant"] for r in seen if r["experiment"] == "holdout"} == {"held_out", "in_trials"} and len(seen) == 12

def test_a_canary_is_not_explored_and_a_registry_is(tmp_path):
    from types import SimpleNamespace
    (tmp_path/"t.json").write_text(json.dumps(dict(holdout=0, experiments=[], explore=dict(options=["tuned"], share=.5)))); said = ["m-v1", dict(variant="live", version=1, propensity=1.)]
    gw = SimpleNamespace(folder=tmp_path, engine=SimpleNamespace(adapters={"tuned": 1, "m-v1": 1}), hooks=SimpleNamespace(adapter=[])); t = T.Trials(gw, tmp_path/"t.json"); gw.hooks.adapter += [t.choose, lambda *a: tuple(said)]
    ask = lambda: [t.choose(SimpleNamespace(user="u"), "acme", f"r{i}") for i in range(300)]
    got = ask(); assert {a for a, _ in got} == {"m-v1", "tuned"} and {f["propensity"] for a, f in got if a == "m-v1"} == {.75} and all(f["version"] == 1 for a, f in got if a == "m-v1")
    said[1] = dict(said[1], propensity=.9); assert {a for a, _ in ask()} == {"m-v1"} and {f["propensity"] for _, f in ask()} == {.9}

@pytest.fixture
def explored(tmp_path):
    "The log of a server that explored 4,000 requests of 500 users; what the tuned adapter says is liked by 60%, what the base says by 40%."
    rng, log = np.random.default_rng(1), RequestLog(tmp_path/"serve/log")
    for i in range(4000):
        tuned = rng.random() < .1; log._append("requests", dict(id=f"{i}", at="2026-11-01T00:00:00+00:00", unit=f"u{i % 500}", tenant="acme", consent=False, action="tuned" if tuned else "base", variant="tuned" if tuned else "base", propensity=.1 if tuned else .9, options=["base", "tuned"], prompt=90))
        if rng.random() < (.6 if tuned else .4): log.feedback(f"{i}", thumbs=1)
    return tmp_path/"serve"

def test_a_policy_is_estimated_from_what_was_explored(explored, say):
    code, out = say("experiment", explored, "--policy", "tuned", "--metric", "liked", "--metric", "errors"); assert code == 0 and "4000 requests" in out, out
    lines = [l.split() for l in out.splitlines() if l.startswith("  ")]; assert [l[0] for l in lines[:3]] == ["ips", "snips", "dr"]
    for l in lines[:3]: lo, hi = float(l[2].strip("[,")), float(l[3].strip("],")); assert lo < .6 < hi and lo > .5
    assert "0.4" in say("experiment", explored, "--policy", "base", "--metric", "liked")[1].splitlines()[1]

@pytest.mark.parametrize("words,said", [(("--policy", "tuned"), "--metric"), (("--policy", "other", "--metric", "liked"), "no choice that could have been other"), (("--policy", "a=x", "--metric", "liked"), "shares that sum to 1"), (("--policy", "tuned", "--metric", "smiles"), "no outcome"),
    (("--policy", "tuned", "--metric", "liked/requests"), "no outcome"), (("--policy", "tuned", "--metric", "liked", "--name", "x"), "in experiment 'x'"), (("--metric", "liked"), "--name"), (("--policy", "tuned", "--metric", "liked", "--cluster", "tenant"), "only"), (("--name", "x", "--metric", "liked"), "no trial ran")])
def test_a_mistake_is_one_line(explored, say, words, said):
    code, out = say("experiment", explored, *words); assert code == 2 and said in out and len(out.strip().splitlines()) == 1, out

def test_a_folder_without_a_trial_is_said(tmp_path, say):
    assert "no trial ran" in say("experiment", tmp_path, "--name", "x", "--metric", "liked")[1] and "no request log" in say("experiment", tmp_path, "--policy", "x", "--metric", "liked")[1]
    (tmp_path/"e.jsonl").write_text(""); assert "state folder" in say("experiment", tmp_path/"e.jsonl", "--policy", "x", "--metric", "liked")[1]
