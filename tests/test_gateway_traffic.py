"What runs beside an answer: safety layers, adapters at run time, router and canary, request log, feedback, shadow, sinks, search. Over real HTTP, with the in-process engine."
import asyncio, contextlib, json, threading, time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import pytest
import torch
from openai import BadRequestError

from test_gateway import House, ask, counted, place, user  # noqa: F401 (place is a fixture)
from video_vlm.gateway import ApiError, Safety, Verdict, cascade, config_from, GatewayConfig, list_keys, load_safety, make_key, revoke_key, run_check, word_check
from video_vlm.data import VideoVLMError


@contextlib.contextmanager
def opened(place, name, **kw):
    h = House(place[0] / name, place[1], place[0] / "clips", **kw)
    try: yield h
    finally: h.close()

@pytest.fixture(scope="module")
def adapters(place):
    "Two random adapters with projectors of their own."
    from video_vlm.model import add_lora, load_model, save_adapter
    out = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, _ = load_model(place[1])
        add_lora(model, r=4)
        for n, p in model.named_parameters():
            if ".lora_B" in n or n.startswith("projector."): p.data += torch.randn_like(p) * .2
        out.append(str(save_adapter(model, place[0] / "adapters" / f"v{seed}")))
    return out

def wait(what, seconds=120):
    until = time.time() + seconds
    while time.time() < until:
        if (got := what()): return got
        time.sleep(.05)
    raise AssertionError("waited in vain")


def test_frames_are_looked_at_once_and_by_threshold(place):
    looks = []
    def red(frames): looks.append(len(frames)); return Verdict(False, "red", .8)
    safety = Safety(frames=red, thresholds=(("strict", "frames", .5), ("", "", .9)))
    with opened(place, "frames", safety=safety) as h:
        mild, strict = make_key(h.gw.book, "mild"), make_key(h.gw.book, "strict")
        url = f"file://{place[2][0]}"
        ask(h, "x", url, key=mild); ask(h, "y", url, key=mild)
        assert len(looks) == 1                                     # the second time the book knows
        decodes = counted(h, "video_vlm_decodes_total")
        asked, real = [], h.gw.engine.generate
        h.gw.engine.generate = lambda r: asked.append(r) or real(r)
        for _ in range(2):
            with pytest.raises(BadRequestError, match="safety check"): ask(h, "x", url, key=strict)
        assert not asked and len(looks) == 2 and counted(h, "video_vlm_decodes_total") == decodes + 1

def test_sparse_plans_are_still_looked_at_every_few_seconds(place):
    looks = []
    def count(frames): looks.append(len(frames)); return Verdict()
    with opened(place, "sparse", safety=Safety(frames=count, every_s=2.), sync_seconds=60.) as h:
        ask(h, "x", f"file://{place[3]}", fps=.1)                  # 12 s, one or two frames for the encoder
        assert looks[0] >= 6

def test_transcript_is_billed_checked_and_seen(place):
    with opened(place, "said") as h:
        part = lambda t: dict(type="transcript", segments=[dict(start=0, end=1, text=t)])
        msg = lambda t: [dict(role="user", content=[dict(type="video_url", video_url=dict(url=f"file://{place[2][0]}")), part(t), dict(type="text", text="What is said?")])]
        r = h.client().chat.completions.create(model="video-vlm", messages=msg("the red circle moves"), max_tokens=3)
        d = r.usage.prompt_tokens_details.model_dump()
        assert d["audio_tokens"] > 3 and d["text_tokens"] + d["audio_tokens"] + d["video_tokens"] == r.usage.prompt_tokens
        assert httpx.get(h.url + "/v1/usage").json()["data"][0]["audio"] == d["audio_tokens"]
        with pytest.raises(BadRequestError, match="what is said"): h.client().chat.completions.create(model="video-vlm", messages=msg("how to build a pipe bomb"), max_tokens=3)

def test_output_is_stopped_while_it_streams(place):
    seen = []
    def output(text): seen.append(text); return Verdict(False, "said", 1.)
    with opened(place, "output", safety=Safety(output=output)) as h:
        with httpx.stream("POST", h.url + "/v1/chat/completions", json=dict(messages=user("hi"), max_tokens=40, stream=True), timeout=60) as r: lines = [l for l in r.iter_lines() if l]
        assert json.loads(lines[-2][6:])["error"]["code"] == "content_filter" and lines[-1] == "data: [DONE]"

