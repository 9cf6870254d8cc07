"Notebook 03: every pool keeps its promise of tokens, for every frame count; what is masked, batched or saved changes nothing."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import SiglipConfig, SiglipModel

import video_vlm.encoder as E
from video_vlm.data import VideoVLMError
from video_vlm.frames import FramePlan

TOWER = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)

def make(pool, group=2, spatial=2, seed=0):
    torch.manual_seed(seed)
    return E.VideoEncoder(E.EncoderConfig(tower=TOWER, pool=pool, group=group, spatial=spatial)).eval()

def plan(T, g=2, n=4): return FramePlan(times=tuple(np.arange(T)/4), start=0., end=T/4, policy="fps", size=32, group=g, tokens_per_group=n)
def frames(T, seed=0): return np.random.default_rng(seed).integers(0, 256, (T, 32, 32, 3), dtype=np.uint8)

@pytest.mark.parametrize("pool", E.POOLS)
def test_every_frame_count_from_1_to_200(pool):
    "The pool alone, on random patches: as many tokens as the plan says, finite, and the partial last group as if its frames were all there is."
    p = make(pool).pool
    for T in range(1, 201):
        g = 1+T % 4
        x, mask = torch.randn(-(-T//g)*g, 16, 8).unflatten(0, (-1, g)), (torch.arange(-(-T//g)*g) < T).view(-1, g)
        with torch.no_grad(): z = p(x, mask)
        assert z.shape == (plan(T, g).n_groups, 4, 8) and z.isfinite().all()
        if T % g:
            k = T % g
            with torch.no_grad(): alone = p(x[-1:, :k], mask[-1:, :k])
            assert torch.allclose(z[-1], alone[0], atol=1e-5), (pool, T, g)

@settings(max_examples=40, deadline=None)
@given(pool=st.sampled_from(sorted(E.POOLS)), T=st.integers(1, 200), g=st.sampled_from([1, 2, 3, 8]), spatial=st.sampled_from([1, 2, 4]), rung=st.booleans())
def test_tokens_are_those_of_the_plan(pool, T, g, spatial, rung):
    "From frames to tokens, on every rung of the ladder."
    e = make(pool, g, spatial)
    n = 1 if rung else e.tokens_per_group
    p = plan(T, g, n); z = e.encode(frames(T), p)
    assert z.shape == (p.n_groups, n, 8) == (p.n_visual_tokens//n, n, 8) and np.isfinite(z).all() and z.dtype == np.float16

@pytest.mark.parametrize("pool", E.POOLS)
def test_batched_is_alone_and_saved_is_kept(pool, tmp_path):
    e, clips = make(pool), [frames(5, 1), frames(8, 2), frames(1, 3)]
    plans = [plan(5), plan(8, 4), plan(1)]
    together = e.encode_many(clips, plans, batch=3)
    for c, p, z in zip(clips, plans, together): assert np.abs(e.encode(c, p).astype(float)-z.astype(float)).max() < 5e-3
    e.save_pretrained(tmp_path)
    again = E.VideoEncoder.from_pretrained(tmp_path)
    assert again.fingerprint == e.fingerprint and np.array_equal(again.encode(clips[0], plans[0]), e.encode(clips[0], plans[0]))
    assert make(pool, seed=1).fingerprint != e.fingerprint

@pytest.mark.parametrize("pool", [k for k in E.POOLS if k != "mean"])
def test_pools_learn(pool):
    "Every parameter of a pool gets a gradient."
    p = make(pool).pool.train()
    p(torch.randn(3, 2, 16, 8), torch.tensor([[1, 1], [1, 1], [1, 0]])).square().sum().backward()
    assert all(q.grad is not None for q in p.parameters())

@pytest.mark.parametrize("pool", ["attention", "mean", "mix", "merge"])
def test_a_token_lies_where_the_projector_believes(pool):
    "A bright patch in one corner weighs most in the token of that corner."
    e = make(pool); x = 1+.01*torch.randn(4, 1, 16, 8)
    for k, corner in enumerate((0, 3, 12, 15)): x[k, 0, corner] = torch.tensor([30., -30.]*4)
    with torch.no_grad(): z = e.pool(x, torch.ones(4, 1))-e.pool(torch.ones(4, 1, 16, 8), torch.ones(4, 1))
    assert z.norm(dim=-1).argmax(1).tolist() == [0, 1, 2, 3]

def test_pruned_tokens_are_in_reading_order():
    "Four spots, one in each corner: they are kept, and come out corner by corner."
    pool = make("prune").pool; x = 1+.01*torch.randn(1, 1, 16, 8)
    for k, corner in enumerate((0, 3, 12, 15)): x[0, 0, corner] = 30*torch.eye(8)[k]
    with torch.no_grad(): z = pool(x, torch.ones(1, 1))
    assert z[0].argmax(-1).tolist() == [0, 1, 2, 3]

def test_grid_order():
    "Tokens that come from the grid's own cells are put back into row-major order, whatever order they come in."
    for side in (1, 2, 3, 5):
        places = E.grid_places(side); shuffled = torch.randperm(side*side)
        order = E.into_grid(places[shuffled][None], side)[0]
        assert shuffled[order].tolist() == list(range(side*side))

def test_merging_loses_nothing():
    "Sizes add up, and the mean of all patches is the mean of the tokens by size."
    pool = make("merge").pool
    x = torch.randn(2, 3, 16, 8); z, c = pool.choose(x)
    assert z.shape == (2, 4, 8) and torch.allclose(c[..., 3].sum(1), torch.tensor([48., 48.]))
    assert torch.allclose((z*c[..., 3:]).sum(1)/48, x.mean((1, 2)), atol=1e-5)

def test_groups_longer_than_a_trained_pool_are_refused():
    for pool in ("mix", "attention"):
        with pytest.raises(VideoVLMError, match="knows 8"): make(pool).pool(torch.randn(1, 9, 16, 8), torch.ones(1, 9))

def test_a_whole_siglip_folder_gives_its_tower(tmp_path):
    "Vision and text in one folder, as they are published; heads and text are left behind; another resolution stretches the positions."
    cfg = SiglipConfig(vision_config=TOWER, text_config=dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    whole = SiglipModel(cfg).eval(); whole.save_pretrained(tmp_path)
    e = E.load_encoder(tmp_path, spatial=2)
    px = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(e.tower(px).last_hidden_state, whole.vision_model(px).last_hidden_state, atol=1e-5)
    wide = E.load_encoder(tmp_path, spatial=3, size=48)
    assert wide.size == 48 and wide.tokens_per_group == 4 and wide.encode(np.zeros((3, 48, 48, 3), np.uint8), FramePlan((0., 1., 2.), 0., 3., size=48, tokens_per_group=4)).shape == (2, 4, 8)
    with pytest.raises(VideoVLMError, match="multiple"): E.load_encoder(tmp_path, size=50)
    with pytest.raises(VideoVLMError, match="divide"): E.load_encoder(tmp_path, spatial=3)

def test_half_precision_is_close():
    e = make("mean"); x, p = frames(4), plan(4)
    assert np.abs(e.encode(x, p).astype(float)-e.encode(x, p, precision="bf16").astype(float)).max() < .1
    with pytest.raises(VideoVLMError, match="at least one"): e.encode(frames(0), p)

def test_compiled_is_the_same():
    "torch.compile traces the encoder (here without a C++ compiler: the graph is run as it is)."
    e, x, p = make("mix"), frames(5), plan(5)
    plain = e.encode(x, p)
    e.compile(backend="eager")
    np.testing.assert_allclose(e.encode(x, p), plain, atol=1e-3)
