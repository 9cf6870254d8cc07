"`video-vlm eval`: the whole way, over real files, with every kind of model; and the clear line for every mistake."
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from video_vlm.benchmarks import load_moments, load_rows
from video_vlm.data import VideoVLMError, content_id, tiny_clips, write_video
from video_vlm.evaluation import EvaluationError, Item, is_ours, load_run, open_answer
from video_vlm.report import eval_task, media_facts, overlap_with, run_benchmark, training_ids


@pytest.fixture
def rows(tmp_path):
    "Three clips, one of them missing, with questions of both kinds."
    clips = tiny_clips(tmp_path / "videos")
    names = [c.name for c in clips][:2]
    data = [{"video": n, "question": f"Question {k}?", "options": ["no", "yes"], "answer": 1, "hour": k} for n in names for k in range(12)] + [{"video": "gone.mp4", "question": "Who?", "answer": "nobody"}]
    f = tmp_path / "rows.jsonl"; f.write_text("".join(json.dumps(r) + "\n" for r in data))
    return f, tmp_path / "videos", names


@pytest.fixture
def server():
    "A little OpenAI-compatible server that says (B), and remembers what it was asked."
    asked = []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def send(self, body): self.send_response(200); self.send_header("content-type", "application/json"); self.send_header("content-length", str(len(body))); self.end_headers(); self.wfile.write(body)
        def do_GET(self): self.send(json.dumps({"object": "list", "data": [{"id": "served", "object": "model", "created": 0, "owned_by": "x"}]}).encode())
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"]))); asked.append(body)
            self.send(json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "(B)"}}]}).encode())
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler); threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}/v1", asked
    s.shutdown(); s.server_close()


def command(*words, capsys):
    "(exit code, stdout, stderr) of the command."
    import sys
    from video_vlm.cli import main
    old, sys.argv = sys.argv, ["video-vlm", *map(str, words)]
    try: main(); code = 0
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = old
    return code, *capsys.readouterr()


def test_the_whole_way_with_a_server(rows, server, tmp_path, capsys):
    (data, videos, names), (url, asked) = rows, server
    (tmp_path / "seen.txt").write_text(f"{names[0]}\n" if (tmp_path / names[0]).exists() else content_id(videos / names[0]) + "\n")
    words = ("eval", "--task", "rows", "--data", data, "--videos", videos, "--endpoint", url, "--out", tmp_path / "run", "--train", tmp_path / "seen.txt")
    code, out, err = command(*words, capsys=capsys); assert code == 0, err
    assert len(asked) == 24 and {a["model"] for a in asked} == {"served"} and "contaminated 12 of 25" in out and "1 errors" in out and out.startswith("0.9600")
    code, again, _ = command(*words, capsys=capsys); assert code == 0 and len(asked) == 24 and "1 asked now" in again       # only the missing clip is tried again
    frames = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), np.uint8); write_video(videos / names[1], frames, fps=8)
    command(*words, capsys=capsys); assert len(asked) == 36                                                                # a changed clip is a miss, the other is not
    run = load_run(tmp_path / "run"); m = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert m["endpoint"] == url and m["data_sha256"] == content_id(data) and m["missing"] == 1 and m["argv"] and len(m["contaminated_ids"]) == 12
    facts = run.predictions[0].facts; assert {"duration", "fps", "height", "audio", "motion", "brightness", "hour"} <= facts.keys()
    page = (tmp_path / "run" / "report.html").read_text(); assert "✓" in page and "✗" in page and "manifest.json" in page and "<img" in page
    code, out, _ = command(*words[:-2], "--against", tmp_path / "run", "--out", tmp_path / "other", "--shuffle", capsys=capsys)
    assert code == 0 and "mde=" in out and "position bias" in out and "contamination not checked" in out


def test_blind_and_likelihood(rows, server, tmp_path, capsys):
    (data, videos, _), (url, asked) = rows, server
    code, out, err = command("eval", "--task", "rows", "--data", data, "--videos", videos, "--endpoint", url, "--out", tmp_path / "b", "--blind", capsys=capsys)
    assert code == 0 and all(len(a["messages"][0]["content"]) == 1 for a in asked) and "0 errors" in out                    # no video travels
    assert command("eval", "--task", "rows", "--data", data, "--videos", videos, "--endpoint", url, "--out", tmp_path / "l", "--likelihood", capsys=capsys)[0] == 2


