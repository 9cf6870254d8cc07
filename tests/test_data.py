"Files become rows: sources, text, provenance, limits, resume. Real mp4 files throughout."
import json, os, subprocess, sys, tarfile, threading, time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from video_vlm import data
from video_vlm.data import (IngestConfig, Limits, MediaError, REASONS, Sample, VideoVLMError, as_of, add_text, caption_clips, chat, content_id, fetch_url, ingest,
                            isolated, is_remote_stage, load_clips, load_samples, open_stage, probe, public_address, read_annotations, read_small, save_samples, tiny_clips,
                            send_stage, sphinx, stage_copy, training_clips, transcribe, whisper, write_video)

SHARED = Path(__file__).parents[2]/"shared"/"data"
QUIET = IngestConfig(progress=False, workers=2)

@pytest.fixture
def clips(tmp_path): return tiny_clips(tmp_path/"clips")

def rows(stage): return {Path(c.uri).name: c for c in load_clips(stage, rejected=True)}

# -- importing is light ---------------------------------------------------------------------------------------------
def test_import_is_light():
    code = "import sys, video_vlm.data, video_vlm.frames; print([m for m in ('torch','pandas','pyarrow','matplotlib','cv2','decord','av') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

# -- writer and probe -----------------------------------------------------------------------------------------------
def test_variable_times_survive(tmp_path):
    t = [0, .04, .5, .52, 1.9]
    p = data.timeline(write_video(tmp_path/"a.mp4", np.zeros((5, 32, 32, 3), np.uint8), t))
    assert np.allclose(p.seconds, t, atol=1e-4) and p.probe.is_vfr

@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_and_size(tmp_path, rotation):
    p = probe(write_video(tmp_path/"a.mp4", np.zeros((3, 32, 64, 3), np.uint8), rotation=rotation))
    assert p.rotation == rotation and (p.width, p.height) == ((32, 64) if rotation % 180 else (64, 32))

def test_pixel_shape_is_corrected(tmp_path):
    p = probe(write_video(tmp_path/"a.mp4", np.zeros((3, 48, 48, 3), np.uint8), sar="4/3"))
    assert (p.width, p.height, p.coded_width) == (64, 48, 48)

@pytest.mark.parametrize("limits,code", [(Limits(max_bytes=100), "too_large"), (Limits(max_duration_s=.5), "too_long"), (Limits(max_pixels=100), "too_many_pixels"),
                                         (Limits(max_frames=5), "too_many_frames"), (Limits(min_frames=99), "too_few_frames"), (Limits(max_streams=1), "too_many_streams")])
def test_limits(clips, limits, code):
    with pytest.raises(MediaError) as e: probe(clips[0], limits)
    assert e.value.code == code and code in REASONS

# -- isolation ------------------------------------------------------------------------------------------------------
def test_a_crash_costs_one_call():
    with pytest.raises(MediaError) as e: isolated(os.abort)
    assert e.value.code == "crashed" and isolated(len, "ab") == 2

def test_a_hang_is_ended_in_time():
    t = time.monotonic()
    with pytest.raises(MediaError) as e: isolated(time.sleep, 99, timeout_s=1)
    assert e.value.code == "timeout" and time.monotonic()-t < 20

def test_memory_is_capped():
    with pytest.raises(MediaError) as e: isolated(np.ones, 1<<30, memory_bytes=1<<30)
    assert e.value.code == "crashed"