def test_a_guard_model_is_asked_only_when_needed_and_its_absence_blocks():
    said = []
    class Guard(BaseHTTPRequestHandler):
        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][0]["content"]; said.append(text)
            body = json.dumps(dict(choices=[dict(message=dict(content="unsafe\nS9" if "evil" in text else "safe"))])).encode()
            self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
        def log_message(self, *a): pass
    s = HTTPServer(("127.0.0.1", 0), Guard); threading.Thread(target=s.serve_forever, daemon=True).start()
    check = load_safety([("prompt", f"llama_guard:http://127.0.0.1:{s.server_port}/v1|guard")]).prompt
    try:
        assert asyncio.run(run_check(check, "evil plan")) == Verdict(False, "S9", 1.) and asyncio.run(run_check(check, "a dog")).ok
        assert asyncio.run(run_check(check, "how to build a pipe bomb")).reason == "weapons" and len(said) == 2   # the patterns answered
        second = lambda t: Verdict()
        assert asyncio.run(run_check(cascade(word_check, second), "make a bomb")).ok                             # the accurate one has the last word
    finally: s.shutdown(); s.server_close()
    with pytest.raises(ApiError) as e: asyncio.run(run_check(check, "a dog"))
    assert e.value.status == 503


def test_adapters_come_and_go(place, adapters):
    with opened(place, "adapters", allow_adapters=(str(place[0] / "adapters"),)) as h:
        post = lambda **kw: httpx.post(h.url + "/v1/adapters", json=kw, timeout=60)
        assert post(name="tuned", path="/etc").status_code == 403
        assert post(name="../x", path=adapters[0]).status_code == 400
        base = ask(h, "What happens?", f"file://{place[2][0]}").choices[0].message.content
        assert post(name="tuned", path=adapters[0]).status_code == 200 and post(name="tuned", path=adapters[1]).status_code == 409
        one = lambda model: h.client().chat.completions.create(model=model, messages=user("What happens?", f"file://{place[2][0]}"), max_tokens=6).choices[0].message.content
        assert one("tuned") != base and one("video-vlm") == base
        assert "tuned" in [m.id for m in h.client().models.list()]
    with opened(place, "adapters", allow_adapters=(str(place[0] / "adapters"),)) as h:               # remembered over a restart
        assert "tuned" in [m.id for m in h.client().models.list()]
        make_key(h.gw.book, "acme")
        key = make_key(h.gw.book, "operator")
        assert httpx.delete(h.url + "/v1/adapters/tuned").status_code == 401
        assert httpx.delete(h.url + "/v1/adapters/tuned", headers=dict(authorization=f"Bearer {make_key(h.gw.book, 'acme')}")).status_code == 403
        assert httpx.delete(h.url + "/v1/adapters/tuned", headers=dict(authorization=f"Bearer {key}")).status_code == 200
        assert httpx.delete(h.url + "/v1/adapters/tuned", headers=dict(authorization=f"Bearer {key}")).status_code == 404

def test_canary_grows_and_goes_back_while_it_serves(place, adapters):
    folder = place[0] / "registry"; folder.mkdir()
    def state(seq, percent=0, **kw):
        s = dict(seq=seq, live=1, canary=2 if percent else None, percent=percent, salt="canary-2-1", previous=[], since="", shadow=None, shadow_share=0., model="video-vlm", checkpoints={"1": place[1], "2": adapters[0], "3": adapters[1]}, **kw)
        if not percent: s["checkpoints"].pop("2")
        (folder / "s.tmp").write_text(json.dumps(s)); (folder / "s.tmp").replace(folder / "serving.json")
    state(1)
    with opened(place, "canary", registry=str(folder)) as h:
        def who_(n=30): return [h.client().chat.completions.create(model="video-vlm", messages=user("hi"), max_tokens=2, user=f"u{i}", store=True).model_extra["video_vlm"] for i in range(n)]
        assert {w["variant"] for w in who_(5)} == {"live"}
        state(2, 50); wait(lambda: 2 in h.gw.router.names)
        loaded = h.gw.router.names[2]
        half = who_()
        canary = {i for i, w in enumerate(half) if w["variant"] == "canary"}
        assert 5 < len(canary) < 25 and {w["propensity"] for w in half} == {.5}
        assert {i for i, w in enumerate(who_()) if w["variant"] == "canary"} == canary               # the same users
        state(3, 100); wait(lambda: h.gw.router.seq == 3)
        assert {w["version"] for w in who_(5)} == {2}
        h.gw.router.grace = 0.
        state(4); wait(lambda: 2 not in h.gw.router.names)                                            # rolled back
        assert {w["variant"] for w in who_(5)} == {"live"}
        wait(lambda: loaded not in h.gw.engine.adapters)
        from video_vlm.flywheel import RequestLog
        from video_vlm.release import CanaryConfig, GUARDRAILS, judge_canary
        rows = RequestLog(place[0] / "canary" / "log").rows()
        patient = tuple(replace(g, value=lambda r: float(r["ttft_s"] > 120.)) if g.name == "slow first token" else g for g in GUARDRAILS)      # the real times, against a limit that no load on this machine reaches: at 2 s a busy minute during the canary would be a true alarm
        verdict = judge_canary(rows, CanaryConfig(guardrails=patient))
        assert {r["variant"] for r in rows} == {"live", "canary"} and all(0 < r["ttft_s"] <= r["total_s"] for r in rows) and verdict.action == "wait" and not any(t["bad"] for t in verdict.table)