def test_speech_comes_with_the_pictures_or_alone(rows, server, tmp_path, capsys):
    "Subtitles beside one of two clips: its questions carry them, with the video or (--blind) without; those of the other are not asked again."
    (data, videos, names), (url, asked) = rows, server
    (videos / names[0]).with_suffix(".srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nthe ball is red\n")
    words = ("eval", "--task", "rows", "--data", data, "--videos", videos, "--endpoint", url, "--out", tmp_path / "run")
    parts = lambda a: a["messages"][0]["content"]
    for more, films in (((), 24), (("--speech",), 12), (("--speech", "--blind"), 0)):
        asked.clear(); code, out, err = command(*words, *more, capsys=capsys); assert code == 0, err
        told = ["the ball is red" in p["text"] for a in asked for p in parts(a) if p["type"] == "text"]
        assert sum(told) == (12 if more else 0) and sum(any(p["type"] == "video_url" for p in parts(a)) for a in asked) == films, more
    assert '"speech": 12' in (tmp_path / "run" / "manifest.json").read_text()
    code, _, err = command(*words, "--speech", "--likelihood", capsys=capsys); assert code == 2 and len(err.strip().splitlines()) == 1 and "--speech" in err


def test_a_judge_scores_beside_and_its_words_are_kept(rows, server, tmp_path, capsys):
    (data, videos, _), (url, asked) = rows, server
    code, out, err = command("eval", "--task", "rows", "--data", data, "--videos", videos, "--endpoint", url, "--out", tmp_path / "j", "--judge", url, capsys=capsys); assert code == 0, err
    assert f"judge:{url}: 0.0000" in out and "25 unread" in out and len(asked) == 24 + 25 and "0.9600" in out              # a judge that says (B) has judged nothing
    from video_vlm.report import judge_run
    j = tmp_path / "j" / "judge" / "answers.jsonl"; j.write_text(j.read_text().replace('"(B)"', json.dumps('{"same": "yes", "score": 4}')))
    s = judge_run(load_run(tmp_path / "j"), url); assert s["accuracy"] == 1 and s["mean_score"] == 4 and s["unread"] == 0 and len(asked) == 49


def test_dry_run_and_list_load_nothing(rows, tmp_path, capsys):
    data, videos, _ = rows
    code, out, _ = command("eval", "--task", "rows", "--data", data, "--videos", videos, "--out", tmp_path / "none", "--model", "no/such/model", "--dry-run", capsys=capsys)
    assert code == 0 and "questions      25" in out and "missing        1" in out and not (tmp_path / "none").exists()
    code, out, _ = command("eval", "--list", capsys=capsys)
    assert code == 0 and len(out.strip().splitlines()) == 20 and all(n in out for n in ("samples", "mvbench", "videomme", "rows", "moments"))


@pytest.mark.parametrize("words,says", [((), "--task NAME"), (("--task", "rows", "--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"), (("--task", "mvbnech", "--data", "DATA"), "there is no benchmark 'mvbnech'"),
    (("--task", "rows", "--data", "DATA", "--videos", "nowhere"), "nowhere does not exist"), (("--task", "rows", "--data", "DATA", "--videos", "EMPTY"), "none of the 25 clips"), (("--task", "mvbench", "--data", "DATA"), "has no"),
    (("--task", "rows", "--data", "DATA", "--videos", "VIDEOS", "--endpoint", "http://127.0.0.1:9/v1"), "nobody answers"), (("--task", "rows", "--data", "DATA", "--videos", "VIDEOS", "--train", "EMPTY"), "says nothing about training"),
    (("--task", "rows", "--data", "DATA", "--videos", "VIDEOS", "--against", "EMPTY"), "no finished run"), (("--task", "qvhighlights", "--data", "DATA"), "has no qid"), (("--task", "activitynet_captions", "--data", "DATA"), "has no timestamps"), (("--task", "msrvtt_retrieval", "--data", "DATA"), "has no video_id"),
    (("--task", "msrvtt_retrieval", "--data", "PAIRS", "--videos", "VIDEOS", "--endpoint", "SERVER"), "only a checkpoint of ours"),
    (("--task", "mlvu", "--data", "DATA", "--predictions", "DATA"), "no file format for answers"), (("--task", "pope", "--data", "DATA", "--predictions", "nowhere"), "nowhere does not exist"), (("--task", "qvhighlights", "--data", "DATA", "--predictions", "DATA"), "not in the format of qvhighlights")])
def test_every_mistake_is_one_line(words, says, rows, server, tmp_path, capsys):
    data, videos, names = rows; (tmp_path / "empty").mkdir(); (tmp_path / "pairs.csv").write_text(f"video_id,sentence\n{names[0]},a circle\n")
    put = {"DATA": data, "VIDEOS": videos, "EMPTY": tmp_path / "empty", "PAIRS": tmp_path / "pairs.csv", "SERVER": server[0]}
    code, out, err = command("eval", *[put.get(w, w) for w in words], "--out", tmp_path / "run", capsys=capsys)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err


def test_answers_that_are_there_are_scored_by_the_official_rules(tmp_path, capsys):
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps({"question_id": i, "image": "x.jpg", "text": "Is there a cat?", "label": "yes" if i % 2 else "no"}) + "\n" for i in range(40)))
    (tmp_path / "said.jsonl").write_text("".join(json.dumps({"question": "Is there a cat?", "answer": "Yes." if i < 30 else "No."}) + "\n" for i in range(40)))
    code, out, _ = command("eval", "--task", "pope", "--data", tmp_path / "pope.jsonl", "--predictions", tmp_path / "said.jsonl", "--out", tmp_path / "s", capsys=capsys)
    assert code == 0 and "scores.json" in out and json.loads((tmp_path / "s/scores.json").read_text())["scores"] and "0.5000" in out, out


