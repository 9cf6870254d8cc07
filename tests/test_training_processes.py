"Several processes on one machine, over gloo: equal to one process, killed and resumed, a text-only rank, a rank that dies, sharding, launch by command."
import itertools, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import finish, kill_after, losses, make_parts, start
from video_vlm.training import ClipSet, instruct, step_rows, train, whole, without_video

def with_text():
    "The model and clips of test_training, with four entries of text."
    (model, processor), data = make_parts()
    return model, processor, ClipSet(data.ids+[f"t{k}" for k in range(4)], data.samples+[[without_video(s) for s in data.samples[k]] for k in range(4)], data.tokens)

def one(recipe, out, **kw):
    from accelerate.state import AcceleratorState, PartialState
    AcceleratorState._reset_state(); PartialState._reset_state()
    return losses(train(*with_text(), recipe, out, progress=False, **kw))

def two(recipe, out, folder, **kw):
    ps = start(lambda rank: one(recipe, out, **kw), out=folder)
    finish(ps, folder)
    return losses(out)

R = whole(steps=50, clips=4, questions=2, optimizer="adamw", lr=1e-3, mix=(("video", .7), ("text", .3)), save_every=20)

@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    d = tmp_path_factory.mktemp("curves")
    return np.array(one(R, d/"one")), np.array(two(R, d/"two", d)), d

def test_two_processes_give_the_curve_of_one(curves):
    a, b, _ = curves
    assert len(a) == 50 and a[-1, 1] < a[0, 1]
    assert np.abs(a-b).max() < 1e-4, np.abs(a-b).max()

def test_some_steps_had_text_on_one_rank_and_video_on_the_other(curves):
    _, processor, data = with_text()
    seen = [tuple(any(r["clip"] is not None for r in step_rows(data, R, s, processor.tokenizer, rank, 2)) for rank in range(2)) for s in range(50)]
    assert (True, False) in seen or (False, True) in seen, "the mixture never separated them"

def test_two_processes_killed_and_resumed_are_bit_equal(curves, tmp_path):
    slow = lambda *a: time.sleep(.05) or 0.
    ps = start(lambda rank: one(R, tmp_path/"killed", extra=slow), out=tmp_path)
    kill_after(ps, tmp_path/"killed"/"log.jsonl", 27, 50)
    assert two(R, tmp_path/"killed", tmp_path) == [tuple(x) for x in curves[1].tolist()]

def test_from_one_process_to_two_and_back_differs_by_rounding_only(curves, tmp_path):
    class Stop(Exception): pass
    def stop(model, batch, clips):
        stop.n += 1
        if stop.n == 25: raise Stop
        return 0.
    stop.n = 0
    with pytest.raises(Stop): one(R, tmp_path/"e", extra=stop)
    got, a = np.array(two(R, tmp_path/"e", tmp_path)), curves[0]
    assert np.abs(got[:20]-a[:20]).max() < 1e-6 and np.abs(got-a).max() < 1e-4

def dies(at):
    "An extra loss of zero that kills its process in step `at` (0: never)."
    steps = itertools.count(1)
    def extra(*a):
        if next(steps) == at: os.kill(os.getpid(), signal.SIGKILL)
        return 0.
    return extra

def test_a_rank_that_dies_ends_the_others(tmp_path):
    ps = start(lambda rank: one(R, tmp_path/"d", extra=dies(4 if rank == 1 else 0)), out=tmp_path)
    for p in ps: p.join(400)
    assert not any(p.is_alive() for p in ps), "rank 0 waits for a dead one"
    assert ps[1].exitcode == -signal.SIGKILL and ps[0].exitcode == 1
    assert len(losses(tmp_path/"d")) == 3

def test_a_sharded_language_model_gives_the_same_curve(curves, tmp_path):
    r = instruct(steps=12, clips=4, questions=2, lora_rank=2, save_every=5, lr=1e-3)
    a = one(r, tmp_path/"one")
    b = two(r, tmp_path/"sharded", tmp_path, shard=True)
    assert np.abs(np.array(a)-np.array(b)).max() < 1e-4
    from video_vlm.model import load_model
    x, y = (load_model(tmp_path/n/"model", device="cpu")[0].state_dict() for n in ("one", "sharded"))
    assert x.keys() == y.keys() and max(float((x[k]-y[k]).abs().max()) for k in x) < 1e-3

@pytest.mark.slow
def test_sharded_whole_model_killed_and_resumed_with_one_process(tmp_path):
    r = whole(steps=12, clips=4, questions=2, save_every=4, optimizer="adamw")
    a = one(r, tmp_path/"one")
    for p in start(lambda rank: one(r, tmp_path/"s", shard=True, extra=dies(7)), out=tmp_path): p.join(300)
    assert (tmp_path/"s"/"checkpoints"/"step_0000004").exists()
    assert np.abs(np.array(one(r, tmp_path/"s"))-np.array(a)).max() < 1e-3

def test_processes_that_begin_differently_are_refused(tmp_path):
    def body(rank):
        torch.manual_seed(rank)
        model, processor, data = with_text()
        with torch.no_grad(): model.projector.up.weight.add_(rank)
        train(model, processor, data, R, tmp_path/"x", progress=False)
    ps = start(body, out=tmp_path)
    for p in ps: p.join(400)
    assert all("begin with different weights" in f.read_text() for f in tmp_path.glob("trace_*.txt")) and len(list(tmp_path.glob("trace_*.txt"))) == 2
