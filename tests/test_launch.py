"From stage folders to a trained model by command: data, plan, missing tokens, processes that die, ready configurations."
import json, os, signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_training import finish, losses, start
from typer.testing import CliRunner
from video_vlm.cli import app
from video_vlm.data import IngestConfig, Sample, VideoVLMError, add_text, chat, ingest, load_clips, load_samples, save_samples, utc_now
from video_vlm.dedup import DedupConfig, dedup
from video_vlm.filters import FilterConfig, Rule, filter_clips, load_refused
from video_vlm.launch import Assumptions, Job, capacity, capacity_table, clip_set, encode_missing, estimate, launch, model_of, not_taken, prepare, show_plan, stage_clips, with_speech, worker
from video_vlm.model import base, large
from video_vlm.scale import encode_clips
from video_vlm.splits import SplitConfig, split
from video_vlm.training import DataChanged, TrainingError, begin, instruct, without_video
from video_vlm.world import WorldConfig, write_world

QUICK = dict(clips=2, questions=2, lora_rank=2, save_every=2)

@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    "Six small generated clips, ingested, with a file of text conversations; their tokens are stored."
    root = tmp_path_factory.mktemp("launch")
    write_world(root/"videos", WorldConfig(n=6, level="easy", size=64), workers=1, progress=False)
    ingest(root/"videos", root/"00_ingest", IngestConfig(licence="CC0-1.0"))
    save_samples([without_video(s) for s in load_samples(root/"00_ingest")[:10]], root/"chat.jsonl")
    prepare(Job(instruct(**QUICK), (str(root/"00_ingest"),), str(root/"first")), progress=False)
    return root

def job(stage, out, **kw): return Job(instruct(**{"steps": 4, **QUICK, **kw.pop("recipe", {})}), (str(stage/"00_ingest"), str(stage/"chat.jsonl")), str(out), tokens=str(stage/"tokens"), **kw)

def test_data_of_a_job(stage, tmp_path):
    model, processor = model_of("tiny")
    data = clip_set(job(stage, tmp_path), processor, model.encoder)
    assert set(data.sources) == {"video", "text"} and len(data.groups["video"]) == 6
    assert all(data.visual(int(k)).n_tokens <= data.lengths[k] for k in data.groups["video"])

def test_a_dry_run_writes_nothing(stage, tmp_path):
    r = CliRunner().invoke(app, ["train", "--data", str(stage/"00_ingest"), "--out", str(tmp_path/"o"), "--tracker", "none", "--dry-run"])
    assert r.exit_code == 0, r.output
    assert all(w in r.output for w in ("recipe", "memory", "MiB a process", "h (", "M trained", "passes over the data")) and not (tmp_path/"o").exists()

def test_wrong_calls_say_what_is_right(stage, tmp_path):
    call = lambda *a: CliRunner().invoke(app, ["train", "--out", str(tmp_path), "--tracker", "none", *a]).exception
    assert "does not exist" in str(call("--data", "nowhere"))
    assert "connect, instruct, whole" in str(call("--data", str(stage/"00_ingest"), "--recipe", "deluxe"))
    with pytest.raises(TrainingError, match="6 of 6 clips have no stored tokens"): prepare(replace(job(stage, tmp_path/"p", encode=False), tokens=str(tmp_path/"none")))
    with pytest.raises(VideoVLMError, match="at least one"): launch(job(stage, tmp_path/"q"), 0)

def test_what_a_filter_refused_is_not_trained_on_and_the_plan_says_so(stage, tmp_path):
    ingested = load_clips(stage/"00_ingest"); bar = sorted(c.duration for c in ingested)[2]; short = {c.id for c in ingested if c.duration < bar}
    f = filter_clips(stage/"00_ingest", tmp_path/"00b_filters", FilterConfig(progress=False, workers=1, rules=(("duration", Rule(bar)),)))
    assert short and set(load_refused(f)) == short and load_refused(f)[next(iter(short))] == ["duration"]
    paths = (str(stage/"00_ingest"), str(f)); assert set(stage_clips(paths)[0]) == {c.id for c in ingested}-short and not_taken(paths) == {"filter": len(short)}
    plan = estimate(Job(instruct(**QUICK), paths, str(tmp_path/"o"))); assert f"{len(short)} not taken (filter)" in show_plan(job(stage, tmp_path), plan)

def test_what_is_said_in_a_clip_is_trained_on(stage, tmp_path):
    write_world(tmp_path/"videos", WorldConfig(n=2, level="easy", size=64), workers=1, progress=False); clip = sorted((tmp_path/"videos").rglob("*.mp4"))[0]
    clip.with_suffix(".srt").write_text("1\n00:00:00,200 --> 00:00:01,000\nlook at the ring\n"); ingest(tmp_path/"videos", tmp_path/"00_ingest", IngestConfig(progress=False))
    clips, samples, _ = stage_clips([tmp_path/"00_ingest"]); heard = [i for i, c in clips.items() if c.transcript]
    texts = lambda i: [p["text"] for p in samples[i][0].messages[0]["content"] if p["type"] == "text"]
    assert len(heard) == 1 and texts(heard[0])[0] == "Transcript: 0.2s look at the ring\n" and len(texts(heard[0])) == 2 and all(len(texts(i)) == 1 for i in clips if i not in heard)
    span = with_speech(Sample("s", chat("v", "q?", "a", 4., 6.)), [dict(start=a, end=a+1., text=t*1000) for a, t in ((0., "x"), (4., "a"), (5., "b"), (5.5, "c"))])
    assert span.messages[0]["content"][1]["text"] == f"Transcript: 4.0s {'a'*1000} 5.0s {'b'*1000}\n" and with_speech(span, [dict(start=4., end=5., text="no")]) == span