def test_threads_share_the_pool():
    out = []
    ts = [threading.Thread(target=lambda i=i: out.append(isolated(int, str(i)))) for i in range(6)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert sorted(out) == list(range(6))

def test_a_script_without_main_guard(tmp_path, clips):
    (tmp_path/"script.py").write_text(f"from video_vlm.data import isolated, probe\nprint(isolated(probe, {str(clips[0])!r}).n_frames)\n")
    r = subprocess.run([sys.executable, tmp_path/"script.py"], capture_output=True, text=True, timeout=120)
    assert r.stdout.strip() == "24", r.stderr

# -- sources --------------------------------------------------------------------------------------------------------
def test_folder_glob_list_give_the_same_rows(clips, tmp_path):
    ids = {content_id(c) for c in clips}
    for k, src in enumerate((tmp_path/"clips", str(tmp_path/"clips"/"*.mp4"), clips, [dict(video=str(c)) for c in clips])):
        assert {c.id for c in load_clips(ingest(src, tmp_path/f"out{k}", QUIET))} == ids

def test_tar_shard(clips, tmp_path):
    (tmp_path/"a.txt").write_text("one ball"); (tmp_path/"a.json").write_text(json.dumps(dict(license="CC0-1.0")))
    with tarfile.open(tmp_path/"s.tar", "w") as t:
        for n, f in (("a.mp4", clips[0]), ("a.txt", tmp_path/"a.txt"), ("a.json", tmp_path/"a.json"), ("sub/b.mp4", clips[1])): t.add(f, n)
    found = load_clips(ingest(tmp_path/"s.tar", tmp_path/"out", QUIET))
    a = next(c for c in found if c.id == content_id(clips[0]))
    assert len(found) == 2 and a.captions[0]["text"] == "one ball" and a.licence == "CC0-1.0" and a.source.endswith("s.tar::a.mp4")

def test_broken_tar_says_so(tmp_path):
    (tmp_path/"s.tar").write_bytes(b"x"*2000)
    with pytest.raises(VideoVLMError, match="tar"): ingest(tmp_path/"s.tar", tmp_path/"out", QUIET)

def test_broken_shard_in_a_folder_is_a_row(clips, tmp_path):
    (tmp_path/"clips"/"s.tar").write_bytes(b"x"*2000); r = rows(ingest(tmp_path/"clips", tmp_path/"out", QUIET))
    assert r["s.tar"].reason == "not_media" and sum(not c.reason for c in r.values()) == 2

def test_sidecars_on_object_storage(clips, tmp_path):
    import fsspec
    fs = fsspec.filesystem("memory"); [fs.pipe(f"/other/{c.name}", c.read_bytes()) for c in clips]; fs.pipe("/other/red_cfr.txt", b"a red ball"); fs.pipe("/other/red_cfr.json", b'{"creator": "ana"}')
    by = {c.source.split("/")[-1]: c for c in load_clips(ingest("memory://other", tmp_path/"out", QUIET))}
    assert by["red_cfr.mp4"].captions[0]["text"] == "a red ball" and by["red_cfr.mp4"].creator == "ana" and not by["blue_vfr.mp4"].captions

def test_glob_of_annotations_keeps_samples(clips, tmp_path):
    for c in clips: (tmp_path/"clips"/f"{c.stem}.qa.json").write_text(json.dumps([dict(video=c.name, question="what?", answer="a ball")]))
    assert len(load_samples(ingest(str(tmp_path/"clips"/"*.qa.json"), tmp_path/"out", QUIET))) == 2

def test_fsspec(clips, tmp_path):
    import fsspec
    fs = fsspec.filesystem("memory"); [fs.pipe(f"/bucket/{c.name}", c.read_bytes()) for c in clips]
    found = load_clips(ingest("memory://bucket", tmp_path/"out", QUIET))
    assert {c.id for c in found} == {content_id(c) for c in clips} and all(c.source.startswith("memory://") for c in found)

def test_bytes_rows(clips, tmp_path):
    found = load_clips(ingest([dict(video=dict(bytes=clips[0].read_bytes(), path=None), caption="hi")], tmp_path/"out", QUIET))
    assert found[0].id == content_id(clips[0]) and found[0].captions[0]["text"] == "hi"

def test_datasets_rows(clips, tmp_path):
    datasets = pytest.importorskip("datasets")
    d = datasets.Dataset.from_list([dict(video=str(c), caption=c.stem) for c in clips])
    assert {c.captions[0]["text"] for c in load_clips(ingest(d, tmp_path/"out", QUIET))} == {c.stem for c in clips}
    d = d.cast_column("video", datasets.Video()); assert len(load_clips(ingest(d, tmp_path/"out2", QUIET))) == 2, "a column of videos is not decoded by `datasets`"

def test_a_recogniser_hears_a_real_video(shared_data, tmp_path):
    pytest.importorskip("pocketsphinx"); v = [shared_data/n for n in ("speech/video_harvard_snowdogs.avi", "videos/earth_night.mp4", "videos/bikes.mp4")]
    st = ingest([str(p) for p in v], tmp_path/"o", QUIET); assert transcribe(st, sphinx(), "pocketsphinx:en-us", progress=False) == dict(no_audio=1, transcribed=2)
    said = {Path(c.uri).name: c.transcript for c in load_clips(st)}; heard = said["video_harvard_snowdogs.avi"]; truth = "the child almost hurt the small dog".split()
    assert len(heard) == 7 and sum(s["text"] == t for s, t in zip(heard, truth)) >= 5 and {s["by"] for s in heard} == {"pocketsphinx:en-us"} and all(s["known_at"] for s in heard)
    assert abs(heard[0]["start"]-2.) < .4 and abs(heard[-1]["end"]-4.87) < .4, "two seconds of silence come first"
    assert said["earth_night.mp4"] == said["bikes.mp4"] == [], "a silent track, and none"
    assert transcribe(st, sphinx(), "pocketsphinx:en-us", progress=False)["had"] == 1

def test_data_sets_by_name(clips, tmp_path):
    datasets = pytest.importorskip("datasets"); caption = lambda st: {c.id: c.captions[0]["text"] for c in load_clips(st)}; want = {content_id(c): c.stem for c in clips}
    d = datasets.Dataset.from_list([dict(video=str(c), caption=c.stem) for c in clips]); d.save_to_disk(tmp_path/"plain")
    datasets.DatasetDict(train=d.select([0]), test=d.select([1])).save_to_disk(tmp_path/"split")
    bytes_ = datasets.Dataset.from_list([dict(video=dict(bytes=c.read_bytes(), path=None), caption=c.stem, licence="CC0-1.0") for c in clips]); (tmp_path/"pq").mkdir(); bytes_.to_parquet(tmp_path/"pq"/"a.parquet")
    for k, source in enumerate((tmp_path/"plain", tmp_path/"split", tmp_path/"pq"/"a.parquet", str(tmp_path/"pq"/"*.parquet"), [str(tmp_path/"pq"/"a.parquet")])): assert caption(ingest(source, tmp_path/f"o{k}", QUIET)) == want, source
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/"o2"/"media").iterdir()}; manifest = (tmp_path/"o2"/"manifest.json").stat().st_mtime_ns
    ingest(tmp_path/"pq"/"a.parquet", tmp_path/"o2", QUIET); assert {f: f.stat().st_mtime_ns for f in (tmp_path/"o2"/"media").iterdir()} == before and (tmp_path/"o2"/"manifest.json").stat().st_mtime_ns == manifest
    (tmp_path/"bad.parquet").write_bytes(b"no"); (tmp_path/"half").mkdir(); (tmp_path/"half"/"dataset_info.json").write_text("{}")
    for bad in (tmp_path/"bad.parquet", tmp_path/"half", "hf:nobody/nothing:train", "hf:"):
        with pytest.raises(VideoVLMError, match="no data set"): ingest(bad, tmp_path/"p", QUIET)
    datasets.Dataset.from_list([dict(picture="x")]).to_parquet(tmp_path/"other.parquet")
    with pytest.raises(VideoVLMError, match="a row has no video"): ingest(tmp_path/"other.parquet", tmp_path/"p", QUIET)