@pytest.fixture
def published(tmp_path):
    "Four generated clips, one of them missing, with annotation in the formats of MSR-VTT 1k-A, QVHighlights and ActivityNet Captions."
    from video_vlm.world import captions, make_scene, phrase, render
    scenes = [make_scene(71_000_000 + k, "easy") for k in range(4)]; (tmp_path / "clips").mkdir()
    for k, s in enumerate(scenes[:3]): write_video(tmp_path / "clips" / f"video{k}.mp4", *render(s, (128, 96)))
    (tmp_path / "pairs.csv").write_text("key,vid_key,video_id,sentence\n" + "".join(f'ret{k},msr{k},video{k},"{captions(s)[-1]}"\n' for k, s in enumerate(scenes)))
    event = lambda k, s: dict(qid=k, query=phrase(s, s.events[0]), duration=4, vid=f"video{k}", relevant_windows=[[s.events[0].start, s.events[0].end]], relevant_clip_ids=[int(s.events[0].start / 2)], saliency_scores=[[4, 3, 4]])
    (tmp_path / "moments.jsonl").write_text("".join(json.dumps(event(k, s)) + "\n" for k, s in enumerate(scenes)))
    (tmp_path / "events.json").write_text(json.dumps({f"video{k}": dict(duration=s.seconds, timestamps=[[e.start, e.end] for e in s.events], sentences=[phrase(s, e) for e in s.events]) for k, s in enumerate(scenes)}))
    return tmp_path


@pytest.mark.parametrize("task,data,left,figure", [("msrvtt_retrieval", "pairs.csv", "similarity.npz", "T2V R1"), ("qvhighlights", "moments.jsonl", "submission.jsonl", "MR-full-mAP"), pytest.param("activitynet_captions", "events.json", "submission.json", "Recall", marks=pytest.mark.slow)])
def test_our_model_gives_more_than_words(task, data, left, figure, published, capsys):
    "Windows, events and similarities of the packaged checkpoint: scored by the official rules, left as a submission with the same scores, kept for the next run; a missing clip costs its own answer."
    words = ("eval", "--task", task, "--data", published / data, "--videos", published / "clips", "--model", "tiny", "--out", published / "run")
    code, out, err = command(*words, capsys=capsys); assert code == 0 and "4 asked now, 1 errors" in out and f"official {figure}" in out, err
    run = load_run(published / "run"); assert (published / "run" / left).exists() and run.predictions[0].answer[:4] in ("rank", "from") and run.predictions[3].error == "missing"
    code, again, _ = command("eval", "--task", task, "--data", published / data, "--predictions", published / "run" / left, "--out", published / "again", capsys=capsys)
    told = json.loads((published / "again/scores.json").read_text())["scores"]; assert code == 0 and {k: run.summary["official"][k] for k in told} == told
    code, out, _ = command(*words, capsys=capsys); assert code == 0 and "1 asked now" in out
    code, out, _ = command(*words[:-1], published / "blind", "--blind", capsys=capsys); assert code == 0 and "0 errors" in out


