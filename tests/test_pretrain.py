"Pretraining: stored data is the data that was drawn, short clips are short, and a head looks for what resembles it."
from dataclasses import replace

import numpy as np
import pytest
import torch
from video_vlm.data import VideoVLMError
from video_vlm.pretrain import (SILENT, WORD_SETS, PretrainConfig, acting, checkpoint_folder, lm_clip, lm_data, lm_scene, look_alike, scene_plan, unnamed, word_targets)
from video_vlm.world import ACTIONS, COLOURS, SHAPES, is_held_out, make_scene, rgb

CFG = replace(PretrainConfig(), short_clips=6, clips=6)

@pytest.fixture(scope="module")
def encoder():
    from video_vlm.model import load_model
    return load_model(checkpoint_folder())[0].encoder.eval()

def test_stored_clips_are_those_that_were_drawn(encoder, tmp_path):
    encoder.save_pretrained(tmp_path/"tower")
    data, words = lm_data(tmp_path/"tower", tmp_path/"tokens", True, CFG, workers=1, progress=False, chunk=4)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path/"tokens").iterdir()}
    again, _ = lm_data(tmp_path/"tower", tmp_path/"tokens", True, CFG, workers=1, progress=False, chunk=4)
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path/"tokens").iterdir()} and again.ids == data.ids
    for k, key in enumerate(data.ids):
        scene = lm_scene(k, True, CFG)
        tokens, targets = lm_clip(encoder, scene, CFG)
        assert key == tokens.key and len(tokens.tokens) <= CFG.short_groups
        assert np.array_equal(data.tokens(key).tokens, tokens.tokens) and np.array_equal(words[key], targets)

def test_word_targets_say_what_the_scene_says():
    for seed in range(40, 60):
        scene = make_scene(seed)
        plan = scene_plan(scene)
        w = word_targets(scene, plan)
        assert w.shape == (plan.n_groups, 16, len(WORD_SETS))
        there = w[..., 1] < len(SHAPES)
        assert ((w[..., 0] < len(COLOURS)) == there).all() and 0 < there.mean() < .9
        named = {(list(COLOURS)[c], SHAPES[s]) for c, s in w[..., :2][there]}
        assert named <= {(o.colour, o.shape) for o in scene.things}
        assert set(w[..., 4][there]) <= {ACTIONS.index(e.action) for e in scene.events} | {len(ACTIONS)}
        assert (w[..., 4][~there] == -100).all() and SILENT == (0, 1, 4)

def test_acting_follows_the_events():
    scene = make_scene(4)
    plan = scene_plan(scene)
    a = acting(scene, plan)
    for e in scene.events:
        mid = [m for m, (s, t) in enumerate(plan.group_spans) if s >= e.start and t <= e.end]
        assert (a[mid, e.thing] == ACTIONS.index(e.action)).all()
    assert (a[:, -1] == -100).all()

def test_heads_begin_by_looking_at_what_resembles_them():
    from transformers import AutoModelForCausalLM
    from video_vlm.model import tiny
    torch.manual_seed(0)
    layer = look_alike(AutoModelForCausalLM.from_config(tiny(256, 64, 1).text_config)).model.layers[0].self_attn
    x = torch.nn.functional.normalize(torch.randn(40, 64), dim=-1)*8
    score = layer.q_proj(x) @ layer.k_proj(x).T
    assert (score.argmax(1) == torch.arange(40)).float().mean() > .9

def test_unnamed_colours_never_look_like_a_held_out_pair():
    rng, palette = np.random.default_rng(3), np.array(list(COLOURS.values()), float)
    for _ in range(200):
        shape = SHAPES[rng.integers(len(SHAPES))]
        near = list(COLOURS)[int(np.abs(palette-rgb(unnamed(shape, rng))).sum(1).argmin())]
        assert not is_held_out(near, shape)

def test_no_scene_that_is_short_enough_is_an_error():
    with pytest.raises(VideoVLMError, match="short_groups"): lm_scene(0, True, replace(CFG, short_groups=0), tries=990)

def test_questions_are_answered_where_they_are_asked_and_nothing_else_changes(encoder):
    from video_vlm.model import load_model, training_rows
    from video_vlm.pretrain import tell_answers
    from video_vlm.world import samples_of
    tokenizer = load_model(checkpoint_folder())[1].tokenizer
    scene = next(s for s in map(make_scene, range(100)) if len({o.shape for o in s.things}) == len(s.things) > 1)
    tokens, _ = lm_clip(encoder, scene, CFG)
    samples = samples_of(scene, tokens.key)
    row = training_rows(samples, tokens, tokenizer)
    told = tell_answers(row, samples, tokenizer)
    new = (told["labels"] != row["labels"]).nonzero()[:, 0].tolist()
    assert new and (row["labels"][new] == -100).all()
    word = lambda i: tokenizer.decode([int(i)])
    at = [(word(row["input_ids"][p-1]), word(told["labels"][p]), int(row["branch"][p])) for p in new if word(row["input_ids"][p-1]) != "<|video|>"]
    for k, s in enumerate(samples, 1):
        first, mine = s.meta["answer"] and tokenizer.decode(tokenizer(s.meta["answer"]).input_ids[:1]), [(w, a) for w, a, b in at if b == k]
        if s.meta["kind"] in ("colour", "shape", "position"): assert {a for w, a in mine} == {first}, (s.messages, mine)
        if s.meta["kind"] == "caption": assert not mine
        if s.meta["kind"] in ("order", "after"): assert sum(a[0].isdigit() for w, a in mine) == (2 if s.meta["kind"] == "order" else 1), mine

def test_every_visual_token_is_asked_for_the_time_of_its_group_and_events_for_theirs(encoder):
    from video_vlm.model import load_model, training_rows
    from video_vlm.pretrain import tell_answers
    from video_vlm.world import samples_of
    tokenizer = load_model(checkpoint_folder())[1].tokenizer
    video, seen = tokenizer.convert_tokens_to_ids("<|video|>"), 0
    for scene in map(make_scene, range(6)):
        tokens, _ = lm_clip(encoder, scene, CFG)
        samples = [s for s in samples_of(scene, tokens.key) if s.task == "ground"]
        row = training_rows(samples, tokens, tokenizer)
        told = tell_answers(row, samples, tokenizer)
        ids, labels = row["input_ids"].tolist(), told["labels"].tolist()
        times = [float(tokenizer.decode(labels[p+1])) for p, i in enumerate(ids) if i == video]
        assert np.abs(np.array(times)-np.repeat(tokens.starts, tokens.tokens.shape[1])).max() < .06
        for k, s in enumerate(samples, 1):
            says = [float(tokenizer.decode(labels[p+1])) for p in range(len(ids)-1) if int(row["branch"][p]) == k and row["labels"][p+1] == -100 and labels[p+1] != -100]
            assert len(says) == 2 and -.3 <= says[0]-s.meta["span"][0] <= .6, (says, s.meta["span"]); seen += 1
    assert seen >= 6

def test_the_word_that_sets_an_answer_apart():
    from video_vlm.pretrain import separating
    events = ["the red ring spins", "the red star spins", "the red ring grows"]
    assert [separating(e, events) for e in events] == ["ring", "star", "ring"]
    assert separating(events[0], [events[0], events[2]]) == "spins" and separating(events[0], events[:1]) == "the"