def test_no_videos(tmp_path):
    (tmp_path/"e").mkdir()
    with pytest.raises(VideoVLMError, match="no videos"): ingest(tmp_path/"e", tmp_path/"out", QUIET)
    with pytest.raises(VideoVLMError, match="does not exist"): ingest(tmp_path/"nope", tmp_path/"out", QUIET)

# -- object storage -------------------------------------------------------------------------------------------------
@pytest.fixture
def bucket(tmp_path, monkeypatch):
    "An object store in memory (no rename, no append), and a cache for the copies of this machine."
    import fsspec
    fs = fsspec.filesystem("memory"); fs.store.clear(); monkeypatch.setenv("VIDEO_VLM_STAGES", str(tmp_path/"cache")); yield fs; fs.store.clear()

def test_stages_by_url_from_the_command_line(clips, tmp_path, bucket, monkeypatch, capsys):
    from video_vlm.cli import main
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["video-vlm", *map(str, words)])
        with pytest.raises(SystemExit) as e: main()
        return e.value.code or 0, capsys.readouterr()
    code, said = run("ingest", clips[0].parent, "--out", "memory://b/mine/00_ingest"); assert code == 0 and "files sent to memory://b/mine/00_ingest" in said.out
    assert bucket.exists("/b/mine/00_ingest/manifest.json") and not any(f.endswith((".lock", ".tmp")) for f in bucket.find("/b"))
    monkeypatch.setenv("VIDEO_VLM_STAGES", str(tmp_path/"another machine"))
    code, said = run("dedup", "memory://b/mine/00_ingest", "--out=memory://b/mine/01_dedup"); assert code == 0 and "2 clips in 2 clusters" in said.out and "memory://b/mine/01_dedup" in said.out
    code, said = run("split", "memory://b/mine/00_ingest", "memory://b/mine/01_dedup", "--out", tmp_path/"local"); assert code == 0 and (tmp_path/"local"/"splits.parquet").exists()
    code, said = run("clips", "memory://b/mine/00_ingest"); assert code == 0 and len(said.out.splitlines()) == 2
    code, said = run("dedup", "memory://b/mine/00_ingest", "--out", "memory://b/mine/01_dedup"); assert code == 0, "run again: it goes on from what is there"
    for words, why in ((("dedup", "memory://b/nothing", "--out", tmp_path/"o"), "does not exist"), (("encode", "memory://b/mine/00_ingest", "--out", "nowhere://x"), "nowhere"), (("report", "--out", "memory://b/x"), "local or mounted"), (("ingest", "x", "--folder=memory://b/x"), "local or mounted")):
        code, said = run(*words); assert code == 2 and why in said.err, (words, said)

