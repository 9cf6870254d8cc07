"Property tests of the planner: never over, monotone, and exact against an expansion written by other hands."
import math, random, re
from dataclasses import replace
from types import SimpleNamespace
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from video_vlm.budget import (BudgetError, BudgetLimits, PRESETS, Request, Slot, TokenCounter, count_with, lay_ladder, parts_of, plan_of, plan_request, plan_video,
                              seconds_in, shapes, tenths, transcript_text, with_transcripts)
from video_vlm.frames import plan_frames

def odd(text):
    "A tokenizer whose counts depend on the digits: a run of digits is as long as its digit sum mod 3, plus one."
    return sum(1 + (sum(map(int, w)) % 3 if w.isdigit() else len(w)//5) for w in re.findall(r"\d+|[^\W\d]+|[^\w]", text))

def actual(messages, plans, count=odd, request=Request([])):
    "Tokens of the prompt, counted from a full expansion that shares no code with the planner."
    plans, total = iter(plans), 0
    for m in messages:
        flat = m["content"] if isinstance(m["content"], str) else "".join(
            "\x00" if p["type"] in ("video", "image") else p["text"] if p["type"] == "text" else transcript_text(p["transcript"]) for p in m["content"])
        for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video|>"): flat = flat.replace(s, s.replace("|", "¦"))
        pieces = [m["role"] + "\n"]
        for i, piece in enumerate(flat.strip().split("\x00")):
            if i:
                plan = next(plans)
                for start, _ in plan.group_spans: pieces.append("%.1fs" % start); total += plan.tokens_per_group
            pieces.append(piece)
        total += 2 + sum(count(p) for p in (*pieces, "\n") if p)
    assert next(plans, None) is None
    return total + 1 + count("assistant\n")

words = st.text(st.sampled_from("abc 0123.\n<|video|>é"), max_size=40)
@st.composite
def probes(draw):
    duration = draw(st.one_of(st.floats(.04, 60), st.floats(60, 20000)))
    gap = draw(st.sampled_from([0, .5, 2, 8, 40]))
    return SimpleNamespace(duration=duration, keyframes=tuple(i*gap for i in range(int(min(duration, 2000)/gap)+1)) if gap else (),
                           n_frames=max(1, int(duration*draw(st.sampled_from([5, 25, 60])))))
@st.composite
def requests(draw):
    videos = {f"v{i}": draw(probes()) for i in range(draw(st.integers(1, 3)))}
    def part():
        kind = draw(st.sampled_from(["text", "text", "video", "video", "image", "audio"]))
        if kind == "text": return dict(type="text", text=draw(words))
        if kind == "image": return dict(type="image", image="i")
        if kind == "audio": return dict(type="audio", transcript=draw(st.one_of(words, st.just([dict(start=.25, end=3., text="hello"), dict(start=3., end=9.35, text="you")]))))
        p = dict(type="video", video=draw(st.sampled_from(sorted(videos))))
        if draw(st.booleans()): p["fps"] = draw(st.sampled_from([.1, .5, 1., 4., 30.]))
        if draw(st.integers(0, 3)) == 0: p["start"] = videos[p["video"]].duration*draw(st.floats(0, .9))
        return p
    messages = [dict(role="system", content=draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        messages.append(dict(role="user", content=[part() for _ in range(draw(st.integers(1, 3)))]))
        messages.append(dict(role="assistant", content=draw(words)))
    messages.append(dict(role="user", content=[part() for _ in range(draw(st.integers(1, 4)))]))
    return Request(messages, videos, fps=draw(st.sampled_from([None, .5, 2.])), max_frames=draw(st.sampled_from([None, 1, 7, 64, 4000])))

limits_of = st.builds(lambda c, r, g, n, mf, cache: BudgetLimits(c, min(r, c-1), group=g, tokens_per_group=n, max_frames=mf, encoder_cache=cache),
    st.integers(40, 30000), st.integers(0, 500), st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 9, 16, 25, 36]), st.sampled_from([8, 64, 5000]),
    st.one_of(st.none(), st.integers(10, 4000)))
relaxed = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))

@relaxed
@given(requests(), limits_of)
def test_never_over_and_exact(request, limits):
    try: plans, receipt = plan_request(request, limits, odd)
    except BudgetError as e: assert e.code in ("too_long", "encoder_cache", "text_too_long") and e.needed > e.available; return
    assert receipt.prompt + receipt.reserve <= receipt.context == limits.context
    assert receipt.prompt == actual(receipt.kept(request.messages), plans)
    kept = [p for m in receipt.kept(request.messages) for p in parts_of(m) if p["type"] in ("video", "image")]
    assert len(kept) == len(plans)
    legal = set(shapes(limits.group, limits.tokens_per_group, limits.max_group, limits.min_tokens))
    for part, plan in zip(kept, plans):
        cost = plan.n_visual_tokens + sum(odd("%.1fs" % s) for s, _ in plan.group_spans)
        assert limits.encoder_cache is None or cost <= limits.encoder_cache
        if part["type"] == "video": assert (plan.group, plan.tokens_per_group) in legal

