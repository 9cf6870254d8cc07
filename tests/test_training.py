"Training: a real SIGKILL, resumed bit-equal; the rest of the loop on random tokens."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from video_vlm.data import VideoVLMError
from video_vlm.training import ClipSet, TrainingError, connect, instruct, load_state, make_batch, make_optimizers, train, trainable, whole

CODE = '''
import sys, time, numpy as np, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from video_vlm.encoder import EncoderConfig, VideoEncoder, VisualTokens
from video_vlm.model import assemble, tiny, tiny_tokenizer
from video_vlm.training import ClipSet, train, whole
from video_vlm.world import make_scene, samples_of

def parts(seed=0):
    samples = [samples_of(make_scene(k, "easy"), str(k)) for k in range(8)]
    tok = tiny_tokenizer([p.get("text", "") for ss in samples for s in ss for m in s.messages for p in m["content"]], 600)
    rng = np.random.default_rng(0)
    fake = {str(k): VisualTokens(rng.normal(size=(2, 4, 16)).astype(np.float16), np.arange(2.), np.arange(2.)+1, str(k)) for k in range(8)}
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny(len(tok), 32, 1).text_config)
    return assemble(VideoEncoder(EncoderConfig(tower=tower)), lm, tok), ClipSet(list(fake), samples, fake.get)

if __name__ == "__main__":
    (model, processor), data = parts()
    slow = (lambda *a: time.sleep(.1) or 0.) if len(sys.argv) > 2 else None
    train(model, processor, data, whole(steps=24, clips=4, questions=4, save_every=5), sys.argv[1], extra=slow, progress=False)
'''

@pytest.fixture(scope="module")
def script(tmp_path_factory):
    f = tmp_path_factory.mktemp("train")/"train_script.py"
    f.write_text(CODE)
    return f

@pytest.fixture(scope="module")
def parts(script):
    space = {"__name__": "parts"}
    exec(CODE, space)
    return space["parts"]

def losses(out): return [(r["step"], r["loss"]) for r in map(json.loads, open(Path(out)/"log.jsonl"))]

def run(script, out, *more, **kw): return subprocess.Popen([sys.executable, str(script), str(out), *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **kw)

def test_sigkill_and_resume_give_the_same_losses(script, tmp_path):
    assert run(script, tmp_path/"straight").wait() == 0
    p = run(script, tmp_path/"killed", "slow")
    log = tmp_path/"killed"/"log.jsonl"
    until = time.time()+120
    while time.time() < until and (not log.exists() or len(log.read_text().splitlines()) < 13): time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    n = len(log.read_text().splitlines())
    assert 12 < n < 24, n
    assert not (tmp_path/"killed"/"manifest.json").exists()
    assert run(script, tmp_path/"killed").wait() == 0
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
