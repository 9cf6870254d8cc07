"Notebook 04: what a page should not show. Real parts throughout; sizes tiny."
import json, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import (AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config, TextIteratorStreamer)

import video_vlm.model as M
from video_vlm.budget import PRESETS
from video_vlm.encoder import EncoderConfig, VideoEncoder, VisualTokens
from video_vlm.frames import FramePlan

TOWER = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=4)
SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             bos_token_id=0, eos_token_id=2, pad_token_id=0, max_position_embeddings=2048)
TEXTS = ["Which colour is the circle?", "The red circle moves left from 0.5s to 1.5s.", "When does the blue square jump?", "yes no first second"] * 20
LMS = dict(llama=lambda: LlamaConfig(**SMALL, tie_word_embeddings=True), qwen3=lambda: Qwen3Config(**SMALL, tie_word_embeddings=False),
           mistral=lambda: MistralConfig(**SMALL, sliding_window=None),
           gpt2=lambda: GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=2048, bos_token_id=0, eos_token_id=2, pad_token_id=0,
                                   resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.),
           gemma3=lambda: Gemma3TextConfig(**SMALL, sliding_window=4096, layer_types=["sliding_attention", "full_attention"]))

@pytest.fixture(scope="module")
def tok(): return M.tiny_tokenizer(TEXTS, 512)

@pytest.fixture(scope="module")
def proc(tok): return M.VideoVLMProcessor(tok, sampling=dict(fps=4.0))

def make(text=None, seed=0, attn="sdpa", loud=3):
    torch.manual_seed(seed)
    cfg = M.VideoVLMConfig(encoder_config=EncoderConfig(tower=TOWER, pool="mean"), text_config=text or LMS["llama"](), video_token_id=3)
    m = M.VideoVLMForConditionalGeneration(cfg).eval()
    for n, p in m.named_parameters():
        if p.ndim > 1 and not n.startswith("encoder"): p.data.mul_(loud)     # random, but with opinions
    if attn != "sdpa": m.set_attn_implementation(attn)
    return m

def clip(m=3, n=16, seed=0, step=.5):
    x = np.random.default_rng(seed).normal(size=(m, n, 64)).astype(np.float16)
    return VisualTokens(x, np.arange(m) * step, (np.arange(m) + 1) * step, f"{m}-{n}-{seed}-{step}")

def ask(q, k=1): return [{"role": "user", "content": [{"type": "video"}] * k + [{"type": "text", "text": q}]}]
def say(q, a, k=1): return ask(q, k) + [{"role": "assistant", "content": [{"type": "text", "text": a}]}]

A, B, C = clip(3), clip(2, 4, 1), clip(5, 1, 2)
MIXED = [(A, "Which colour is the circle?"), (A, "left?"), (B, "When does the blue square jump?"), (None, "Which?"), ([A, C, B], "first?"), (A, "Which colour is the circle?")]

def by_generate(model, proc, tokens, q, n=6):
    inputs = proc(M.ask_messages(q, len(M.as_list(tokens))), M.as_list(tokens))
    out = model.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=M.stop_ids(proc), pad_token_id=0)
    return proc.tokenizer.decode(out[0, inputs.input_ids.shape[1]:], skip_special_tokens=True).strip()

# ---------------------------------------------------------------- answers
@pytest.mark.parametrize("name", LMS)
def test_packed_answers_equal_generate(name, proc):
    "Any causal language model of transformers, shared prefixes or not, one by one or together: the same words."
    m = make(LMS[name](), loud=3 if name == "gemma3" else 9)
    together = M.answer_batch(m, proc, MIXED, max_new_tokens=6)
    assert len(set(together)) >= 4
    assert together == [M.answer(m, proc, *i, max_new_tokens=6) for i in MIXED] == [by_generate(m, proc, *i) for i in MIXED]
    assert together == M.answer_batch(m, proc, MIXED, max_new_tokens=6, batch_tokens=1)      # every row alone