def test_a_version_that_cannot_be_served_is_answered_by_live(place, adapters, tmp_path):
    s = dict(seq=1, live=1, canary=2, percent=100, salt="x", previous=[], since="", shadow=None, shadow_share=0., model="m", checkpoints={"1": place[1], "2": str(tmp_path)})
    folder = place[0] / "registry2"; folder.mkdir(); (folder / "serving.json").write_text(json.dumps(s))
    with opened(place, "lame", registry=str(folder)) as h:
        r = ask(h, "hi").model_extra["video_vlm"]
        assert (r["variant"], r["version"]) == ("live", 1) and 2 in h.gw.router.bad

def test_log_keeps_content_only_with_consent_and_feedback_finds_its_row(place, adapters):
    s = dict(seq=1, live=1, canary=None, percent=0, salt="", previous=[], since="", shadow=3, shadow_share=1., model="m", checkpoints={"1": place[1], "3": adapters[1]})
    folder = place[0] / "registry3"; folder.mkdir(); (folder / "serving.json").write_text(json.dumps(s))
    with opened(place, "log", registry=str(folder)) as h:
        url = f"file://{place[2][0]}"
        yes, no = ask(h, "Which colour, jane@x.org?", url, store=True), ask(h, "A secret?", url)
        with pytest.raises(BadRequestError): ask(h, "How do I build a pipe bomb?")
        log = wait(lambda: (r := h.gw.hooks.answered[0].__self__.log.rows()) and len(r) == 3 and r)
        by = {r["id"]: r for r in log}
        y, n = by[yes.id.removeprefix("chatcmpl-")], by[no.id.removeprefix("chatcmpl-")]
        assert "[email]" in y["question"] and y["shadow_version"] == 3 and isinstance(y["shadow"], str)
        assert 0 < y["confidence"] <= 1 and "confidence" not in n
        assert not {"question", "answer", "video", "shadow"} & n.keys() and n["shadow_agrees"] in (True, False)
        assert sum(r["refused"] for r in log) == 1
        f = lambda **kw: httpx.post(h.url + "/v1/feedback", json=kw).status_code
        assert f(id=yes.id, thumbs=-1, edit="blue") == 202 and f(id="chatcmpl-nope", thumbs=1) == 404 and f(id=yes.id, thumbs=7) == 400
        row = next(r for r in h.gw.hooks.answered[0].__self__.log.rows() if r["id"] == y["id"])
        assert row["feedback"] == -1 and row["edit"] == "blue"
        assert sum(r["requests"] for r in httpx.get(h.url + "/v1/usage").json()["data"]) == 2          # the shadow is billed to nobody
        gone = h.gw.forget(y["video"], "local")
        assert gone["log_rows"] == 1 and gone["tokens"] >= 1

def test_tokens_are_made_again_offline_and_a_planted_difference_is_found(place, monkeypatch):
    from video_vlm import traffic
    from video_vlm.flywheel import RequestLog
    monkeypatch.setattr(traffic, "in_parity_sample", lambda id: True)
    with opened(place, "parity", sync_seconds=60.) as h:
        f = httpx.post(h.url + "/v1/files", files=dict(file=open(place[3], "rb")), data=dict(purpose="vision"), timeout=60).json()["id"]
        for q, kw in (("What?", dict(store=True)), ("When?", dict(store=True, start=2., end=6.)), ("Who?", {})): ask(h, q, f, **kw)
        folder = place[0] / "parity"; wait(lambda: len(RequestLog(folder / "log").rows()) == 3)
        rows, differ = traffic.parity(folder, h.gw.encoder, progress=False); assert len(rows) == 2 and not differ
        log = folder / "log/requests.jsonl"; log.write_text(log.read_text().replace(rows[1]["token_hash"], "0" * 64))
        rows, differ = traffic.parity(folder, h.gw.encoder, progress=False); assert [d["row"]["id"] for d in differ] == [rows[1]["id"]]
        assert len(traffic.parity(folder, h.gw.encoder, limit=1, progress=False)[0]) == 1

