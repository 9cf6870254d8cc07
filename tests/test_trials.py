"Experiments on a running server: over real HTTP, with the in-process engine."
import json, threading
import httpx, numpy as np, pytest
from typer.testing import CliRunner
from test_gateway import place, user  # noqa: F401 (place is a fixture)
from test_gateway_traffic import adapters, opened, wait  # noqa: F401
from video_vlm import trials as T
from video_vlm.cli import app
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

def test_a_server_runs_a_trial_and_it_is_read(place, adapters):
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
        out = CliRunner().invoke(app, ["experiment", str(folder), "--name", "tuned", "--variants", "base=0.5,tuned=0.5", "--metric", "liked/requests"]).output
        assert "tuned" in out and "better" in out, out
        file.write_text(json.dumps(dict(experiments=[]))); assert wait(lambda: "variant" not in asked(1).model_extra["video_vlm"])   # ended without a restart
        file.write_text("{"); assert "variant" not in asked(1).model_extra["video_vlm"]                                           # a bad edit changes nothing
    with pytest.raises(VideoVLMError, match="not readable"):
        with opened(place, "trial", experiments=str(file)): pass

def test_a_folder_without_a_trial_is_said(tmp_path):
    r = CliRunner().invoke(app, ["experiment", str(tmp_path), "--name", "x", "--variants", "a=0.5,b=0.5", "--metric", "liked"])
    assert "no trial ran" in str(r.exception)