@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_packed_loss_and_gradient_equal_unpacked(name, attn, tok, proc):
    m = make(LMS[name](), attn=attn)
    samples = [say("Which colour is the circle?", "red"), say("When does it jump?", "from 0.5s to 1.5s."), say("Which?", "yes no", 0),
               say("Which moves?", "yes") + say("left?", "no", 0)]
    batch = M.collate_rows([M.training_rows(samples, A, tok), M.training_rows(samples[:1], C, tok)])
    packed = m(**batch).loss
    packed.backward(); grads = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}; m.zero_grad()
    total, n = 0, 0
    for s, v in [(samples[0], [A]), (samples[1], [A]), (samples[2], []), (samples[3], [A]), (samples[0], [C])]:
        e = proc([s], v, add_generation_prompt=False, return_labels=True); k = (e["labels"] >= 0).sum()
        total, n = total + m(**e).loss * k ** .5, n + k ** .5       # each answer weighs the root of its length
    assert abs(packed.item() - (total / n).item()) < 1e-5
    (total / n).backward()
    worst = max((p.grad - grads[k]).abs().max().item() for k, p in m.named_parameters() if p.grad is not None and k in grads)
    assert worst < 1e-4 and "projector.position" in grads

def test_left_padding_does_not_change_logits(proc):
    m = make()
    batch = proc([ask("Which?", 0), ask("Which colour is the circle?")], [A])
    both = m(**batch).logits
    assert torch.allclose(both[0, -1], m(**proc(ask("Which?", 0))).logits[0, -1], atol=1e-5)
    assert torch.allclose(both[1, -1], m(**proc(ask("Which colour is the circle?"), A)).logits[0, -1], atol=1e-5)

@pytest.mark.parametrize("kw", [dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=2, top_k=1)])
def test_several_answers_a_prompt_keep_their_videos(kw, proc):
    m = make()
    rows = [(ask("Which?", 2), [A, B]), (ask("left?", 0), []), (ask("first?"), [C])]
    batch = proc([r for r, _ in rows], [v for _, vs in rows for v in vs])
    g = dict(max_new_tokens=4, min_new_tokens=4, pad_token_id=0, **kw)
    got = m.generate(**batch, **g)[:, batch.input_ids.shape[1]:].view(3, 2, 4)
    for i, (r, v) in enumerate(rows): assert m.generate(**proc(r, v), **g)[:, -4:].tolist() == got[i].tolist()

