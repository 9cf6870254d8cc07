"""Engines: what they say is what transformers says. vLLM runs here in this process (its synchronous face), because a core process of its own costs a second
import of everything; the asynchronous face, crashes and restarts are in the tests marked slow."""
import asyncio, dataclasses, time

import numpy as np
import pytest
import torch

from video_vlm.model import stack_tokens
from video_vlm.serving import (BadRequest, EngineConfig, EngineDown, Request, TransformersEngine, UnknownAdapter, VLLMEngine, adapter_projector, collect, fake_tokens,
                               full_ids, has_vllm, load_encoder, offline, offline_answers, prompt_ids, tiny_checkpoint)

needs_vllm = pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: the in-process engine is what serves here")

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("serving") / "ckpt")

@pytest.fixture(scope="module")
def reference(ckpt):
    from video_vlm.model import load_model
    return load_model(ckpt)

@pytest.fixture(scope="module")
def adapter(ckpt, tmp_path_factory):
    "A random adapter with a projector of its own."
    from video_vlm.model import add_lora, load_model, save_adapter
    torch.manual_seed(1)
    model, _ = load_model(ckpt)
    add_lora(model, r=4)
    for n, p in model.named_parameters():
        if ".lora_B" in n or n.startswith("projector."): p.data += torch.randn_like(p) * .1
    return str(save_adapter(model, tmp_path_factory.mktemp("adapter") / "tuned"))

def chat(q, k=1): return [dict(role="user", content=[dict(type="video")] * k + [dict(type="text", text=q)])]

def mixed(n, seed=0, **kw):
    "Requests of mixed length: text only, one to three videos of 1 to 20 moments with 16, 4 or 1 tokens each, one or more turns."
    r, out = np.random.default_rng(seed), []
    for i in range(n):
        k = int(r.choice([0, 1, 1, 1, 2, 3]))
        videos = tuple(fake_tokens(int(r.integers(1, 20)), int(r.integers(0, 9)), n=int(r.choice([16, 16, 4, 1]))) for _ in range(k))
        msgs = chat("What happens? " * int(r.integers(1, 9)) + str(i), k)
        if r.random() < .3: msgs += [dict(role="assistant", content="blue circle"), *chat("And then?", 0)]
        out.append(Request(msgs, videos, max_tokens=int(r.integers(4, 20)), ignore_eos=True, **kw))
    return out

def truth(model, processor, req):
    b = processor(req.messages, list(req.videos))
    return model.generate(**b, max_new_tokens=req.max_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1, suppress_tokens=[model.config.video_token_id])[0, b.input_ids.shape[1]:].tolist()

def run(engine, reqs):
    async def all_():
        await engine.start()
        try: return await asyncio.gather(*[collect(engine, r) for r in reqs], return_exceptions=True)
        finally: await engine.stop()
    return asyncio.run(all_())


def test_in_process_engine_says_what_transformers_says(ckpt, reference):
    reqs = mixed(24)
    got = run(TransformersEngine(EngineConfig(ckpt, max_num_seqs=5)), reqs)
    assert [g[1] for g in got] == [truth(*reference, r) for r in reqs]
    assert [g[3].prompt for g in got] == [len(full_ids(reference[1], r.messages, r.videos)) for r in reqs]

def test_a_bad_request_ends_alone(ckpt):
    good = mixed(3)
    bad = [Request(chat("x", 1), (fake_tokens(2, width=32),)), Request(chat("x"), (), max_tokens=4), Request(chat("word " * 3000, 0), ()), Request(chat("x", 0), (), adapter="none")]
    got = run(TransformersEngine(EngineConfig(ckpt)), [*good, *bad])
    assert all(isinstance(g, tuple) for g in got[:3]) and all(isinstance(g, Exception) for g in got[3:])
    assert isinstance(got[-2], BadRequest) and "context holds" in str(got[-2]) and isinstance(got[-1], UnknownAdapter)

def test_adapters_in_process(ckpt, adapter):
    from video_vlm.model import load_adapter, load_model
    assert adapter_projector(adapter, ckpt) is not None
    base, processor = load_model(ckpt)
    tuned, _ = load_model(ckpt); load_adapter(tuned, adapter, merge=True)
    reqs = [dataclasses.replace(r, adapter=a) for r in mixed(6, 3) for a in ("", "tuned")]
    got = run(TransformersEngine(EngineConfig(ckpt, adapters=(("tuned", adapter),))), reqs)
    want = [truth(tuned if r.adapter else base, processor, r) for r in reqs]
    assert [g[1] for g in got] == want and any(a != b for a, b in zip(want[::2], want[1::2]))

