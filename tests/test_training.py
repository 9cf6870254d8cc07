"Training: a real SIGKILL, resumed bit-equal; guards and bookkeeping of the loop on random tokens. Several processes: test_training_processes.py."
import json, multiprocessing, os, signal, socket, subprocess, time, traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from video_vlm.data import VideoVLMError
from video_vlm.encoder import EncoderConfig, VideoEncoder, VisualTokens
from video_vlm.model import assemble, tiny, tiny_tokenizer
from video_vlm.training import (ClipSet, DiskFull, TrainingError, collate, connect, instruct, load_recipe, load_state, make_accelerator, make_batch, make_optimizers, passes, prune, recipe_from,
    save_state, step_rows, train, train_step, trainable, usual_loss, whole, without_video)
from video_vlm.world import make_scene, samples_of

FORK = multiprocessing.get_context("fork")   # real processes without a second import of torch

def make_parts(seed=0):
    "((model, processor), data): a model of one layer, eight clips of random tokens."
    samples = [samples_of(make_scene(k, "easy"), str(k)) for k in range(8)]
    tok = tiny_tokenizer([p.get("text", "") for ss in samples for s in ss for m in s.messages for p in m["content"]], 600)
    rng = np.random.default_rng(0)
    fake = {str(k): VisualTokens(rng.normal(size=(2, 4, 16)).astype(np.float16), np.arange(2.), np.arange(2.)+1, str(k)) for k in range(8)}
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny(len(tok), 32, 1).text_config)
    return assemble(VideoEncoder(EncoderConfig(tower=tower)), lm, tok), ClipSet(list(fake), samples, fake.get)

@pytest.fixture
def parts(): return make_parts

def losses(out): return [(r["step"], r["loss"]) for r in map(json.loads, open(Path(out)/"log.jsonl"))]

def rank_main(rank, n, port, out, fn, args):
    "A forked process: `fn(rank, *args)`, its traceback in a file."
    from accelerate.state import AcceleratorState, PartialState
    if n > 1:
        for k, v in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items(): os.environ[k] = str(v)
    AcceleratorState._reset_state(); PartialState._reset_state(); torch.set_num_threads(1)
    try: fn(rank, *args); code = 0
    except BaseException: Path(out, f"trace_{rank}.txt").write_text(traceback.format_exc()); code = 1
    os._exit(code)

def start(fn, *args, out, n=2):
    "Fork `n` ranks that run `fn(rank, *args)`."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    ps = [FORK.Process(target=rank_main, args=(r, n, port, str(out), fn, args)) for r in range(n)]
    for p in ps: p.start()
    return ps

def finish(ps, out, seconds=600):
    "Wait for ranks; all must end well."
    until = time.time()+seconds
    for p in ps: p.join(max(1, until-time.time()))
    alive = [p for p in ps if p.is_alive()]
    for p in alive: p.kill()
    assert not alive, "hangs"
    assert [p.exitcode for p in ps] == [0]*len(ps), "\n".join(f.read_text()[-1500:] for f in Path(out).glob("trace_*.txt"))

def kill_after(ps, log, n, most):
    "SIGKILL to all ranks once the log has `n` lines."
    until = time.time()+300
    while time.time() < until and (not log.exists() or len(log.read_text().splitlines()) < n): time.sleep(.02)
    for p in ps: os.kill(p.pid, signal.SIGKILL)
    for p in ps: p.join()
    assert n <= len(log.read_text().splitlines()) < most

def test_sigkill_and_resume_give_the_same_losses(tmp_path):
    def body(rank, out, slow=None):
        (model, processor), data = make_parts()
        train(model, processor, data, whole(steps=24, clips=4, questions=4, save_every=5), out, extra=slow, progress=False)
    finish(start(body, tmp_path/"straight", out=tmp_path, n=1), tmp_path)
    kill_after(start(body, tmp_path/"killed", lambda *a: time.sleep(.1) or 0., out=tmp_path, n=1), tmp_path/"killed"/"log.jsonl", 13, 24)
    assert not (tmp_path/"killed"/"manifest.json").exists()
    finish(start(body, tmp_path/"killed", out=tmp_path, n=1), tmp_path)
    assert losses(tmp_path/"killed") == losses(tmp_path/"straight")