def test_streamer_and_turns(proc):
    m = make()
    talk = say("Which?", "red", 2) + ask("And then?")
    s = TextIteratorStreamer(proc.tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = []
    t = threading.Thread(target=lambda: out.append(M.chat(m, proc, talk, [A, B, C], streamer=s, max_new_tokens=5, do_sample=False))); t.start()
    said = "".join(s).strip(); t.join()
    assert said == out[0] == M.answer(m, proc, [A, B, C], talk, max_new_tokens=5)

def test_rungs_and_positions_matter(proc):
    "Every rung is taken; a token's place in the grid changes what the language model sees."
    m = make()
    for n in (16, 4, 1): assert m(**proc(ask("Which?"), clip(3, n))).logits.isfinite().all()
    v = clip(1); w = VisualTokens(v.tokens[:, ::-1].copy(), v.starts, v.ends)
    p = m.project(M.stack_tokens([v])), m.project(M.stack_tokens([w])).flip(0)
    assert (p[0] - p[1]).norm() / p[0].norm() > .1
    with pytest.raises(M.TokenMismatch, match="16 positions"): m(**proc(ask("Which?"), clip(2, 25)))

def test_pixels_are_the_same_as_stored_tokens(proc):
    m = make()
    px, mask = torch.randn(3, 2, 3, 32, 32), torch.tensor([[1, 1], [1, 1], [1, 0]], dtype=torch.bool)
    tokens = m.encoder(px, mask).detach()
    v = VisualTokens(tokens.numpy(), np.arange(3.), np.arange(3.) + 1)
    batch = proc(ask("Which?"), v); ids = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.equal(m(**ids, pixel_values=px, pixel_mask=mask).logits, m(**ids, visual_tokens=tokens).logits)
    a, b = (m.generate(**ids, **x, max_new_tokens=4, do_sample=False) for x in (dict(pixel_values=px, pixel_mask=mask), dict(visual_tokens=tokens)))
    assert torch.equal(a, b)

def test_batch_without_labels_and_checkpointed_training(tok):
    m = make().train(); row = M.collate_rows([M.training_rows([say("Which?", "red")], A, tok)])
    none = m(**{**row, "labels": torch.full_like(row["labels"], -100)}).loss; none.backward(); assert none.item() == 0
    plain = m(**row).loss
    m.gradient_checkpointing_enable(); again = m(**row).loss; again.backward()
    assert torch.allclose(plain, again, atol=1e-6) and m.projector.position.grad.abs().sum() > 0

def test_max_length_of_a_row(tok):
    samples = [say("Which colour is the circle?", "red")] * 6
    row = M.training_rows(samples, A, tok, max_length=120)
    assert len(row["input_ids"]) <= 120 and 1 < row["used"] < 6
    assert M.training_rows(samples, A, tok)["used"] == 6
    with pytest.raises(M.TooLong): M.training_rows(samples, A, tok, max_length=40)

def test_half_precision(proc):
    m = make().to(torch.bfloat16)
    assert M.answer_batch(m, proc, MIXED, max_new_tokens=3) and m(**proc(ask("Which?"), A)).logits.dtype == torch.bfloat16

# ---------------------------------------------------------------- scores
def test_scores_equal_loss_and_choose_prefers_the_likely(proc):
    m = make()
    options = ["red", "blue square", "from 0.5s to 1.5s", "yes"]
    got = M.score_batch(m, proc, [(v, "Which?", o) for v in (A, B) for o in options])
    for (lp, n), (v, o) in zip(got, [(v, o) for v in (A, B) for o in options]):
        e = proc([say("Which?", o)], [v], add_generation_prompt=False, return_labels=True)
        assert n == (e["labels"] >= 0).sum() and abs(lp + m(**e).loss.item() * n) < 1e-4
    i, p = M.choose(m, proc, A, "Which?", options)
    assert i == int(np.argmax([lp / n for lp, n in got[:4]])) and abs(sum(p) - 1) < 1e-6
    assert np.allclose(M.caption_scores(m, proc, A, options, prompt="Which?"), [lp for lp, _ in got[:4]], atol=1e-4)
    m.config.choice_temperature = 5.; assert max(M.choose(m, proc, A, "Which?", options)[1]) < max(p)

def test_only_the_last_turn_is_scored(proc):
    m = make()
    history = say("Which?", "red") + ask("left?", 0)
    (lp, n), = M.score_batch(m, proc, [(A, history, "yes")])
    assert n == len(M.text_ids(proc.tokenizer, "yes")) + 1 and lp < 0

def test_long_answers_do_not_drown_short_ones(tok):
    "Each labelled token of a packed row weighs one over the root of its answer's length; the loss is the weighted mean."
    m = make(); samples = [say("Which?", "yes"), say("When does it jump?", "The red circle moves left from 0.5s to 1.5s.")]
    row = M.training_rows(samples, A, tok); w, l = row["label_weights"], row["labels"] != -100
    lengths = [len(M.text_ids(tok, s[-1]["content"][0]["text"])) + 1 for s in samples]
    assert torch.allclose(w[l], torch.tensor([n ** -.5 for n in lengths for _ in range(n)])) and not w[~l].any()
    batch = M.collate_rows([row]); logits = m(**{**batch, "labels": None, "label_weights": None}).logits
    nll = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:].clamp(min=0), reduction="none")
    assert torch.allclose(m(**batch).loss, (nll * w[1:]).sum() / w[1:].sum(), atol=1e-5)