def others(ckpt, folder, seed, r=2):
    "Another random adapter, of another rank and for fewer layers."
    from video_vlm.model import add_lora, load_model, save_adapter
    torch.manual_seed(seed)
    model, _ = load_model(ckpt)
    add_lora(model, r=r, targets=r".*language_model.*(q_proj|v_proj)")
    for n, p in model.named_parameters():
        if ".lora_B" in n or n.startswith("projector."): p.data += torch.randn_like(p) * .2
    return str(save_adapter(model, folder))

async def come_and_go(engine, first, second, reqs):
    "Adapters loaded, dropped and loaded again under one name while requests run: what was said, in order."
    said = lambda adapter: asyncio.gather(*[collect(engine, dataclasses.replace(r, adapter=adapter)) for r in reqs])
    await engine.start()
    try:
        out = [await said("")]
        running = asyncio.gather(*[collect(engine, dataclasses.replace(r, max_tokens=60)) for r in reqs])      # of the base, while layers are put in
        await asyncio.sleep(.05)
        await engine.load_adapter("v1.tuned", first)
        out.append(await running)
        a, b = await asyncio.gather(said("v1.tuned"), said(""))
        late = asyncio.gather(*[collect(engine, dataclasses.replace(r, adapter="v1.tuned", max_tokens=60)) for r in reqs])
        await asyncio.sleep(.05)
        await engine.drop_adapter("v1.tuned")
        out += [a, b, await said(""), await late]
        for gone in (engine.drop_adapter("v1.tuned"), collect(engine, dataclasses.replace(reqs[0], adapter="v1.tuned"))):
            with pytest.raises(UnknownAdapter): await gone
        await engine.load_adapter("v1.tuned", second)
        out.append(await said("v1.tuned"))
        await engine.load_adapter("other", first)
        out += await asyncio.gather(said("other"), said("v1.tuned"), said(""))
        with pytest.raises(Exception): await engine.load_adapter("bad", str(second)+"-none")
        out.append(await said(""))
        return [[g[1] for g in o] for o in out]
    finally: await engine.stop()

def asked_of(ckpt, first, second, reqs):
    "What transformers says in the same order."
    from video_vlm.model import load_adapter, load_model
    base, processor = load_model(ckpt)
    a, b = [load_adapter(load_model(ckpt)[0], f, merge=True) for f in (first, second)]
    said = lambda m, **kw: [truth(m, processor, dataclasses.replace(r, **kw)) for r in reqs]
    b0, a0 = said(base), said(a)
    return [b0, said(base, max_tokens=60), a0, b0, b0, said(a, max_tokens=60), said(b), a0, said(b), b0, b0]

def test_adapters_come_and_go_in_process(ckpt, adapter, tmp_path):
    from video_vlm.model import lora_layers
    second, reqs = others(ckpt, tmp_path/"second", 5), mixed(4, 9)
    engine = TransformersEngine(EngineConfig(ckpt))
    assert asyncio.run(come_and_go(engine, adapter, second, reqs)) == asked_of(ckpt, adapter, second, reqs)
    assert set(engine.adapters) == {"v1.tuned", "other"} and len(engine.projectors) == 3
    assert {k for _, m in lora_layers(engine.model) for k in m.lora_A} == set(engine.adapters.values())                   # what was dropped takes no memory

def test_stop_abort_and_queue(ckpt):
    engine = TransformersEngine(EngineConfig(ckpt, max_queue=2))
    async def go():
        await engine.start()
        r = Request(chat("x", 0), max_tokens=900, ignore_eos=True)
        seen = []
        async for d in engine.generate(r):
            seen.append(d)
            if len(seen) == 3: await engine.abort(r.id)
        slow = [engine.generate(Request(chat("x", 0), max_tokens=900, ignore_eos=True)) for _ in range(3)]
        firsts = await asyncio.gather(*[g.__anext__() for g in slow], return_exceptions=True)
        for g in slow: await g.aclose()
        await engine.stop()
        return seen, firsts
    seen, firsts = asyncio.run(go())
    assert seen[-1].finish_reason == "abort" and len(seen) < 50
    assert sum(type(f).__name__ == "EngineBusy" for f in firsts) == 1
    assert engine.running == 0