def test_a_stage_that_was_half_sent_is_no_stage(clips, tmp_path, bucket, monkeypatch):
    url = "memory://b/00"; work = ingest(clips[0].parent, stage_copy(url), QUIET); put, sent = type(bucket).put_file, []
    def dies(self, *a, **k):
        if len(sent) == 2: raise KeyboardInterrupt
        sent.append(a); return put(self, *a, **k)
    monkeypatch.setattr(type(bucket), "put_file", dies)
    with pytest.raises(KeyboardInterrupt): send_stage(work, url)
    assert not is_remote_stage(url) and len(bucket.find("/b")) == 2 and not stage_copy(url, tmp_path/"other").exists()
    monkeypatch.setattr(type(bucket), "put_file", put); assert send_stage(work, url) > 1 and is_remote_stage(url) and send_stage(work, url) == 0
    assert [c.id for c in load_clips(stage_copy(url, tmp_path/"other"))] == [c.id for c in load_clips(work)]
    (clips[0].parent/"late.mp4").write_bytes(clips[0].read_bytes() + b"\0"*9); ingest(clips[0].parent, work, QUIET); n = send_stage(work, url); assert 1 < n < len(bucket.find("/b")), "only what has changed is sent"
    assert len(load_clips(stage_copy(url, tmp_path/"other"))) == 3 and not list(tmp_path.rglob("coming"))

def test_a_read_that_breaks_off_and_a_name_that_leads_out(clips, tmp_path, bucket, monkeypatch):
    url = "memory://b/00"; send_stage(ingest(clips[0].parent, stage_copy(url), QUIET), url); there = tmp_path/"other"; get, got = type(bucket).get_file, []
    def dies(self, *a, **k):
        if len(got) == 2: raise OSError("line is dead")
        got.append(a); return get(self, *a, **k)
    monkeypatch.setattr(type(bucket), "get_file", dies)
    with pytest.raises(VideoVLMError, match="line is dead"): stage_copy(url, there)
    assert not list(there.rglob("manifest.json")); monkeypatch.setattr(type(bucket), "get_file", get)
    assert len(load_clips(stage_copy(url, there))) == 2
    monkeypatch.setattr(type(bucket), "find", lambda self, p, **k: ["/b/00/../../out"]); bucket.rm("/b/00/manifest.json"); bucket.pipe("/b/00/manifest.json", b"{}")
    with pytest.raises(VideoVLMError, match="outside of the folder"): stage_copy(url, there)

def test_what_was_brought_moves_with_its_folder(clips, tmp_path, bucket):
    for c in clips: bucket.pipe(f"/in/{c.name}", c.read_bytes())
    url = "memory://b/00"; work = ingest("memory://in", stage_copy(url), QUIET); send_stage(work, url); other = stage_copy(url, tmp_path/"other")
    import shutil
    shutil.rmtree(work); moved = load_clips(other); assert all(Path(c.uri).exists() and Path(c.uri).is_relative_to(other) for c in moved) and len(moved) == 2
    before = {f: f.stat().st_mtime_ns for f in (other/"media").iterdir()}; ingest("memory://in", other, QUIET); assert {f: f.stat().st_mtime_ns for f in (other/"media").iterdir()} == before and len(load_clips(other)) == 2