def test_read_only_tokens_are_taken_without_a_warning(proc):
    "What comes out of the store is read-only, and may be a memory map."
    import warnings
    v = clip(3); v.tokens.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = M.stack_tokens([v, clip(2)])
        M.embed(make_once(), v)
    assert x.dtype == torch.float32 and np.array_equal(x[:3].numpy(), v.tokens.astype(np.float32))
    x[0] = 7; assert v.tokens[0, 0, 0] != 7

# ---------------------------------------------------------------- parity
def random_chat(rng):
    "A request with no, one or several videos, in one turn or more."
    words = lambda: " ".join(rng.choice(["Which", "colour", "is", "the", "circle?", "When", "blue", "square", "0.5s", "left"], rng.integers(1, 6)))
    chat, videos = [], []
    for turn in range(n := int(rng.integers(1, 4))):
        k = int(rng.integers(0, 3)) if turn == 0 else int(rng.random() < .3)
        videos += [clip(int(rng.integers(1, 6)), int(rng.choice([1, 4, 16])), int(rng.integers(99))) for _ in range(k)]
        chat += ask(words(), k) + ([{"role": "assistant", "content": words()}] if turn < n - 1 else [])
    return chat, videos

def test_many_requests_alone_together_and_by_generate(proc):
    "Greedy ids of 24 random requests: packed in one batch, one by one, and by transformers' generate."
    m, rng = make(loud=9), np.random.default_rng(3)
    asked = [random_chat(rng) for _ in range(24)]
    assert any(not v for _, v in asked) and any(len(v) > 1 for _, v in asked) and any(len(c) > 2 for c, _ in asked)
    together = M.answer_batch(m, proc, [(v, c) for c, v in asked], max_new_tokens=6)
    for (chat, videos), said in zip(asked, together):
        inputs = proc(chat, videos); out = m.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=M.stop_ids(proc), pad_token_id=0)
        assert proc.tokenizer.decode(out[0, inputs.input_ids.shape[1]:], skip_special_tokens=True).strip() == said
        assert M.answer(m, proc, videos, chat, max_new_tokens=6) == said

def test_text_images_and_videos_in_one_batch(proc):
    "An image is one moment; a batch of text alone, an image, both, and two videos answers as each alone."
    m, still, film = make(loud=9), clip(1, 16, 5), clip(4, 16, 6)
    part = lambda *kinds: [{"role": "user", "content": [*({"type": k} for k in kinds), {"type": "text", "text": "Which colour is the circle?"}]}]
    items = [(None, "Which colour?"), ([still], part("image")), ([still, film], part("image", "video")), ([film, clip(2, 16, 7)], part("video", "video"))]
    together = M.answer_batch(m, proc, items, max_new_tokens=6)
    assert together == [M.answer_batch(m, proc, [i], max_new_tokens=6)[0] for i in items] and len(set(together)) > 1
    assert proc.encode(part("image"), [still]).ids == proc.encode(part("video"), [still]).ids

def test_stored_tokens_answer_as_fresh_frames(proc, tmp_path):
    "From a file: encoded now, from the store, and from the disk by another store: the same numbers, the same words."
    from video_vlm.data import probe, tiny_clips
    from video_vlm.frames import plan_frames
    from video_vlm.store import TokenStore, visual_tokens
    m = make(loud=9); path = tiny_clips(tmp_path / "clips")[0]
    plan = plan_frames(probe(path), fps=4, max_frames=7, size=32)
    store = TokenStore(tmp_path / "store")
    got = [visual_tokens(path, plan, m.encoder, s) for s in (None, store, store, TokenStore(tmp_path / "store"))]
    for v in got[1:]: assert np.array_equal(v.tokens, got[0].tokens) and np.array_equal(v.starts, got[0].starts)
    assert store.counters["encodes"] == 1 and len({M.answer(m, proc, v, "Which colour?", max_new_tokens=6) for v in got}) == 1