def test_sinks_get_every_event_once(place):
    out = place[0] / "sink" / "events.jsonl"
    for part in range(2):
        with opened(place, "sink", sinks=(f"jsonl:{out}",)) as h:
            for i in range(3): ask(h, f"hi {part} {i}")
            book = [r["id"] for r in h.gw.book.run("select id from usage order by rowid")]
    assert [json.loads(l)["id"] for l in out.read_text().splitlines()] == book and len(book) == 6

def test_search_finds_erases_and_keeps_tenants_apart(place):
    with opened(place, "search") as h:
        a, b = ({"authorization": f"Bearer {make_key(h.gw.book, t)}"} for t in ("a", "b"))
        f = httpx.post(h.url + "/v1/files", files=dict(file=open(place[3], "rb")), data=dict(purpose="vision"), headers=a, timeout=60).json()
        job = httpx.post(h.url + "/v1/videos", json=dict(file_id=f["id"], captions=["a football match"], transcript=[dict(start=4, end=6, text="what a wonderful goal")]), headers=a, timeout=60).json()
        wait(lambda: httpx.get(f"{h.url}/v1/videos/{job['id']}", headers=a).json()["status"] == "done")
        find = lambda q, who, **kw: httpx.post(h.url + "/v1/search", json=dict(query=q, **kw), headers=who, timeout=60).json()["data"]
        hits = find("wonderful goal", a)
        assert hits[0]["file_id"] == f["id"] and "wonderful" in hits[0]["text"] and hits[0]["start"] <= 6 and hits[0]["end"] >= 4
        assert find("wonderful goal", b) == [] and find("goal", a, videos=["nothing"]) == [] and find("goal", a, videos=[f["id"]])
        erased = httpx.delete(f"{h.url}/v1/files/{f['id']}", headers=a, timeout=60).json()["video_vlm"]["erased"]
        assert erased["index_rows"] >= 2 and erased["files"] >= 1 and find("wonderful goal", a) == []
        assert httpx.post(h.url + "/v1/search", json=dict(query=""), headers=a).status_code == 400

def test_keys_and_configuration(place, tmp_path):
    from video_vlm.gateway import Book
    book = Book(tmp_path / "g.db"); key = make_key(book, "acme", "laptop"); make_key(book, "acme")
    rows = list_keys(book)
    assert rows[0]["name"] == "laptop" and key not in json.dumps(rows)
    revoke_key(book, rows[0]["id"])
    assert [bool(r["revoked"]) for r in list_keys(book)] == [True, False]
    with pytest.raises(VideoVLMError, match="no such key"): revoke_key(book, "0" * 12)
    assert config_from(GatewayConfig, dict(tenant_limits=[["a", 1, 2]])).tenant_limits == (("a", 1, 2),)
    for bad in (dict(prot=1), dict(port=99999), dict(allow_files=["/no/such"])):
        with pytest.raises(VideoVLMError): config_from(GatewayConfig, bad)

def test_limits_by_tenant(place):
    with opened(place, "by_tenant", tenant_limits=(("small", 1, 1),)) as h:
        s, b = make_key(h.gw.book, "small"), make_key(h.gw.book, "big")
        codes = [httpx.post(h.url + "/v1/chat/completions", json=dict(messages=user("x"), max_tokens=1), headers=dict(authorization=f"Bearer {k}"), timeout=60).status_code for k in (s, s, b, b)]
        assert codes == [200, 429, 200, 200]

def test_traces_have_the_phases_and_no_content(place, monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from video_vlm import gateway
    out, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(out))
    monkeypatch.setattr(gateway, "_tracer", lambda: provider.get_tracer("test"))
    with opened(place, "traces") as h: ask(h, "a secret question", f"file://{place[2][1]}", stream=False)
    spans = {s.name: s for s in out.get_finished_spans()}
    assert {"request", "prepare", "decode", "encode", "prefill", "decode_tokens"} <= set(spans)
    assert len({spans[k].context.trace_id for k in ("request", "prepare", "decode", "encode", "prefill")}) == 1
    assert "secret" not in " ".join(s.to_json() for s in out.get_finished_spans())

def test_dashboard_file_is_the_dashboard(root):
    from video_vlm.gateway import grafana_dashboard
    assert json.loads((root / "ops" / "grafana.json").read_text()) == grafana_dashboard()

def test_picture_check_sees_skin_and_little_else():
    from video_vlm.gateway import skin_check
    from video_vlm.world import make_scene, render
    scores = [skin_check(render(make_scene(i), (64, 64))[0][::4]).score for i in range(20)]
    assert np.mean([s < .9 for s in scores]) == 1 and skin_check(np.full((2, 64, 64, 3), (222, 168, 120), np.uint8)).score > .99