# -- annotations ----------------------------------------------------------------------------------------------------
def test_chat_samples_and_dropped_ones(clips, tmp_path):
    (tmp_path/"clips"/"bad.mp4").write_bytes(b"")
    save_samples([Sample("1", chat("red_cfr.mp4", "colour?", "red"), task="qa", meta=dict(skill="colour")), Sample("2", chat("bad.mp4", "?", "!"))], tmp_path/"clips"/"annotations.jsonl")
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET); s = load_samples(stage)
    assert [x.id for x in s] == ["1"] and s[0].videos == [content_id(clips[0])] and s[0].meta["skill"] == "colour"
    assert open_stage(stage)["counts"]["samples_dropped"] == 1

@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
@pytest.mark.parametrize("name,n_samples,n_captions", [("nextqa/val.csv", 4996, 0), ("activitynet_qa/val_q.json", 18000, 0), ("youcook2/yc2_val.json", 3000, 3000), ("msrvtt_retrieval/msrvtt_jsfusion_1kA_test.csv", 0, 1000)])
def test_published_formats(name, n_samples, n_captions):
    found, samples = read_annotations(SHARED/"bench"/name)
    assert abs(len(samples)-n_samples) <= n_samples*.2 and sum(len(s.facts.get("captions", [])) for s in found) >= n_captions*.8
    assert all(s.messages[-1]["content"][0]["text"] for s in samples[:50]) and all(s.videos for s in samples[:1]) and len(samples) >= min(n_samples, 1)

@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_our_question_file(tmp_path):
    found, samples = read_annotations(SHARED/"videos"/"qa.jsonl")
    assert len(samples) == 13 and all(os.path.exists(s.key) for s in found)
    assert all(s.meta["answer"] in s.meta["options"] for s in samples)

def test_llava_conversations(clips):
    f = clips[0].parent/"c.json"
    f.write_text(json.dumps([dict(video=clips[0].name, conversations=[{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B."}, {"from": "human", "value": "C?"}, {"from": "gpt", "value": "D."}])]))
    m = read_annotations(f)[1][0].messages
    assert [o["role"] for o in m] == ["user", "assistant"]*2 and m[0]["content"][0]["video"] == str(clips[0]) and m[0]["content"][1]["text"] == "A?"

# -- provenance, time -----------------------------------------------------------------------------------------------
def test_licences_consent_blocked(clips, tmp_path):
    clips[0].with_suffix(".json").write_text(json.dumps(dict(licence="cc-by-4.0"))); clips[1].with_suffix(".json").write_text(json.dumps(dict(licence="proprietary")))
    cfg = replace(QUIET, allow_licences=("CC-BY-4.0",)); stage = ingest(tmp_path/"clips", tmp_path/"out", cfg)
    assert len(load_clips(stage)) == 2 and [c.id for c in training_clips(stage)] == [content_id(clips[0])]
    assert rows(stage)["blue_vfr.mp4"].decisions == [dict(rule="licence", ok=False, detail="proprietary")]
    stage = ingest(tmp_path/"clips", tmp_path/"out2", replace(QUIET, blocked=(content_id(clips[0]),)))
    assert rows(stage)["red_cfr.mp4"].reason == "blocked"
    stage = ingest(tmp_path/"clips", tmp_path/"out3", replace(QUIET, blocked=(os.path.relpath(clips[0]),)))
    assert rows(stage)["red_cfr.mp4"].reason == "blocked", "however the path is written"

def test_nothing_later_is_shown(clips, tmp_path):
    clips[0].with_suffix(".json").write_text(json.dumps(dict(collected_at="2024-01-01", captions=[dict(text="old", known_at="2024-02-01"), dict(text="new", known_at="2025-02-01")])))
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET)
    add_text(stage, [dict(id=content_id(clips[0]), text="newer", by="m"), dict(id=content_id(clips[0]), start=0, end=1, text="hm", by="asr", known_at="2024-03-01")])
    c, = load_clips(stage, day="2024-12-31")
    assert [t["text"] for t in c.captions] == ["old"] and [s["text"] for s in c.transcript] == ["hm"]
    assert len(load_clips(stage)) == 2 and as_of([Sample("1", [], created_at="2025-01-01")], "2024-12-31") == []
    for bad in ("soon", "2024-13-01", "2024-1-1", "", "2024-01-01T00:00:00"):
        with pytest.raises(VideoVLMError, match="ISO date"): as_of([], bad)

def test_transcripts_and_synthetic_captions(clips, tmp_path):
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET)
    assert transcribe(stage, None, "whisper") == dict(no_audio=1, no_asr=1)
    assert transcribe(stage, lambda path: [dict(start=0., end=.5, text="beep")], "tone")["transcribed"] == 1
    assert transcribe(stage, lambda path: 1/0, "tone")["had"] == 1 # not heard twice
    assert caption_clips(stage, lambda clip, prompt: f"{clip.n_frames} frames", "model:count") == 2 and caption_clips(stage, lambda c, p: 1/0, "model:count") == 0
    assert {t["text"] for c in load_clips(stage) for t in c.captions} == {"24 frames"}
    with pytest.raises(VideoVLMError): whisper(tmp_path/"no_model")

def test_a_text_that_fails_costs_itself(clips, tmp_path):
    stage, calls = ingest(tmp_path/"clips", tmp_path/"out", QUIET), []
    def sometimes(c, prompt): calls.append(c.id); return "seen" if len(calls) == 1 else 1/0
    assert caption_clips(stage, sometimes, "m") == 1 and sum(bool(c.captions) for c in load_clips(stage)) == 1
    assert caption_clips(stage, lambda c, p: "later", "m") == 1 and all(c.captions for c in load_clips(stage)), "only the one that failed is asked again"
    with pytest.raises(VideoVLMError, match="not one of 2"): caption_clips(stage, lambda c, p: 1/0, "broken")

def test_long_texts_show_how_far_they_are(clips, tmp_path, capsys):
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET); caption_clips(stage, lambda c, p: "seen", "m"); assert "2/2" in capsys.readouterr().err
    transcribe(stage, lambda path: [dict(start=0., end=.5, text="beep")], "tone", progress=False); assert not capsys.readouterr().err

def test_same_bytes_are_one_clip(clips, tmp_path):
    (tmp_path/"clips"/"zz.mp4").write_bytes(clips[0].read_bytes())
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET)
    assert rows(stage)["zz.mp4"].reason == "same_bytes" and len(load_clips(stage)) == 2

# -- resume ---------------------------------------------------------------------------------------------------------
def test_adding_files_probes_only_those(clips, tmp_path):
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET); write_video(tmp_path/"clips"/"new.mp4", np.full((9, 32, 32, 3), 50, np.uint8))
    stage = ingest(tmp_path/"clips", stage, QUIET)
    assert open_stage(stage)["counts"]["begun"] == 1 and len(load_clips(stage)) == 3

def test_changed_file_is_measured_again(clips, tmp_path):
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET); write_video(clips[0], np.full((9, 32, 32, 3), 50, np.uint8))
    assert rows(ingest(tmp_path/"clips", stage, QUIET))["red_cfr.mp4"].n_frames == 9