def test_moments_are_found_window_by_window(published, capsys):
    "Charades-STA's format: the packaged checkpoint names ranked windows, and its official figures come from them."
    lines = [json.loads(l) for l in (published / "moments.jsonl").read_text().splitlines()][:3]
    (published / "charades.txt").write_text("".join(f"{r['vid']} {r['relevant_windows'][0][0]:.1f} {r['relevant_windows'][0][1]:.1f}##{r['query']}.\n" for r in lines))
    code, out, err = command("eval", "--task", "charades_sta", "--data", published / "charades.txt", "--videos", published / "clips", "--model", "tiny", "--out", published / "run", capsys=capsys)
    run = load_run(published / "run"); assert code == 0 and "official mIoU_top1" in out and '"windows"' in run.predictions[0].answer and run.predictions[0].question == lines[0]["query"] + ".", err
    assert run.summary["official"]["mIoU_top1"] == pytest.approx(run.summary["accuracy"]) and run.summary["accuracy"] > .2


def test_a_model_that_only_talks_is_asked_in_words(published, server, capsys):
    url, asked = server
    code, out, err = command("eval", "--task", "qvhighlights", "--data", published / "moments.jsonl", "--videos", published / "clips", "--endpoint", url, "--out", published / "run", capsys=capsys)
    assert code == 0 and "When does this happen" in asked[0]["messages"][0]["content"][-1]["text"] and "official MR-full-mAP          0.0000" in out, err + out


def test_a_run_is_not_compared_with_itself(rows, tmp_path, capsys):
    data, videos, _ = rows; (tmp_path / "r").mkdir(); (tmp_path / "r/manifest.json").write_text("{}")
    code, _, err = command("eval", "--task", "rows", "--data", data, "--videos", videos, "--out", tmp_path / "r", "--against", tmp_path / "r", capsys=capsys)
    assert code == 2 and "own folder" in err and (tmp_path / "r/manifest.json").exists()


def test_what_training_used(rows, tmp_path):
    data, videos, names = rows
    ids = {n: content_id(videos / n) for n in names}
    (videos / "annotations.jsonl").write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": [{"type": "video", "video": names[0]}, {"type": "text", "text": "?"}]}], "source": "", "task": "qa", "created_at": "", "meta": {}}) + "\n")
    assert training_ids(videos) == ({ids[names[0]]}, None) == training_ids(videos / "annotations.jsonl")
    (tmp_path / "ids.txt").write_text(ids[names[1]] + "\n"); items = load_rows(data, videos).items
    assert names[1] in overlap_with(tmp_path / "ids.txt", items, tmp_path)["train_clips"] and names[0] not in overlap_with(tmp_path / "ids.txt", items, tmp_path)["train_clips"]
    shutil.copy(videos / names[1], tmp_path / "renamed.mp4"); (tmp_path / "paths.txt").write_text("renamed.mp4\n")
    assert training_ids(tmp_path / "paths.txt")[0] == {ids[names[1]]}                                                       # another name, the same clip


def test_ingest_and_split_folders(tmp_path):
    from video_vlm.data import IngestConfig, ingest
    from video_vlm.dedup import dedup
    from video_vlm.splits import SplitConfig, load_splits, split
    from video_vlm.world import make_scene, render
    for k in range(4): write_video(_made(tmp_path / "train") / f"{k}.mp4", *render(make_scene(50 + k, "medium"), 96))
    stage = ingest(tmp_path / "train", tmp_path / "00", IngestConfig(progress=False)); dups = dedup(stage, tmp_path / "01")
    folder = split(stage, dups, tmp_path / "02", SplitConfig((.99, .005, .005)))
    train = {i for i, s in load_splits(folder).items() if s == "train"}
    assert training_ids(folder)[0] == train and training_ids(stage)[0] == set(load_splits(folder)) and training_ids(folder)[1]
    from video_vlm.frames import oracle
    frames, times = oracle(tmp_path / "train" / "1.mp4")
    write_video(_made(tmp_path / "bench") / "copy.mp4", frames, times, crf=30); write_video(tmp_path / "bench" / "new.mp4", *render(make_scene(99, "medium"), 96))   # re-encoded, and unseen
    items = [Item("1", "copy.mp4", str(tmp_path / "bench" / "copy.mp4")), Item("2", "new.mp4", str(tmp_path / "bench" / "new.mp4"))]
    from video_vlm.evaluation import contamination
    found = contamination(items, **overlap_with(folder, items, tmp_path / "out"))
    assert content_id(tmp_path / "train" / "1.mp4") in train and found["ids"] == ["1"] and found["clips"] == 0 and found["clusters"] == 1