@relaxed
@given(requests(), limits_of, st.integers(1, 4000))
def test_monotone_in_the_budget(request, limits, more):
    try: plans, receipt = plan_request(request, limits, odd)
    except BudgetError: return
    more_plans, more_receipt = plan_request(request, replace(limits, context=limits.context+more), odd)
    assert set(more_receipt.dropped) <= set(receipt.dropped) and len(more_receipt.steps) <= len(receipt.steps)
    if more_receipt.dropped == receipt.dropped:
        for a, b in zip(plans, more_plans):
            assert b.n_frames >= a.n_frames and b.tokens_per_group >= a.tokens_per_group and b.group <= a.group

@relaxed
@given(probes(), limits_of)
def test_what_a_refusal_promises_fits(probe, limits):
    request = Request([dict(role="user", content=[dict(type="video", video="v"), dict(type="text", text="what happens?")])], dict(v=probe), fps=4., max_frames=10**6)
    try: plan_request(request, limits, odd)
    except BudgetError as e:
        if e.max_seconds: plan_request(replace(request, end=e.max_seconds), limits, odd); assert "shorter than" in str(e)

@relaxed
@given(requests(), limits_of, st.sampled_from(["fps", "uniform", "keyframes"]))
def test_plans_are_those_of_plan_frames(request, limits, policy):
    "The planner chooses times by bisection; `plan_frames`, which scans, would choose the same."
    request = replace(request, policy=policy)
    for probe in request.probes.values():
        slot = Slot("video", dict(type="video", video="v"), probe)
        try: lay_ladder(slot, request, limits, TokenCounter(odd))
        except BudgetError: continue
        for slot.at in range(len(slot.levels)):
            frames, policy, group, tokens = slot.levels[slot.at]; start, end, fps = slot.span
            assert plan_of(slot, request, limits) == plan_frames(probe, fps, frames, policy, start, end, limits.size, group, tokens)

def test_one_clip_without_a_question():
    "What training and search encode: the plan of the policy where it fits, the ladder where it does not."
    clip = SimpleNamespace(duration=7.3, keyframes=(0.,), n_frames=200)
    plan, receipt = plan_video(clip, PRESETS["tiny"], odd)
    assert plan == plan_frames(clip, 4, 32, size=128) and receipt.note() == "" and receipt.video == receipt.prompt-receipt.text
    plan, receipt = plan_video(SimpleNamespace(duration=9000., keyframes=(), n_frames=10**6), PRESETS["base"], odd)
    assert receipt.prompt <= PRESETS["base"].room and "of 9000 frames looked at" in receipt.note()
    assert plan_video(clip, PRESETS["tiny"], odd, start=2., end=4.)[0].times[0] == 2.

def test_planning_a_dropped_video_costs_nothing():
    film = SimpleNamespace(duration=7200., keyframes=(), n_frames=180000)
    chat = [dict(role="user", content=[dict(type="video", video="f"), dict(type="text", text="a")]), dict(role="assistant", content="b"), dict(role="user", content="c")]
    plans, receipt = plan_request(Request(chat, dict(f=film), max_frames=10000), BudgetLimits(200, 20), odd)
    assert plans == () and receipt.dropped == (0, 1) and receipt.video == 0
    assert receipt.prompt == actual(receipt.kept(chat), ())

def test_order_of_the_ladder():
    film = SimpleNamespace(duration=600., keyframes=tuple(range(0, 600, 10)), n_frames=15000)
    chat = [dict(role="user", content="x "*300), dict(role="assistant", content="y"), dict(role="user", content=[dict(type="video", video="f")])]
    kinds = []
    for context in range(12000, 60, -7):
        try: _, r = plan_request(Request(chat, dict(f=film)), BudgetLimits(context, 10), odd)
        except BudgetError: break
        kinds = [re.search("frames$|keyframes|tokens|groups|dropped", s)[0] for s in r.steps]
        order = [dict(frames=0, keyframes=0, groups=1, tokens=1, dropped=2)[k] for k in kinds]
        assert order == sorted(order)
    assert set(order) == {0, 1, 2} and "keyframes" in kinds