def likelihood(model, processor, req, answer):
    "Log-probability of an answer up to each of its tokens, in one pass of transformers."
    ids = full_ids(processor, req.messages, req.videos)
    with torch.no_grad(): logits = model(input_ids=torch.tensor([ids+answer]), visual_tokens=stack_tokens(req.videos)).logits[0, len(ids)-1:-1].float()
    logits[:, processor.tokenizer.convert_tokens_to_ids("<|video|>")] = float("-inf")
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].cumsum(0).tolist()

def test_confidence_is_the_answers_own_likelihood(ckpt, reference):
    r = Request(chat("What moves?"), (fake_tokens(3, seed=5),), max_tokens=5, ignore_eos=True)
    async def go(r):
        engine = await TransformersEngine(EngineConfig(ckpt)).start(); out = [d async for d in engine.generate(r)]
        await engine.stop(); return out
    plain, said = asyncio.run(go(r)), asyncio.run(go(dataclasses.replace(r, confidence=True)))
    assert [d.logprob for d in plain] == [None]*5 and [d.token_ids for d in said] == [d.token_ids for d in plain]
    assert np.allclose([d.logprob for d in said], likelihood(*reference, r, [t for d in said for t in d.token_ids]), atol=1e-3)

def test_light_encoder_load(ckpt, reference): assert load_encoder(ckpt).fingerprint == reference[0].encoder.fingerprint


@pytest.fixture(scope="module")
def llm(ckpt, adapter):
    if not has_vllm(): pytest.skip("vLLM is not installed")
    return offline(EngineConfig(ckpt, max_model_len=1024, kv_cache_bytes=64 << 20, max_num_seqs=16, with_encoder=True, max_loras=1))

@needs_vllm
def test_vllm_says_what_transformers_says(llm, reference):
    model, processor = reference
    reqs = mixed(40, 1)
    out = offline_answers(llm, processor, reqs)
    assert [list(o.prompt_token_ids) for o in out] == [full_ids(processor, r.messages, r.videos) for r in reqs]
    assert [list(o.outputs[0].token_ids) for o in out] == [truth(model, processor, r) for r in reqs]
    again = offline_answers(llm, processor, reqs[:8])
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in out[:8]] and sum(o.num_cached_tokens for o in again) > 0

@needs_vllm
def test_vllm_frames_equal_stored_tokens(llm, reference):
    from video_vlm.frames import FramePlan
    model, processor = reference
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    plan = FramePlan(tuple(np.arange(5) / 4), 0., 1.25, size=32, group=2, tokens_per_group=16)
    stored = dataclasses.replace(fake_tokens(3), tokens=model.encoder.encode(frames, plan), key="k1")
    r = Request(chat("What?"), (stored,), max_tokens=8, ignore_eos=True)
    (a,) = offline_answers(llm, processor, [r])
    from vllm import SamplingParams
    p = dict(prompt_token_ids=prompt_ids(processor, r.messages), multi_modal_data={"video": [dict(frames=frames, times=np.arange(5) / 4)]})
    b = llm.generate([p], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias={model.config.video_token_id: -100.}), use_tqdm=False)[0]
    assert a.prompt_token_ids == b.prompt_token_ids and a.outputs[0].token_ids == b.outputs[0].token_ids

@needs_vllm
def test_vllm_refuses_wrong_shapes_before_the_model(llm, reference):
    processor = reference[1]
    for bad in (fake_tokens(2, width=32), fake_tokens(2, n=17), fake_tokens(0)):
        with pytest.raises(Exception, match="expected|placeholder"): offline_answers(llm, processor, [Request(chat("x"), (dataclasses.replace(bad, key=""),), max_tokens=2)])
    assert offline_answers(llm, processor, mixed(1))[0].outputs[0].token_ids                          # and everybody else lives on