def _made(p): p.mkdir(exist_ok=True); return p


def test_files_that_cannot_be_read_have_no_facts(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video"); assert media_facts([tmp_path / "bad.mp4"]) == {str(tmp_path / "bad.mp4"): {}}


def test_real_annotation_files(shared_data):
    "The hand-made questions and moments beside the real videos: every clip is found, every answer fits its options."
    t, missing = eval_task("rows", shared_data / "videos" / "qa.jsonl", shared_data / "videos")
    assert len(t.items) == 13 and not missing and all(i.truth in i.options for i in t.items)
    perfect = [t.score("ABCDEFGHIJ"[i.options.index(i.truth)], i)[0] for i in t.items]; assert perfect == [1.] * 13
    m = load_moments(shared_data / "videos" / "temporal_grounding.json", shared_data / "videos")
    assert m.items and all(i.media for i in m.items) and all(m.score(f"from {i.span[0]} s to {i.span[1]} s", i)[0] == pytest.approx(1) for i in m.items)


def test_kinds_of_checkpoints(tmp_path):
    from video_vlm.pretrain import checkpoint_folder
    assert is_ours(checkpoint_folder("tiny")) and not is_ours("some/hub-id")
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(EvaluationError, match="not JSON"): is_ours(tmp_path)
    with pytest.raises(VideoVLMError): open_answer(str(tmp_path / "sub"))


def tiny_vlm(folder):
    "A random LLaVA of the size of a thumbnail, as transformers saves it."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig
    from transformers.models.siglip import image_processing_pil_siglip as pil
    from video_vlm.pretrain import checkpoint_folder
    tok = AutoTokenizer.from_pretrained(checkpoint_folder("tiny")); tok.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    cfg = LlavaConfig(vision_config=SiglipVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16),
        text_config=LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2), image_token_index=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=4)
    LlavaForConditionalGeneration(cfg).save_pretrained(folder)
    template = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} :"
    LlavaProcessor(image_processor=pil.SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer=tok, patch_size=16, vision_feature_select_strategy="full", chat_template=template).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_any_transformers_vlm(rows, tmp_path, capsys):
    data, videos, _ = rows
    code, out, err = command("eval", "--task", "rows", "--data", data, "--videos", videos, "--model", tiny_vlm(tmp_path / "vlm"), "--out", tmp_path / "run", "--limit", 6, capsys=capsys)
    assert code == 0, err
    run = load_run(tmp_path / "run"); assert len(run.predictions) == 6 and sum(bool(p.error) for p in run.predictions) <= 1


@pytest.mark.slow
def test_our_checkpoint_and_our_server_over_real_videos(shared_data, tmp_path, capsys):
    "qa.jsonl beside the real videos: in this process by letters and by likelihood, then over HTTP from our own gateway."
    from video_vlm.gateway import GatewayConfig, start_server
    from video_vlm.pretrain import checkpoint_folder
    from video_vlm.serving import EngineConfig
    words = ("eval", "--task", "rows", "--data", shared_data / "videos" / "qa.jsonl", "--videos", shared_data / "videos")
    for more in ((), ("--likelihood",)):
        code, out, err = command(*words, "--out", tmp_path / f"ours{len(more)}", *more, capsys=capsys); assert code == 0 and "13 questions" in out and "0 errors" in out, err
    assert all(p.chosen >= 0 for p in load_run(tmp_path / "ours1").predictions)
    small = tmp_path / "small.jsonl"; small.write_text("".join((shared_data / "videos" / "qa.jsonl").read_text().splitlines(True)[:3]))
    with start_server(GatewayConfig(folder=str(tmp_path / "serve"), port=0), EngineConfig(str(checkpoint_folder("tiny")), max_model_len=2048, max_num_seqs=4), "transformers") as s:
        code, out, err = command("eval", "--task", "rows", "--data", small, "--videos", shared_data / "videos", "--endpoint", s.url + "/v1", "--out", tmp_path / "served", capsys=capsys)
    assert code == 0 and "3 questions" in out and "0 errors" in out, err + out