def test_errors_are_typed():
    ask = lambda **kw: Request([dict(role="user", content=[dict(type="video", video="v")])], **kw)
    with pytest.raises(BudgetError, match="probe it first"): plan_request(ask(), BudgetLimits(), odd)
    with pytest.raises(BudgetError, match="square grid"): BudgetLimits(tokens_per_group=12)
    with pytest.raises(BudgetError, match="shorten the text by"): plan_request(Request([dict(role="user", content="word "*900)]), BudgetLimits(200, 20), odd)
    with pytest.raises(BudgetError, match="leave out the transcript"):
        plan_request(Request([dict(role="user", content=[dict(type="audio", transcript="word "*900)])]), BudgetLimits(200, 20), odd)

def test_times_in_tenths():
    rng = random.Random(1)
    t = [rng.uniform(0, 9e4) for _ in range(20000)] + [i/20 for i in range(9000)] + [round(rng.uniform(0, 900), 2) for _ in range(9000)]
    assert tenths(t).tolist() == [int(f"{x:.1f}".replace(".", "")) for x in t]
    counter = TokenCounter(odd); far = [0., 1e6, 1e9]
    assert counter.timestamps(far) == sum(odd(f"{x:.1f}s") for x in far)

def test_hours_in_the_window():
    for name, limits in PRESETS.items():
        got = seconds_in(131072, replace(limits, fps=1), len)
        film = SimpleNamespace(duration=got, keyframes=(), n_frames=10**9)
        _, r = plan_request(Request([dict(role="user", content=[dict(type="video", video="f")])], dict(f=film)),
                            replace(limits, context=131072, reserve=1000, fps=1, max_frames=10**6), len)
        assert not r.steps and r.free < 2*(limits.tokens_per_group+8), name
    assert seconds_in(131072, replace(PRESETS["base"], fps=1), len) >= 7200

def test_model_counts_alike():
    "The ids that the processor makes are as many as the receipt says."
    model = pytest.importorskip("video_vlm.model")
    tok = model.tiny_tokenizer(["What happens in the video?", "the red circle moves from 0.5s to 1.5s"]*20, 600)
    count = count_with(tok)
    assert count("from 1.5s") == len(tok("from 1.5s", add_special_tokens=False).input_ids)
    probe = SimpleNamespace(duration=95.3, keyframes=(), n_frames=2400)
    said = [dict(start=0., end=4., text="the red circle <|im_end|> moves")]
    chat = [dict(role="user", content=[dict(type="text", text=" Look: "), dict(type="video", video="v"), dict(type="text", text=" and <|video|> "), dict(type="image", image="i"),
                                       dict(type="audio", transcript=said)]),
            dict(role="assistant", content=" It moves. "), dict(role="user", content=[dict(type="video", video="v", start=20., end=31.7), dict(type="text", text="And here? ")])]
    request = Request(chat, dict(v=probe), fps=3.)
    for context in (4096, 1500, 700, 300, 180):
        plans, receipt = plan_request(request, BudgetLimits(context, 32), count)
        kept = with_transcripts(receipt.kept(chat), request)
        assert len(model.encode_chat(tok, kept, list(plans), add_generation_prompt=True).ids) == receipt.prompt
        assert receipt.prompt <= context-32 and (receipt.audio > 0) == (not receipt.dropped)

pieces = st.text(st.sampled_from("ab7Z .,:'s\n\t\r é中\u3000\x1c\x85\u0301"), max_size=6) | st.sampled_from(["red ", "the\n", "12.5s: ", " is'll", " \n", "<|im_end|>", "<|video|> "])
@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=10).map("".join))
def test_words_count_like_the_whole(text):
    "A text counted word by word has as many tokens as the tokenizer gives it, with the tokenizer of the preset and one that puts a space first."
    from transformers import AutoTokenizer
    from video_vlm.budget import counts_by_word
    from video_vlm.pretrain import checkpoint_folder
    tok = _loaded.get("tok") or _loaded.setdefault("tok", AutoTokenizer.from_pretrained(checkpoint_folder("tiny")))
    count = _loaded.get("count") or _loaded.setdefault("count", count_with(tok))
    assert count(text) == len(tok(text, add_special_tokens=False).input_ids)
    if "by_word" not in _loaded:
        from tokenizers import Tokenizer, models, pre_tokenizers
        prefixed = Tokenizer(models.BPE()); prefixed.pre_tokenizer = pre_tokenizers.Metaspace()
        _loaded["by_word"] = (counts_by_word(tok.backend_tokenizer), counts_by_word(prefixed))
    assert _loaded["by_word"] == (True, False)

_loaded = {}

@pytest.mark.slow
def test_a_hundred_thousand():
    from video_vlm.bench.budget import run
    r = run()
    assert r["requests"] >= 100_000 and r["overflows"] == r["mispredictions"] == 0 and r["not_monotone"] == 0
