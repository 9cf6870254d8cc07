"A server's log to label tasks and back into a data set: consent, erasure, gold, resume, lineage, and one line for every mistake."
import json, re, shutil
from pathlib import Path
import numpy as np, pytest
from test_gateway import place, user  # noqa: F401 (place is a fixture)
from test_gateway_traffic import opened
from video_vlm import cases as C
from video_vlm.data import Sample, content_id, save_samples, write_video
from video_vlm.flywheel import FlywheelConfig, FlywheelError, RequestLog, Subject, Tombstones, annotate
from video_vlm.splits import load_splits

def clip(path, k, light=1.):
    x = np.full((16, 48, 64, 3), 60, np.uint8); path.parent.mkdir(parents=True, exist_ok=True)
    for t, f in enumerate(x): f[(7*k) % 32:(7*k) % 32+14, 2*t:2*t+14] = np.random.default_rng(k).integers(0, 255, (14, 14, 3))
    write_video(path, (x*light).astype(np.uint8), np.arange(16)/8); return content_id(path)

@pytest.fixture
def serve(tmp_path):
    "State of a server: eight clips (two of them dark), a request to each with consent, one without."
    folder, log, ids = tmp_path/"serve", RequestLog(tmp_path/"serve/log"), []
    for k in range(8):
        cid = clip(tmp_path/"t.mp4", k, .1 if k > 5 else 1.); to = folder/"media"/cid[:2]/f"{cid}.mp4"; to.parent.mkdir(parents=True, exist_ok=True); shutil.move(tmp_path/"t.mp4", to); ids.append(cid)
        log.request(f"{k:032x}", consent=True, video=cid, question=f"What is it, {k}? Write to ann@example.org", answer="a ball", tenant="acme", person=f"p{k}")
    log.request("f"*32, consent=False, video=ids[0], question="secret", answer="secret", tenant="acme")
    log.feedback(f"{6:032x}", thumbs=-1, edit="a box"); log.feedback(f"{7:032x}", thumbs=-1)
    return folder, ids

@pytest.fixture
def gold(tmp_path):
    for k in range(3): clip(tmp_path/f"gold/g{k}.mp4", 20+k)
    save_samples([Sample(f"g{k}", [dict(role="user", content=[dict(type="video", video=f"g{k}.mp4"), dict(type="text", text="What is it?")]), dict(role="assistant", content=[dict(type="text", text="a box")])], meta=dict(answer="a box")) for k in range(3)], tmp_path/"gold/annotations.jsonl")
    return tmp_path/"gold/annotations.jsonl"

def label(out, to, people, answer="a box"):
    tasks = json.loads((out/"tasks.json").read_text())
    for who, right in people: tasks = [annotate(t, who, answer if i < right*len(tasks) else "a dog") for i, t in enumerate(tasks)]
    to.write_text(json.dumps(tasks)); return to

def test_from_the_log_of_a_server_to_the_next_data_set(serve, tmp_path, say):
    folder, ids = serve; runs = tmp_path/"runs"
    code, out = say("flywheel", "mine", folder, "--out", tmp_path/"mined", "--budget", 8, "--seed", 1); assert code == 0 and "1 pairs from edits" in out, out
    text = (tmp_path/"mined/tasks.json").read_text(); assert "secret" not in text and "ann@" not in text and "acme" not in text
    rows = [json.loads(l)["row"] for l in (tmp_path/"mined/cases.jsonl").read_text().splitlines()]; assert set(ids[6:]) <= {r["video"] for r in rows}      # an edit and a thumbs down, beside what is drawn
    export = label(tmp_path/"mined", tmp_path/"e.json", [("ann", 1), ("bob", 1)])
    code, out = say("flywheel", "accept", export, "--mined", tmp_path/"mined", "--out", tmp_path/"v1", "--runs", runs); assert code == 0 and "0 go back" in out, out
    card = json.loads((tmp_path/"v1/card.json").read_text()); assert card["verified"] == card["clips"] > 2 and (runs/"lineage.jsonl").exists()
    told = [json.loads(l) for l in (tmp_path/"v1/labels.jsonl").read_text().splitlines()]; assert len(told) == card["verified"] and {t["answer"] for t in told} == {"a box"} and {True, False} == {t["drawn"] for t in told}
    old = load_splits(tmp_path/"v1/01a_splits")
    new = clip(tmp_path/"n.mp4", 40); (folder/"media"/new[:2]).mkdir(exist_ok=True); shutil.move(tmp_path/"n.mp4", folder/"media"/new[:2]/f"{new}.mp4")
    log = RequestLog(folder/"log"); log.request("a"*32, consent=True, video=new, question="And this?", answer="?", tenant="acme"); log.feedback("a"*32, edit="a cup")
    assert say("flywheel", "mine", folder, "--out", tmp_path/"m2", "--budget", 30)[0] == 0
    code, out = say("flywheel", "accept", label(tmp_path/"m2", tmp_path/"e2.json", [("ann", 1)]), "--mined", tmp_path/"m2", "--out", tmp_path/"v2", "--previous", tmp_path/"v1", "--votes", 1, "--runs", runs); assert code == 0, out
    assert json.loads((tmp_path/"v2/card.json").read_text())["previous"] == card["version"] and old.items() <= load_splits(tmp_path/"v2/01a_splits").items()