def test_other_config_is_refused(clips, tmp_path):
    stage = ingest(tmp_path/"clips", tmp_path/"out", QUIET)
    with pytest.raises(VideoVLMError, match="another config .not the same: licence;"): ingest(tmp_path/"clips", stage, replace(QUIET, licence="CC0"))

def test_a_call_that_found_nothing_binds_no_folder(clips, tmp_path):
    (tmp_path/"none").mkdir()
    with pytest.raises(VideoVLMError, match="no videos"): ingest(tmp_path/"none", tmp_path/"out", QUIET)
    assert len(load_clips(ingest(tmp_path/"clips", tmp_path/"out", replace(QUIET, licence="CC0")))) == 2

def test_one_process_at_a_time(clips, tmp_path):
    with data._only_one(tmp_path):
        with pytest.raises(VideoVLMError, match="another process"): ingest(tmp_path/"clips", tmp_path, QUIET)

def test_malformed_annotations_say_where(clips):
    f = clips[0].parent/"a.json"; f.write_text(json.dumps([dict(video="red_cfr.mp4", conversations=[dict(value="x")])]))
    with pytest.raises(VideoVLMError, match="a.json"): read_annotations(f)

@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_parent_memory_stays_flat(clips, n):
    rss = lambda: int(Path("/proc/self/statm").read_text().split()[1])*4096
    for k in range(n + 40):
        if k == 40: start = rss()
        isolated(probe, clips[k % len(clips)])
    assert rss()-start < 8<<20