def test_a_run_as_of_a_day_takes_what_was_known_then(stage, tmp_path):
    write_world(tmp_path/"videos", WorldConfig(n=3, level="easy", size=64), workers=1, progress=False); f = tmp_path/"videos"/"annotations.jsonl"
    rows = [json.loads(l) for l in f.read_text().splitlines()]; f.write_text("".join(json.dumps({**r, "created_at": "2024-01-05" if i % 2 else "2024-03-01"})+"\n" for i, r in enumerate(rows)))
    st = ingest(tmp_path/"videos", tmp_path/"00_ingest", IngestConfig(progress=False, collected_at="2024-01-02")); ids = [c.id for c in load_clips(st)]
    add_text(st, [dict(id=ids[0], start=0., end=1., text="said", by="asr", known_at="2024-01-03"), dict(id=ids[0], start=1., end=2., text="heard later", by="asr", known_at="2024-05-01")])
    save_samples([replace(without_video(load_samples(st)[0]), id="d", created_at=""), replace(without_video(load_samples(st)[0]), id="e", created_at="2023-01-01")], tmp_path/"chat.jsonl")
    paths = [st, tmp_path/"chat.jsonl"]; clips, samples, plain = stage_clips(paths, day="2024-02-01"); every = stage_clips(paths)[1]
    assert {s.created_at for v in samples.values() for s in v} == {"2024-01-05"} and {s.created_at for v in every.values() for s in v} == {"2024-01-05", "2024-03-01"}
    assert [s.id for e in plain for s in e] == ["e"] and "heard later" not in str(samples) and "said" in str(samples.get(ids[0], "said"))
    assert not_taken(paths, "2024-01-01") == {"not known on 2024-01-01": 3} and not_taken(paths, "2024-01-02") == {}
    with pytest.raises(VideoVLMError, match="nothing to train on"): stage_clips([st], day="2024-01-01")
    with pytest.raises(VideoVLMError, match="ISO date"): stage_clips(paths, day="soon")

def test_the_recipe_records_the_day_and_a_run_keeps_it(stage, tmp_path):
    model, processor = model_of("tiny"); day = utc_now()[:10]; j = job(stage, tmp_path/"o", recipe=dict(as_of=day)); (tmp_path/"o").mkdir(); begin(j.recipe, clip_set(j, processor, model.encoder), tmp_path/"o")
    assert json.loads((tmp_path/"o"/"run.json").read_text())["recipe"]["as_of"] == day
    for other in ("", "2099-01-01"):
        with pytest.raises(DataChanged, match="another recipe"): begin(replace(j.recipe, as_of=other), clip_set(replace(j, recipe=replace(j.recipe, as_of=other)), processor, model.encoder), tmp_path/"o")
    plan = CliRunner().invoke(app, ["train", "--data", str(stage/"00_ingest"), "--out", str(tmp_path/"p"), "--tracker", "none", "--dry-run", "--as-of", day]); assert f"known on {day}" in plan.output, plan.output
    for bad in ("soon", "2024-13-01", "2024-1-1"): assert "ISO date" in str(CliRunner().invoke(app, ["train", "--data", str(stage/"00_ingest"), "--out", str(tmp_path/"p"), "--as-of", bad]).exception)

def test_tokens_of_encode_are_found_and_nothing_is_encoded_again(stage, tmp_path):
    model, processor = model_of("tiny"); model.encoder.save_pretrained(tmp_path/"03_tokens"/"encoder"); ingested = stage/"00_ingest"
    encode_clips(ingested, tmp_path/"03_tokens"/"encoder", tmp_path/"03_tokens", progress=False, **{k: processor.sampling[k] for k in ("fps", "max_frames")})
    j = Job(instruct(**QUICK), (str(ingested), str(tmp_path)), str(tmp_path/"05"), encode=False)
    assert j.store.folder == tmp_path/"03_tokens"/"tokens" and encode_missing(j, processor, model.encoder, False) == {}

def test_a_finished_run_of_another_recipe_or_start_is_refused(stage, tmp_path):
    done = job(stage, tmp_path/"o"); (tmp_path/"o").mkdir(); full = lambda name, d: (tmp_path/"o"/name).write_text(json.dumps(d, default=str))
    full("manifest.json", {}); full("recipe.json", asdict(done.recipe)); full("job.json", asdict(done)); assert launch(done) == tmp_path/"o"
    for other in (replace(done, recipe=replace(done.recipe, steps=9)), replace(done, model="elsewhere")):
        with pytest.raises(VideoVLMError, match="use a new folder"): launch(other)