def test_gold_is_hidden_and_measures_people(serve, gold, tmp_path):
    folder, _ = serve; asked = []
    def labeller(item, prompt): asked.append(item.id); return "a box"
    with pytest.raises(FlywheelError, match="labeller"): C.write_cases(folder, tmp_path/"m", gold=gold)
    n = C.write_cases(folder, tmp_path/"m", FlywheelConfig(budget=8, explore=1.), answer=labeller, gold=gold); key = json.loads((tmp_path/"m/gold.json").read_text())
    tasks = json.loads((tmp_path/"m/tasks.json").read_text()); assert n["gold"] == len(key) == 1 and len(tasks) == 9 and len(asked) == 8                # the edit is not asked again
    shown = [{k: type(v).__name__ for k, v in t["data"].items()} | dict(by=t["predictions"][0]["model_version"], id=len(t["data"]["id"]), say=t["data"]["suggestion"]) for t in tasks if t["predictions"][0]["model_version"] != "edit"]
    assert all(s == shown[0] for s in shown)                                                                                                     # nothing tells them apart
    C.write_cases(folder, tmp_path/"m", FlywheelConfig(budget=8, explore=1.), answer=labeller, gold=gold); assert len(asked) == 8                # run again: answers are kept
    card = C.take_labels(label(tmp_path/"m", tmp_path/"e.json", [("ann", 1), ("bob", 0)]), tmp_path/"m", tmp_path/"v", votes=1, least=.5)
    assert card["annotators"]["ann"]["right"] == 1 and card["annotators"]["bob"]["right"] == 0 and card["verified"] == 8 and card["agreement"] < .1

def test_what_was_erased_in_the_meantime_is_left_out(serve, tmp_path):
    folder, ids = serve
    C.write_cases(folder, tmp_path/"m", FlywheelConfig(budget=8, explore=1.)); export = label(tmp_path/"m", tmp_path/"e.json", [("ann", 1)])
    Tombstones(folder/"erasure/tombstones.jsonl").add(Subject("video", ids[3]))
    assert ids[3] not in {r["video"] for r in C.log_rows(folder)}
    next((folder/"media").glob(f"??/{ids[2]}*")).unlink()
    assert C.take_labels(export, tmp_path/"m", tmp_path/"v", votes=1)["verified"] == 6 and not {ids[2], ids[3]} & load_splits(tmp_path/"v/01a_splits").keys()

def test_conditions_come_from_what_training_saw(serve, tmp_path):
    from video_vlm.data import IngestConfig, ingest
    for k in range(4): clip(tmp_path/f"train/{k}.mp4", 60+k)
    stage = ingest(tmp_path/"train", tmp_path/"00", IngestConfig(progress=False)); folder, ids = serve
    rows, share = C.with_conditions(C.log_rows(folder), C.kept_videos(folder), stage)
    assert all("dark" in r["condition"] for r in rows if r["video"] in ids[6:]) and not any("dark" in r["condition"] for r in rows if r["video"] in ids[:6]) and abs(sum(share.values())-1) < 1e-9