# -- the fetcher ----------------------------------------------------------------------------------------------------
class Handler(BaseHTTPRequestHandler):
    files, to = {}, "http://169.254.169.254/latest/meta-data"
    def log_message(self, *a): pass
    def do_GET(self):
        if self.path.startswith("/redirect"): self.send_response(302); self.send_header("Location", self.to); self.end_headers(); return
        if self.path == "/loop": self.send_response(302); self.send_header("Location", "/loop"); self.end_headers(); return
        body = self.files.get(self.path)
        if body is None: self.send_response(404); self.end_headers(); return
        self.send_response(200)
        if self.path != "/endless": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
            while self.path == "/endless": self.wfile.write(body); time.sleep(.01)
        except OSError: pass

@pytest.fixture
def server(clips):
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler); Handler.files = {"/a.mp4": clips[0].read_bytes(), "/endless": b"x"*50000}
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}", (f"127.0.0.1:{s.server_port}",)
    s.shutdown()

def test_fetch(server, clips, tmp_path):
    base, allow = server
    assert content_id(fetch_url(base+"/a.mp4", tmp_path/"x.mp4", allow=allow)) == content_id(clips[0])
    with pytest.raises(MediaError) as e: fetch_url(base+"/a.mp4", tmp_path/"y")
    assert e.value.code == "forbidden_url" and not (tmp_path/"y").exists()

@pytest.mark.parametrize("path,code", [("/none", "fetch_failed"), ("/redirect", "forbidden_url"), ("/loop", "fetch_failed"), ("/endless", "too_large")])
def test_fetch_refuses(server, tmp_path, path, code):
    base, allow = server
    with pytest.raises(MediaError) as e: fetch_url(base+path, tmp_path/"y", Limits(max_bytes=10**6, timeout_s=20), allow=allow)
    assert e.value.code == code and list(tmp_path.glob("*y*")) == []

def test_fetch_is_limited_in_time(server, tmp_path):
    base, allow = server; t = time.monotonic()
    with pytest.raises(MediaError) as e: fetch_url(base+"/endless", tmp_path/"y", Limits(timeout_s=1), allow=allow)
    assert e.value.code == "timeout" and time.monotonic()-t < 10

def test_ingest_urls(server, clips, tmp_path):
    base, allow = server
    stage = ingest([base+"/a.mp4", base+"/gone.mp4"], tmp_path/"out", replace(QUIET, allow_hosts=allow))
    found = load_clips(stage, rejected=True)
    assert sorted(c.reason for c in found) == ["", "fetch_failed"] and load_clips(stage)[0].source == base+"/a.mp4"

@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1",
                                  "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1", "localhost"])
def test_private_addresses(host):
    with pytest.raises(MediaError): public_address(host, 80)

# -- real files -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_real_files(tmp_path):
    stage = ingest(SHARED/"videos", tmp_path/"out", QUIET); r = rows(stage)
    bad = {k: c.reason for k, c in r.items() if c.reason}
    assert bad == {"audio_only_opus.mp4": "no_video", "bad_text_named.mp4": "not_media", "bad_truncated_60pct.mp4": "truncated",
                   "empty_zero_byte.webm": "empty_file", "vp9_invalid_bitstream.webm": "decode_failed",
                   "wrong_ext_matroska.mp4": "same_bytes"}, bad
    assert r["bad_faststart_cut_half.mp4"].flags == ["incomplete"] and r["man_fragmented.mp4"].duration < 2
    assert (r["decord_rot90.mov"].width, r["decord_rot90.mov"].height) == (320, 568) and r["no_duration_dark.webm"].duration > 4
    assert (stage/"datasheet.html").exists()

def test_small_reader_follows_time(clips):
    x = read_small(clips[0], [0, 1.9], 32)
    where = [(f[..., 0].astype(int)-f[..., 2] > 60).nonzero()[1].mean() for f in x]
    assert x.shape == (2, 32, 32, 3) and where[0] < 8 and where[1] > 24

@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_every_real_file_becomes_a_row(tmp_path):
    "Videos, edited copies and speech: each file is a clip or a row with a reason, none is lost."
    stage = ingest(SHARED, tmp_path/"out", QUIET)
    found = load_clips(stage, rejected=True)
    assert {os.path.realpath(c.uri) for c in found} == {os.path.realpath(p) for p in SHARED.rglob("*") if p.suffix.lower() in data.VIDEO_SUFFIXES} and len(found) > 160
    assert all(c.reason in REASONS or (c.duration > 0 and c.n_frames >= 2 and c.width and c.height) for c in found)
    assert sum(not c.reason for c in found) > 150