def test_held_out_clips_are_asked_while_it_trains(stage, tmp_path, monkeypatch):
    import video_vlm.launch as l
    given = {}; monkeypatch.setattr(l, "train", lambda *a, validate=None, **kw: given.update(validate=validate))
    l.run_job(job(stage, tmp_path/"a")); assert given["validate"] is None
    copies = dedup(stage/"00_ingest", tmp_path/"01", DedupConfig(progress=False, workers=1)); split(stage/"00_ingest", copies, tmp_path/"01a", SplitConfig((.4, .5, .1)))
    l.run_job(replace(job(stage, tmp_path/"a"), data=(str(stage/"00_ingest"), str(tmp_path/"01a")))); model, _ = model_of("tiny")
    assert 0 <= given["validate"](model, 0)["val_accuracy"] <= 1

def test_two_workers_train_from_stage_folders(stage, tmp_path):
    path = prepare(job(stage, tmp_path/"two"), progress=False)
    finish(start(lambda rank: os._exit(worker(path)), out=tmp_path), tmp_path)
    assert len(losses(tmp_path/"two")) == 4 and (tmp_path/"two"/"model"/"config.json").exists()
    assert "00_ingest" in json.loads((tmp_path/"two"/"manifest.json").read_text())["inputs"]

def test_capacity_follows_from_its_assumptions():
    rows = capacity_table()
    assert len(rows) == 12 and all(r["rates"].startswith("assumed") for r in rows)
    a, b = capacity(base(), 10**6), capacity(base(), 10**6, Assumptions(mfu=.7))
    assert abs(a["train_h"]/b["train_h"]-2) < 1e-6 and capacity(large(), 10**6)["train_h"] > a["train_h"]
    assert capacity(base(), 10**6, rates=dict(frames_s=100., ids_s=1e4, device="x", usd_hour=0.))["train_h"] == pytest.approx(10**6*a["ids_a_clip"]/1e4/3600)

def command(*a, **kw): return subprocess.Popen([sys.executable, "-c", "from video_vlm.cli import main; main()", "train", *a], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **kw)

@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_command_with_a_message_and_the_same_command_goes_on(stage, tmp_path):
    (tmp_path/"r.json").write_text(json.dumps({**json.loads((prepare(job(stage, tmp_path/"x"), False)).read_text())["recipe"], "steps": 400}))
    call = ["--recipe", str(tmp_path/"r.json"), "--data", str(stage/"00_ingest"), "--out", str(tmp_path/"o"), "--tokens", str(stage/"tokens"), "--processes", "2", "--tracker", "none"]
    p, until = command(*call), time.time()+400
    while time.time() < until and not list((tmp_path/"o").glob("checkpoints/step_*")): time.sleep(.2)
    workers = [int(d.name) for d in Path("/proc").iterdir() if d.name.isdigit() and (d/"status").exists() and f"PPid:\t{p.pid}\n" in (d/"status").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    _, err = p.communicate(timeout=200)
    last = err.strip().splitlines()[-1]
    assert p.returncode == 2 and "was ended by SIGKILL" in last and "The same command goes on from step" in last, err[-800:]
    p = command(*call); until = time.time()+400
    first = len(losses(tmp_path/"o"))
    while time.time() < until and len((tmp_path/"o"/"log.jsonl").read_text().splitlines()) < first+3: time.sleep(.2)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    steps = [s for s, _ in losses(tmp_path/"o")]
    assert steps == list(range(len(steps))) and len(steps) >= first

CONFIGS = sorted((Path(__file__).parent.parent/"configs"/"accelerate").glob("*.yaml"))

@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_parse(path):
    from accelerate.commands.config.config_args import load_config_from_file
    c = load_config_from_file(str(path))
    assert c.num_processes == dict(cpu=1, gpu1=1, gpu2=2, gpu8=8, two_nodes=16)[path.stem] and c.num_machines == (2 if path.stem == "two_nodes" else 1)

@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_launch_the_tiny_preset_on_a_cpu(stage, tmp_path, path):
    "As far as a machine without GPUs can: accelerate reads the file, `--cpu` takes the place of the devices, one process trains."
    file = prepare(job(stage, tmp_path/"c", recipe=dict(steps=1)), progress=False)
    more = ["--cpu", "--num_processes", "1", "--num_machines", "1"]
    r = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *more, "-m", "video_vlm.launch", str(file)], capture_output=True, text=True, timeout=600)
    assert r.returncode == 0 and (tmp_path/"c"/"manifest.json").exists(), r.stderr[-1500:]

@pytest.mark.slow
def test_torchrun_starts_two_sharded_processes(stage, tmp_path):
    file = prepare(job(stage, tmp_path/"t", shard=True), progress=False)
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "video_vlm.launch", str(file)], capture_output=True, text=True, timeout=900)
    assert r.returncode == 0 and len(losses(tmp_path/"t")) == 4, r.stderr[-1500:]