def test_a_half_written_checkpoint_is_not_read(parts, tmp_path):
    (model, processor), data = parts()
    r = whole(steps=4, clips=4, questions=2, save_every=2)
    opts = make_optimizers(model, r)
    (tmp_path/"c"/".tmp_1").mkdir(parents=True)
    (tmp_path/"c"/".tmp_1"/"state.pt").write_bytes(b"half")
    assert load_state(model, opts, tmp_path/"c") == 0

@pytest.mark.parametrize("recipe", [connect(steps=2, clips=2), instruct(steps=2, clips=2, lora_rank=2), whole(steps=2, clips=2, blind=.5)])
def test_only_what_the_recipe_names_moves(parts, tmp_path, recipe):
    (model, processor), data = parts()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, processor, data, recipe, tmp_path/"r", progress=False)
    moved = {n.replace(".base_layer", "").split(".")[0] for n, p in model.named_parameters() if ".lora_" not in n and not torch.equal(p, before[n.replace(".base_layer", "")])}
    assert moved == {"projector"} | ({"language_model"} if "language_model" in recipe.trains else set())
    assert (tmp_path/"r"/"model"/"config.json").exists() and (tmp_path/"r"/"manifest.json").exists()

def test_gradients_that_are_not_finite_end_the_run_with_a_message(parts, tmp_path):
    (model, processor), data = parts()
    with pytest.raises(TrainingError, match="ten steps"):
        train(model, processor, data, whole(steps=20, clips=2), tmp_path/"nan", extra=lambda m, b, c: m.get_input_embeddings().weight.sum()*float("nan"), progress=False)

def test_wrong_recipes_are_refused(parts):
    (model, _), data = parts()
    with pytest.raises(VideoVLMError, match="choose from"): trainable(model, whole(trains=("everything",)))
    with pytest.raises(VideoVLMError, match="adamw or muon"): make_optimizers(model, whole(optimizer="sgd"))
    with pytest.raises(VideoVLMError, match="nothing to train on"): ClipSet([], [], None)

def test_two_ranks_see_the_clips_of_one(parts):
    (_, processor), data = parts()
    r = instruct(clips=4, questions=3)
    one = make_batch(data, r, 1, processor.tokenizer)["clips"]
    two = [make_batch(data, r, 1, processor.tokenizer, k, 2)["clips"] for k in range(2)]
    assert sorted(one) == sorted(two[0]+two[1]) and len(two[0]) == len(two[1])

def one_step(parts, recipe, batches=None, **kw):
    "Loss of one step and the model after it."
    (model, processor), data = parts()
    opts = make_optimizers(model.train(), recipe)
    if recipe.checkpointing: model.language_model.gradient_checkpointing_enable(dict(use_reentrant=False))
    rows = step_rows(data, recipe, 0, processor.tokenizer)
    n = recipe.micro or len(rows)
    row = train_step(make_accelerator(), model, opts, recipe, [collate(rows[i:i+n], processor.tokenizer) for i in range(0, len(rows), n)], 0, **kw)
    return row, model

def test_micro_batches_and_recomputed_activations_give_the_same_step(parts):
    r = whole(clips=4, questions=3, optimizer="adamw")
    row, model = one_step(parts, r)
    for other in (replace(r, micro=1), replace(r, micro=3), replace(r, checkpointing=True)):
        row2, model2 = one_step(parts, other)
        assert abs(row2["loss"]-row["loss"]) < 1e-5 and abs(row2["grad_norm"]-row["grad_norm"]) < 1e-4*row["grad_norm"]
        assert max(float((p-q).abs().max()) for p, q in zip(model.parameters(), model2.parameters())) < 1e-4

def test_a_spike_is_left_out_and_said(parts):
    (before, _), _ = parts()
    row, model = one_step(parts, whole(clips=2), usual=.01)
    assert row["skipped"] and row["why"] == "spike" and row["loss"] > 1.5
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), model.parameters()))
    assert not one_step(parts, whole(clips=2, spike=0.), usual=.01)[0]["skipped"]
    assert usual_loss([dict(loss=1., skipped=False)]*19) is None and usual_loss([dict(loss=1., skipped=False)]*20+[dict(loss=9., skipped=True)]) == 1.