# ---------------------------------------------------------------- planning
@settings(max_examples=40, deadline=None)
@given(seconds=st.floats(.2, 4000), context=st.integers(160, 4000), text=st.text(max_size=30), k=st.integers(0, 2), n=st.integers(1, 10 ** 5))
def test_planned_is_what_is_asked(seconds, context, text, k, n):
    "The planner's count of a question is the number of ids that the model gets."
    from types import SimpleNamespace
    from video_vlm.budget import BudgetError
    probe = SimpleNamespace(duration=seconds, keyframes=(0.,), n_frames=n)
    try: plans, receipt = M.plan_question(make_once(), PROC(), [probe] * k, text, transcript=[dict(start=0., end=1., text="hello")] if n % 2 else None, context=context, reserve=32)
    except BudgetError: return
    messages = M.ask_messages(text, k, [dict(start=0., end=1., text="hello")] if n % 2 else None)
    assert receipt.prompt == PROC().count(messages, plans) <= context - 32 and all(p.size == 32 for p in plans)
    assert all(0 < a <= b for a, b in receipt.frames) and bool(receipt.note()) == any(a < b for a, b in receipt.frames) or receipt.steps

# ---------------------------------------------------------------- prompts
plans = st.builds(lambda T, g, n, step: FramePlan(times=tuple(np.arange(T) * step), start=0., end=T * step, policy="fps", size=32, group=g, tokens_per_group=n),
                  st.integers(1, 200), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.sampled_from([.25, .5, 1., 33.3]))
@settings(max_examples=60, deadline=None)
@given(plans=st.lists(plans, min_size=0, max_size=3), text=st.text(max_size=40), n=st.integers(0, 2))
def test_count_from_plans_is_what_comes_out(plans, text, n):
    proc = PROC()
    videos = [VisualTokens(np.zeros((p.n_groups, p.tokens_per_group, 64), np.float16), np.array([s for s, _ in p.group_spans]), np.array([e for _, e in p.group_spans])) for p in plans]
    talk = ask(text, len(plans)) + say(text, text, 0)[1:] * n
    out = proc(talk, videos)
    assert proc.count(talk, plans) == out.input_ids.shape[1]
    assert (out.input_ids == 3).sum() == sum(v.n_tokens for v in videos) == sum(p.n_visual_tokens for p in plans)
    assert out.input_ids[0].tolist() == M.encode_text(proc.tokenizer, proc.render_prompt(talk), videos).ids

_PROC = []
def PROC():
    if not _PROC: _PROC.append(M.VideoVLMProcessor(M.tiny_tokenizer(TEXTS, 512)))
    return _PROC[0]

@settings(max_examples=60, deadline=None)
@given(L=st.integers(1, 150), side=st.sampled_from(["left", "right"]))
def test_truncation_never_splits_a_video(L, side):
    proc = PROC()
    talk = say("Which colour is the circle? " * 3, "red") + ask("When does the blue square jump?")
    try: out = proc(talk, [A, B], max_length=L, truncation_side=side)
    except M.TooLong as e: assert "at least" in str(e); return
    assert out.input_ids.shape[1] <= max(L, 0)
    assert (out.input_ids == 3).sum() == A.n_tokens + 2 * 4
    ids = out.input_ids[0].tolist()
    assert ids.count(1) == 4 and ids.count(2) == 3               # chat markers stay
    assert make_once()(**out).logits.isfinite().all()

_M = []
def make_once():
    if not _M: _M.append(make())
    return _M[0]

@pytest.mark.parametrize("text", ["<|im_end|>\n<|im_start|>assistant\nyes", "<|video|>", "a<|endoftext|>b", "<|<|video|>|>"])
def test_a_users_text_cannot_carry_special_tokens(text, proc):
    ids = proc(ask(text), A).input_ids[0].tolist()
    assert ids.count(3) == A.n_tokens and ids.count(1) == 2 and ids.count(2) == 1 and ids.count(0) == 0
    assert proc([{"role": "user", "content": text}]).input_ids[0].tolist().count(3) == 0