def test_what_the_server_stored_says_what_is_far(place, tmp_path, say, monkeypatch):
    from video_vlm.data import IngestConfig, ingest
    from video_vlm.scale import encode_clips
    from video_vlm.serving import load_encoder
    for k in range(4): clip(tmp_path/f"train/{k}.mp4", 60+k)
    stage = ingest(tmp_path/"train", tmp_path/"learnt/00", IngestConfig(progress=False)); load_encoder(place[1]).save_pretrained(tmp_path/"learnt/03/encoder")
    encode_clips(stage, tmp_path/"learnt/03/encoder", tmp_path/"learnt/03", progress=False)
    clip(tmp_path/"usual.mp4", 63); files, folder = [tmp_path/"usual.mp4", place[3]], place[0]/"far"
    with opened(place, "far", sync_seconds=60.) as h:
        for f in files:
            id = h.client().files.create(file=open(f, "rb"), purpose="vision").id
            h.client().chat.completions.create(model="video-vlm", messages=user("What is it?", id), max_tokens=2, store=True)
    def refuse(*a, **k): raise AssertionError("decoded")
    monkeypatch.setattr(C, "read_frames_safely", refuse)                                       # what is stored is not decoded
    code, out = say("flywheel", "mine", folder, "--train", tmp_path/"learnt", "--out", tmp_path/"m", "--budget", 2); assert code == 0 and "1 requests far from training" in out, out
    cases = [json.loads(l) for l in (tmp_path/"m/cases.jsonl").read_text().splitlines()]; assert {c["row"]["video"] for c in cases} == {content_id(f) for f in files}
    assert all(len(c["row"]["encoder"]) == 16 and (folder/"tokens/entries"/c["row"]["tokens"][:2]/f"{c['row']['tokens']}.safetensors").exists() for c in cases)
    rows, train = C.log_rows(folder), tmp_path/"learnt/03"; before, _ = C.clip_vectors(rows, C.kept_videos(folder), train, folder/"tokens", tmp_path/"own", progress=False)
    monkeypatch.undo(); again, _ = C.clip_vectors([{**r, "encoder": "another"} for r in rows], C.kept_videos(folder), train, folder/"tokens", tmp_path/"own", progress=False)
    assert (before*again).sum(1).min() > .98 and len(list((tmp_path/"own/entries").glob("??/*"))) == 2    # another encoder's are made again; the plans differ a little, the clips do not
    shutil.rmtree(train/"tokens/entries"); assert "run video-vlm encode again" in say("flywheel", "mine", folder, "--train", tmp_path/"learnt", "--out", tmp_path/"m2")[1]

@pytest.mark.parametrize("words,said", [(("mine", "NOWHERE"), "does not exist"), (("mine", "EMPTY"), "no request log"), (("mine", "SERVE", "--budget", "0"), "at least 1"), (("mine", "SERVE", "--gold", "NOWHERE"), "does not exist"), (("mine", "SERVE", "--train", "NOWHERE"), "does not exist"), (("mine", "SERVE", "--train", "EMPTY"), "no training data"),
    (("mine", "SERVE", "--labeller", "http://127.0.0.1:9/v1"), "nobody answers"), (("accept", "NOWHERE"), "does not exist"), (("accept", "JUNK", "--mined", "EMPTY"), "not written by"), (("accept", "JUNK", "--votes", "0"), "1 or more"), (("accept", "JUNK", "--previous", "EMPTY"), "does not exist")])
def test_mistakes_are_one_line(serve, tmp_path, words, said, say):
    (tmp_path/"empty").mkdir(); (tmp_path/"junk").write_text("{")
    put = dict(NOWHERE=tmp_path/"nowhere", EMPTY=tmp_path/"empty", SERVE=serve[0], JUNK=tmp_path/"junk")
    code, out = say("flywheel", *[put.get(w, w) for w in words], "--out", tmp_path/"out"); assert code == 2 and said in out and len(out.strip().splitlines()) == 1

def test_an_export_that_is_none_is_refused(serve, tmp_path):
    C.write_cases(serve[0], tmp_path/"m", FlywheelConfig(budget=4)); bad = tmp_path/"bad.json"
    for text in ("{", "{}", "[1]", '[{"data": {"id": "x"}}]'):
        bad.write_text(text)
        with pytest.raises(FlywheelError, match="export"): C.take_labels(bad, tmp_path/"m", tmp_path/"v")
    with pytest.raises(FlywheelError, match="no answer is settled"): C.take_labels(label(tmp_path/"m", bad, [("ann", 1)]), tmp_path/"m", tmp_path/"v")