def test_padding_of_a_skewed_mixture_is_at_most_a_tenth(parts):
    (_, processor), few = parts()
    rng = np.random.default_rng(0)
    groups = np.clip(np.exp(rng.normal(1.5, .9, 400)).astype(int), 1, 60)
    vt = {f"c{k}": VisualTokens(np.zeros((g, 4, 16), np.float16), np.arange(float(g)), np.arange(float(g))+1, f"c{k}") for k, g in enumerate(groups)}
    samples = [few.samples[k % 8] for k in range(400)]+[[without_video(s) for s in few.samples[k % 8]] for k in range(40)]
    data, r = ClipSet([*vt, *(f"t{k}" for k in range(40))], samples, vt.get), instruct(clips=8, questions=6)
    ids = [[len(x["input_ids"]) for x in p] for s in range(24) for p in passes(step_rows(data, r, s, processor.tokenizer), r.clips)]
    padding = 1-sum(map(sum, ids))/sum(len(i)*max(i) for i in ids)
    shuffled = np.random.default_rng(1).permutation([n for i in ids for n in i]).reshape(-1, 8)
    assert padding <= .1 < 1-shuffled.sum()/(8*shuffled.max(1)).sum(), padding

def test_checkpoints_that_are_kept(tmp_path):
    for s in range(10, 80, 10): (tmp_path/f"step_{s:07d}").mkdir()
    prune(tmp_path, 2, 30)
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step_*"))] == [30, 60, 70]

def test_a_full_disk_leaves_the_last_checkpoint_whole(parts, tmp_path):
    small, r = tmp_path/"small", whole(steps=6, clips=2, questions=2, save_every=2)
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True).returncode: pytest.skip("no right to mount a small disk")
    def fill(model, batch, clips):
        fill.n += 1
        if fill.n == 4:
            with open(small/"filler", "wb", 0) as f:
                try:
                    while True: f.write(bytes(4096))
                except OSError: pass
        return 0.
    fill.n = 0
    try:
        (model, processor), data = parts()
        with pytest.raises(DiskFull, match="make room and run the same command again; it goes on from"): train(model, processor, data, r, small/"run", extra=fill, progress=False)
        assert not list((small/"run"/"checkpoints").glob(".tmp*"))
        (small/"filler").unlink()
        (model, processor), data = parts()
        train(model, processor, data, r, small/"run", progress=False)
        (model, processor), data = parts()
        assert losses(small/"run") == losses(train(model, processor, data, r, tmp_path/"straight", progress=False))
    finally: subprocess.run(["umount", "-l", str(small)])

def test_a_file_that_may_not_grow_is_reported_as_a_full_disk(parts, tmp_path, monkeypatch):
    import resource
    (model, _), _ = parts()
    opts, old = make_optimizers(model, whole()), resource.getrlimit(resource.RLIMIT_FSIZE)
    save_state(model, opts, 1, tmp_path/"c")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(DiskFull, match="goes on from step_0000001"): save_state(model, opts, 2, tmp_path/"c")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [p.name for p in (tmp_path/"c").iterdir()] == ["step_0000001"] and load_state(model, opts, tmp_path/"c") == 1

def test_a_second_run_in_the_same_folder_is_refused(parts, tmp_path):
    from filelock import FileLock
    (model, processor), data = parts()
    with FileLock(tmp_path/".lock"), pytest.raises(TrainingError, match="another run is writing"): train(model, processor, data, whole(steps=1), tmp_path, progress=False)

def test_recipes_from_files(tmp_path):
    (tmp_path/"mine.json").write_text(json.dumps(dict(name="mine", lr=.1, trains=["lora"], mix=[["video", 1]])))
    assert load_recipe(tmp_path/"mine.json") == recipe_from(dict(name="mine", lr=.1, trains=["lora"], mix=[["video", 1]])) and load_recipe(tmp_path/"mine.json").mix == (("video", 1),)
    (tmp_path/"bad.json").write_text('{"steps": 3, "speed": 1}')
    with pytest.raises(VideoVLMError, match="no speed"): load_recipe(tmp_path/"bad.json")

def test_trackers_are_checked_before_anything_runs(parts, tmp_path):
    (model, processor), data = parts()
    with pytest.raises(TrainingError, match="unknown tracker 'diary'"): train(model, processor, data, whole(steps=1), tmp_path, trackers=("diary",), progress=False)

@pytest.mark.slow
def test_trackers_of_accelerate(parts, tmp_path):
    pytest.importorskip("tensorboard"); pytest.importorskip("mlflow")
    (model, processor), data = parts()
    train(model, processor, data, whole(steps=2, clips=2), tmp_path/"r", trackers=("tensorboard", "mlflow"), progress=False)
    assert list((tmp_path/"r"/"trackers").rglob("events.out.tfevents*")) and (tmp_path/"r"/"trackers"/"mlflow.db").exists()