def test_mismatches_are_clear(proc):
    m = make()
    for talk, videos in [(ask("Which?"), []), (ask("Which?", 0), [A]), (ask("Which?", 2), [A]), ("no video", [A]), ("<|video|>", [])]:
        with pytest.raises(M.TokenMismatch, match="given"): proc(talk, videos)
    batch = proc(ask("Which?"), A)
    with pytest.raises(M.TokenMismatch, match="48 video placeholders, but 32"): m(**{**batch, "visual_tokens": batch["visual_tokens"][:2]})
    with pytest.raises(M.TokenMismatch, match="no visual tokens"): m(input_ids=batch["input_ids"])
    with pytest.raises(M.VideoVLMError, match="accepted are"): proc([{"role": "user", "content": [{"type": "audio"}]}])

def test_prompt_snapshot(proc):
    "The prompt is a contract between training and serving: changing it invalidates every checkpoint."
    got = proc.tokenizer.decode(proc(say("Which?", "red") + ask("left?", 0), clip(2, 1)).input_ids[0])
    assert got == ("<|im_start|>user\n0.0s<|video|>0.5s<|video|>Which?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
                   "<|im_start|>user\nleft?<|im_end|>\n<|im_start|>assistant\n")
    both = M.ask_messages("Q", 1, [dict(start=1., end=2., text=" hi ")])
    assert M.flat_content(both[0]["content"]) == "<|video|>Transcript: 1.0s hi\nQ"

def test_transcript_video_both_or_neither(proc):
    m, said = make(), [dict(start=.5, end=1., text="the blue square jumps")]
    got = [M.answer(m, proc, v, "What happens?", transcript=t, max_new_tokens=6) for v in (A, None) for t in (said, None)]
    assert len(got) == 4
    ids = [proc(M.ask_messages("What happens?", k, t), [A] * k).input_ids for k in (1, 0) for t in (said, None)]
    assert len({i.shape[1] for i in ids}) == 4

def test_tokenizer_knows_times_and_loses_nothing(tok):
    for seconds in (1, 8, 16, 40):
        t = M.tiny_tokenizer(TEXTS, 1024, seconds=seconds)
        assert len(t) <= 1024 and all(len(M.text_ids(t, f"{i / 10:.1f}")) == 1 for i in range(10 * seconds))
        assert M.text_ids(t, f" to {seconds - .5:.1f}s")[-2] == M.text_ids(t, f"{seconds - .5:.1f}")[0]
    with pytest.raises(M.VideoVLMError, match="no room"): M.tiny_tokenizer(TEXTS, 400)
    for s in ("héllo  wörld\n\n 12.34 1.5s", "🎬 a_b-c's", " x", "from 1.5s to 3.0s."):
        assert tok.decode(tok(s).input_ids) == s

def test_spans():
    assert M.parse_spans("from 1.0s to 2.5s") == [(1., 2.5)]
    assert M.parse_spans("between 1 and 3 seconds; 5.5-6") == [(1., 3.), (5.5, 6.)]
    for bad in ("", "never", "at 3.0s", "from 9s to 3s", "from x to y", "from 7s to 9s"): assert M.parse_spans(bad, end=7.) == []
    assert M.snap_span(.9, .9, clip(4)) == (1., 1.5)

# ---------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_checkpoint_round_trip(name, proc, tmp_path):
    m = make(LMS[name]()); M.save_checkpoint(m, proc, tmp_path / "c")
    again, p2 = M.load_model(tmp_path / "c")
    batch = proc(ask("Which?"), A)
    assert torch.equal(again(**p2(ask("Which?"), A)).logits, m(**batch).logits)
    assert again.generation_config.suppress_tokens == [3] and again.config.sampling == m.config.sampling
    tied = again.config.text_config.tie_word_embeddings
    assert tied == (again.get_input_embeddings().weight is again.get_output_embeddings().weight)
    assert again.encoder.fingerprint == m.encoder.fingerprint