@needs_vllm
def test_vllm_adapter_with_its_own_projector(llm, reference, ckpt, adapter):
    from video_vlm.model import load_adapter, load_model
    from vllm.lora.request import LoRARequest
    tuned, processor = load_model(ckpt); load_adapter(tuned, adapter, merge=True)
    reqs = mixed(8, 5, adapter="tuned")
    lora = LoRARequest("tuned", 1, adapter)
    out = offline_answers(llm, processor, reqs, adapter_projector(adapter, ckpt), lora)
    assert [list(o.outputs[0].token_ids) for o in out] == [truth(tuned, processor, r) for r in reqs]
    base = [dataclasses.replace(r, adapter="") for r in reqs]                             # every slot is taken: the base is still the base, alone and beside the adapter
    want = [truth(*reference, r) for r in base]
    assert [list(o.outputs[0].token_ids) for o in offline_answers(llm, processor, base)] == want
    beside = offline_answers(llm, processor, [*base, *[dataclasses.replace(r, videos=(), messages=chat("x", 0)) for r in reqs]], lora=[None]*len(base)+[lora]*len(reqs))
    assert [list(o.outputs[0].token_ids) for o in beside[:len(base)]] == want

@needs_vllm
def test_vllm_says_how_sure_it_is(llm, reference):
    r = Request(chat("What moves?"), (fake_tokens(3, seed=5),), max_tokens=5, ignore_eos=True)
    (o,) = offline_answers(llm, reference[1], [dataclasses.replace(r, confidence=True)])
    want = likelihood(*reference, r, list(o.outputs[0].token_ids))[-1]
    assert abs(o.outputs[0].cumulative_logprob-want) < .02 and offline_answers(llm, reference[1], [r])[0].outputs[0].cumulative_logprob is None

@needs_vllm
def test_vllm_answers_by_schema(llm, reference):
    import json
    schema = dict(type="object", properties=dict(colour=dict(enum=["red", "blue"])), required=["colour"], additionalProperties=False)
    (o,) = offline_answers(llm, reference[1], [Request(chat("Which colour?", 0), max_tokens=60, schema=schema)])
    if o.outputs[0].finish_reason == "stop": assert json.loads(o.outputs[0].text)["colour"] in ("red", "blue")
    else: assert o.outputs[0].text.lstrip().startswith("{")                                    # a random model may fill the room with white space

@needs_vllm
@pytest.mark.slow
def test_vllm_200_requests(llm, reference):
    reqs = mixed(200, 7)
    assert [list(o.outputs[0].token_ids) for o in offline_answers(llm, reference[1], reqs)] == [truth(*reference, r) for r in reqs]

@needs_vllm
@pytest.mark.slow
def test_vllm_adapters_come_and_go(ckpt, adapter, tmp_path):
    second, reqs = others(ckpt, tmp_path/"second", 5), mixed(4, 9)
    engine = VLLMEngine(EngineConfig(ckpt, max_model_len=1024, kv_cache_bytes=64 << 20, max_loras=2))
    got, want = asyncio.run(come_and_go(engine, adapter, second, reqs)), asked_of(ckpt, adapter, second, reqs)
    assert got == want, [i for i, (a, b) in enumerate(zip(got, want)) if a != b]

@needs_vllm
@pytest.mark.slow
def test_core_is_killed_and_comes_back(ckpt):
    "kill -9 of the core: running requests end with EngineDown, later ones are answered by a new core."
    import psutil
    async def go():
        engine = await VLLMEngine(EngineConfig(ckpt, kv_cache_bytes=64 << 20)).start()
        for q in ("What moves?", "Who?"): await collect(engine, Request(chat(q), (fake_tokens(6, seed=3),), max_tokens=2))
        warm = engine.stats()["caches"]
        stream = engine.generate(Request(chat("x", 0), max_tokens=1500, ignore_eos=True))
        await stream.__anext__()
        core = next(p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name())
        core.kill()
        t = time.time()
        with pytest.raises(EngineDown):
            async for _ in stream: pass
        seen = time.time() - t
        until = time.time() + 500
        while not (engine.ready and engine.restarts) and time.time() < until: await asyncio.sleep(.5)
        got = await collect(engine, Request(chat("x", 0), max_tokens=4, ignore_eos=True))
        await collect(engine, Request(chat("Who?"), (fake_tokens(6, seed=3),), max_tokens=2))
        await engine.stop()
        return seen, got, warm, engine.stats()["caches"]
    seen, got, warm, then = asyncio.run(go())
    assert seen < 30 and len(got[1]) == 4
    assert warm["processor"] == (2, 1) and warm["prefix"][1] >= 96 and warm["prefix"][0] > warm["prefix"][1], warm       # the second question found the video twice
    assert then["processor"][0] == 3 and then["processor"][1] <= 2 and then["prefix"][0] > warm["prefix"][0], (warm, then)         # and the counts outlive the core
