"Confidence that means something: fitted from a server's log, served over real HTTP, watched; moderation, too; and one line for every mistake."
import json
import httpx, numpy as np, pytest
from openai import BadRequestError
from test_gateway import ask, place, user  # noqa: F401 (place is a fixture)
from test_gateway_traffic import opened
from video_vlm import calibration as K
from video_vlm.experiments import ExperimentError
from video_vlm.flywheel import RequestLog
from video_vlm.gateway import Book, Safety, Verdict

def served(folder, n, power=2., day=1, start=0, seed=0, thumbs=1., **facts):
    log, rng = RequestLog(folder/"log"), np.random.default_rng(seed)
    for i in range(n):
        c, id = float(rng.uniform(.3, 1)), f"{start+i:08d}"
        log._append("requests", dict(id=id, at=f"2026-11-{day:02d}T{i*24//n:02d}:00:00+00:00", consent=True, confidence=c, answer="red", **facts))
        if rng.random() < thumbs: log.feedback(id, thumbs=1 if rng.random() < c**power else -1)

def test_command_fits_watches_and_says_when_it_drifts(tmp_path, say):
    served(tmp_path, 600); served(tmp_path, 600, power=1., start=5000, seed=1, variant="live", version=2); served(tmp_path, 30, start=8000, variant="tuned")
    code, out = say("flywheel", "calibrate", tmp_path); lines = out.strip().splitlines()
    assert code == 0 and "answers of the base: platt on 400 cases" in lines[0] and lines[0].endswith("served") and "not served" in next(l for l in lines if "tuned" in l), out
    assert "answers of 2" in out and set(K.load_calibration(tmp_path/"calibration.json")["answers"]) >= {""}
    code, out = say("flywheel", "calibrate", tmp_path, "--check"); assert code == 0 and "200 cases" in out, out              # the third that it was judged on
    served(tmp_path, 400, day=2, start=10_000, seed=2); code, out = say("flywheel", "calibrate", tmp_path, "--check"); assert code == 0 and "no drift" in out
    served(tmp_path, 400, day=3, power=6., start=20_000, seed=3); code, out = say("flywheel", "calibrate", tmp_path, "--check", "--window", 300)
    assert code == 1 and "answers of the base: newest 300 cases" in out and "DRIFT" in out
    before = K.load_calibration(tmp_path/"calibration.json")["answers"][""][1]["until"]; say("flywheel", "calibrate", tmp_path)
    assert K.load_calibration(tmp_path/"calibration.json")["answers"][""][1]["until"] > before

def test_labels_win_over_thumbs_and_mined_cases_are_left_out(tmp_path):
    served(tmp_path, 400, power=1.)
    rows = [dict(id=f"{i:08d}", answer="blue") for i in range(200)]+[dict(id=f"{i:08d}", right=False, drawn=False) for i in range(200, 400)]
    (tmp_path/"l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    got = K.answer_cases(tmp_path, tmp_path/"l.jsonl")[""]; assert len(got) == 400 and not any(r for *_, r in got[:200]) and sum(r for *_, r in got[200:]) > 80
    K_all = K.answer_cases(tmp_path)[""]; assert [c[:2] for c in K_all] == [c[:2] for c in got]

def test_what_was_right_already_stays_raw(tmp_path):
    served(tmp_path, 3000, power=1.); found = K.calibrate(tmp_path)[""]
    assert ("why" in found) == ("" not in K.load_calibration(tmp_path/"calibration.json")["answers"]) and abs(found["ece"]-found["ece_raw"]) < .03

@pytest.mark.parametrize("words,said", [(("NOWHERE",), "does not exist"), (("EMPTY",), "no request log"), (("SERVE",), "75 cases"), (("SERVE", "--check"), "serves no calibration"), (("SERVE", "--window", "5"), "at least 200"), (("SERVE", "--moderation"), "--labels"),
    (("SERVE", "--labels", "NOWHERE"), "does not exist"), (("SERVE", "--labels", "JUNK"), "JSON lines"), (("SERVE", "--labels", "ROWS"), 'with "id"'), (("SERVE", "--moderation", "--labels", "ROWS"), "gateway.db")])
def test_mistakes_are_one_line(tmp_path, say, words, said):
    served(tmp_path/"serve", 20); (tmp_path/"empty").mkdir(); (tmp_path/"junk").write_text("{"); (tmp_path/"rows").write_text('{"video": "a", "unsafe": true}\n')
    put = dict(NOWHERE=tmp_path/"nowhere", EMPTY=tmp_path/"empty", SERVE=tmp_path/"serve", JUNK=tmp_path/"junk", ROWS=tmp_path/"rows")
    code, out = say("flywheel", "calibrate", *[put.get(w, w) for w in words]); assert code == 2 and said in out and len(out.strip().splitlines()) == 1, out

def test_a_server_says_both_numbers_and_follows_the_file(place):
    with opened(place, "sure") as h:
        asked = lambda **kw: h.client().chat.completions.create(model="video-vlm", messages=user("hi"), max_tokens=4, **kw).model_extra["video_vlm"]
        assert "confidence" not in asked() and asked(extra_body=dict(confidence=True))["calibrated_confidence"] is None
        first = asked(store=True); assert 0 < first["confidence"] <= 1
        (place[0]/"sure/calibration.json").write_text(json.dumps(dict(answers={"": dict(method="platt", x=[1., -3.], y=[])})))
        then = asked(store=True); assert then["confidence"] == first["confidence"] and then["calibrated_confidence"] < first["confidence"]
        chunks = list(h.client().chat.completions.create(model="video-vlm", messages=user("hi"), max_tokens=4, stream=True, stream_options=dict(include_usage=True), extra_body=dict(confidence=True)))
        assert chunks[-1].model_extra["video_vlm"]["calibrated_confidence"] == then["calibrated_confidence"]
        (place[0]/"sure/calibration.json").write_text("{"); assert asked(store=True)["calibrated_confidence"] == then["calibrated_confidence"]     # kept
    rows = RequestLog(place[0]/"sure/log").rows(); assert [r.get("calibrated_confidence") for r in rows if r["consent"]] == [None, then["calibrated_confidence"], then["calibrated_confidence"]]

def test_scores_of_the_picture_check_become_chances(place, say):
    score = [.95]; safety = Safety(frames=lambda f: Verdict(False, "red", score[0]))
    with opened(place, "pictures", safety=safety) as h:
        url = f"file://{place[2][0]}"
        with pytest.raises(BadRequestError, match="safety check"): ask(h, "x", url)
        (place[0]/"pictures/calibration.json").write_text(json.dumps(dict(frames={"": dict(method="platt", x=[1., -4.], y=[])})))
        ask(h, "x", url)                                                   # .95 has meant a chance of .26
    folder, rng = place[0]/"pictures", np.random.default_rng(0); book = Book(folder/"gateway.db")
    for i in range(300):
        s = float(rng.random()); book.run("insert into media values(?,?,?,?)", f"{i:064x}", ".mp4", "", 1e9+i); book.run("insert into verdicts values(?,?,'acme','frames',?,?,?)", f"k{i}", f"{i:064x}", 1, "", s)
        with open(folder/"unsafe.jsonl", "a") as f: f.write(json.dumps(dict(video=f"{i:064x}", unsafe=bool(rng.random() < s**3)))+"\n")
    code, out = say("flywheel", "calibrate", folder, "--moderation", "--labels", folder/"unsafe.jsonl"); assert code == 0 and "picture check: platt on 200 cases" in out and out.strip().endswith("served"), out
    assert K.load_calibration(folder/"calibration.json")["frames"][""][0](.5) < .3