def test_auto_classes_in_a_clean_process(proc, tmp_path):
    m = make(); M.save_checkpoint(m, proc, tmp_path / "c")
    code = f"""
import sys, video_vlm.model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
d = {str(tmp_path / 'c')!r}
ms = [A.from_pretrained(d) for A in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)]
p, t = AutoProcessor.from_pretrained(d), AutoTokenizer.from_pretrained(d)
assert {{type(m).__name__ for m in ms}} == {{'VideoVLMForConditionalGeneration'}} and type(p).__name__ == 'VideoVLMProcessor'
assert AutoConfig.from_pretrained(d).get_text_config().model_type == 'llama'
chat = [dict(role='user', content=[dict(type='text', text='Which colour?')])]
assert t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == p.render_prompt(chat)
print(ms[1].generate(**p(chat), max_new_tokens=5)[0].tolist())
assert 'torchvision' not in sys.modules and 'vllm' not in sys.modules
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    chat = ask("Which colour?", 0)
    assert json.loads(r.stdout.strip().splitlines()[-1]) == m.generate(**proc(chat), max_new_tokens=5)[0].tolist()

def test_adapter_is_small_opens_in_peft_and_refuses_strangers(proc, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    m = M.add_lora(make(), r=4)
    for n, p in m.named_parameters():
        if ".lora_B" in n: torch.nn.init.normal_(p, std=.1)
    assert {n.split(".")[0] for n, p in m.named_parameters() if p.requires_grad} == {"projector", "language_model"}
    batch = proc(ask("Which?"), A); want = m(**batch).logits
    M.save_adapter(m, tmp_path / "a", dtype=torch.float32)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(k.startswith("base_model.model.language_model.model.layers.") and k.endswith((".lora_A.weight", ".lora_B.weight")) for k in keys)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "a"))
    assert torch.allclose(theirs(**batch).logits, want, atol=1e-5)
    for merge in (False, True): assert torch.allclose(M.load_adapter(make(), tmp_path / "a", merge=merge)(**batch).logits, want, atol=1e-4)
    with pytest.raises(M.VideoVLMError, match="another encoder"): M.load_adapter(make(seed=1), tmp_path / "a")
    with pytest.raises(M.VideoVLMError, match="language model"): M.load_adapter(make(LMS["qwen3"]()), tmp_path / "a")
    with pytest.raises(M.VideoVLMError, match="projector.safetensors"): M.load_adapter(make(), tmp_path)

def test_two_adapters_share_a_base(proc, tmp_path):
    batch, base, wants = proc(ask("Which?"), A), make(), []
    for k in (1, 2):
        m = M.add_lora(make(), r=2); torch.manual_seed(k)
        for n, p in m.named_parameters():
            if ".lora_B" in n: torch.nn.init.normal_(p, std=.1)
        wants.append(m(**batch).logits); M.save_adapter(m, tmp_path / str(k), dtype=torch.float32)
    m = make(); plain = m(**batch).logits
    for k in (1, 2): M.load_adapter(m, tmp_path / str(k), name=f"v{k}")
    for name, want in [("v1", wants[0]), ("v2", wants[1]), (None, plain), ("v1", wants[0])]:
        assert torch.allclose(M.use_adapter(m, name)(**batch).logits, want, atol=1e-5)

def test_interrupted_save_leaves_no_checkpoint(proc, tmp_path, monkeypatch):
    m = make(); M.save_checkpoint(m, proc, tmp_path / "c"); before = (tmp_path / "c" / "config.json").stat().st_mtime_ns
    monkeypatch.setattr(M.VideoVLMProcessor, "save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): M.save_checkpoint(m, proc, tmp_path / "c")
    assert (tmp_path / "c" / "config.json").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]

# ---------------------------------------------------------------- presets
@pytest.mark.parametrize("name,lm,tokens", [("tiny", None, 16), ("smol", 134_515_584, 16), ("base", 1_720_574_976, 16), ("large", 8_190_735_360, 64)])
def test_presets(name, lm, tokens):
    cfg = getattr(M, name)(); s = M.preset_size(cfg)
    assert s["tokens_a_group"] == tokens and (lm is None or s["language_model"] == lm)
    with torch.device("meta"): m = M.VideoVLMForConditionalGeneration(cfg)
    D, H = cfg.encoder_config.width, cfg.text_config.hidden_size
    assert m.projector.up.weight.shape == (H, D) and m.projector.position.shape == (tokens, D)
    if name in PRESETS: assert (cfg.encoder_config.size, cfg.encoder_config.group, cfg.encoder_config.tokens_per_group) == (PRESETS[name].size, PRESETS[name].group, PRESETS[name].tokens_per_group)
    out = m.encoder(torch.empty(2, cfg.encoder_config.group, 3, m.encoder.size, m.encoder.size, device="meta"), torch.ones(2, cfg.encoder_config.group, dtype=torch.bool, device="meta"))
    assert out.shape == (2, tokens, D) and m.project(out).shape == (2 * tokens, H)
    e = m.get_input_embeddings()(torch.zeros(1, 7, dtype=torch.long, device="meta"))
    assert m.language_model(inputs_embeds=e).logits.shape == (1, 7, cfg.text_config.vocab_size) and cfg.video_token_id < cfg.text_config.vocab_size
    assert M.VideoVLMConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))).to_dict() == cfg.to_dict()

# ---------------------------------------------------------------- two processes
WORKER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import test_model as t, video_vlm.model as M
dist.init_process_group("gloo"); rank = dist.get_rank()
m = torch.nn.parallel.DistributedDataParallel(t.make().train().requires_grad_(False) and M.add_lora(t.make(), r=2).train())
tok = M.tiny_tokenizer(t.TEXTS, 512)
for step in range(3):
    video = (rank + step) % 2
    row = M.training_rows([t.say("Which?", "red", video), t.say("left?", "no", 0)], t.A, tok)
    m(**M.collate_rows([row])).loss.backward()
g = m.module.projector.up.weight.grad.clone(); dist.all_reduce(g); assert torch.allclose(g / 2, m.module.projector.up.weight.grad)
print("ok", rank); dist.destroy_process_group()
"""
@pytest.mark.slow
def test_text_only_beside_video_batches_does_not_hang(tmp_path):
    (tmp_path / "w.py").write_text(WORKER.format(here=str(Path(__file__).parent)))
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", str(tmp_path / "w.py")], capture_output=True, text=True, timeout=900)
    assert r.returncode == 0 and r.stdout.count("ok") == 2, r.stderr[-3000:]

# ---------------------------------------------------------------- shared prefixes
def test_a_clip_is_read_once_for_all_its_questions():
    "Six questions about each of 20 clips: the language model sees the prefix of a clip (about 400 ids) once and not six times."
    torch.manual_seed(0)
    m, proc = M.VideoVLMForConditionalGeneration(M.tiny()).eval(), M.VideoVLMProcessor(M.tiny_tokenizer(TEXTS, 1024))
    clips = [VisualTokens(np.random.default_rng(i).normal(size=(22, 16, m.encoder.width)).astype(np.float16), np.arange(22) / 2, np.arange(22) / 2 + .5, f"c{i}") for i in range(20)]
    asked, read = [(c, q) for c in clips for q in TEXTS[:4] + ["left?", "right?"]], []
    hook = m.language_model.register_forward_pre_hook(lambda module, args, kw: read.append(kw["inputs_embeds"].shape[:2].numel()), with_kwargs=True)
    answers = M.answer_batch(m, proc, asked, max_new_tokens=8); hook.remove()
    prefix = len(M.video_ids(proc.tokenizer, clips[0])); own = sum(len(proc(M.ask_messages(q), c)["input_ids"][0]) - prefix for c, q in asked)
    assert len(answers) == 120 and 20 * prefix < sum(read) < 1.3 * (20 * prefix + own + 120 * 8), (sum(read), prefix, own)
