"World: same seed same clip, truth that agrees with the pixels, nothing held out leaks into training."
import json, subprocess, sys
from collections import Counter

import numpy as np
import pytest
from video_vlm.data import VideoVLMError, load_samples, probe
from video_vlm.frames import read_frames
from video_vlm.world import (ACTIONS, COLOURS, LEVELS, NEW_ACTIONS, NEW_TEXTURE, WORDINGS, WorldConfig, captions, facts, is_held_out, make_scene,
                             questions, refer, render, rgb, samples_of, state_at, truth_maps, write_world)

SEEDS = range(5000, 5060)

def test_same_seed_same_scene_in_another_process():
    code = "from video_vlm.world import make_scene, render; import hashlib; s = make_scene(11); print(hashlib.sha256(render(s, 64)[0].tobytes() + repr(s).encode()).hexdigest())"
    out = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert out[0] == out[1] and len(out[0].strip()) == 64

@pytest.mark.parametrize("level", LEVELS)
def test_train_never_shows_a_held_out_pair_and_pairs_always_does(level):
    for k in SEEDS:
        assert not any(is_held_out(o.colour, o.shape) for o in make_scene(k, level).things)
    assert all(any(is_held_out(o.colour, o.shape) for o in make_scene(k, level, "pairs").things) for k in list(SEEDS)[:20])

def test_new_actions_and_texture_never_occur_unasked():
    for k in SEEDS:
        s = make_scene(k, "hard")
        assert not {e.action for e in s.events} & set(NEW_ACTIONS)
        assert NEW_TEXTURE not in {o.texture for o in s.things}

def test_every_action_occurs():
    seen = Counter(e.action for k in range(400) for e in make_scene(k).events)
    assert set(seen) == set(ACTIONS) and min(seen.values()) > 10

def test_colour_of_the_pixels_is_the_colour_of_the_truth():
    "The pixel in the middle of an alone standing, plain thing is nearest to its own colour (rings have a hole)."
    right = total = 0
    for k in SEEDS:
        s = make_scene(k, "easy")
        frame = render(s, (256, 256), [0.])[0][0]
        owner, cover, states = truth_maps(s, [0.], grid=16)
        for i, o in enumerate(s.things):
            cells = np.argwhere((owner[0] == i) & (cover[0] > .95))
            for y, x in cells:
                px = frame[y*16+8, x*16+8].astype(float)
                right += min(COLOURS, key=lambda c: np.abs(np.array(rgb(c))-px).sum()) == o.colour
                total += 1
    assert total > 200 and right/total > .97, (right, total)

def test_spans_are_inside_the_clip_and_motion_happens_within_them():
    for k in SEEDS:
        s = make_scene(k)
        for e in s.events:
            assert 0 <= e.start < e.end <= s.seconds
            if e.action == "move":
                a, b = state_at(s, e.start)[e.thing, :2], state_at(s, e.end)[e.thing, :2]
                assert np.hypot(*(b-a)) > .2

def test_answers_are_unique_and_wordings_held_out():
    for k in SEEDS:
        s = make_scene(k)
        for q in questions(s, choice=1.):
            if q["options"]: assert q["options"].count(q["answer"]) == 1, q
        train, test = {q["question"] for q in questions(s, choice=0.)}, {q["question"] for q in questions(s, "test", choice=0.)}
        assert not train & test
        assert captions(s)[-1] not in captions(s)[:-1]
    assert all(len(w) > 1 for w in WORDINGS.values())

def test_a_name_in_a_question_fits_one_object_only():
    rng = np.random.default_rng(0)
    for k in SEEDS:
        s = make_scene(k)
        for i, o in enumerate(s.things):
            for name in {refer(s, i, rng) for _ in range(9)}:
                words = set(name.split())-{"object"}
                assert [t for t in s.things if words <= {t.colour, t.shape}] == [o], (name, s.things)

def test_held_out_wordings_use_words_that_training_has():
    "A language model that has only read these clips cannot know a word it never met."
    words = lambda t: {w for w in "".join(c if c.isalpha() else " " for c in t).lower().split()}
    known = set().union(*(words(w) for ws in WORDINGS.values() for w in ws[:-1]))
    assert set().union(*(words(ws[-1]) for ws in WORDINGS.values())) <= known

def test_files_are_real_videos_with_the_times_they_should_have(tmp_path):
    write_world(tmp_path, WorldConfig(n=12, size=96), workers=2)
    truth = [json.loads(l) for l in open(tmp_path/"truth.jsonl")]
    vfr = 0
    for t in truth:
        p = probe(tmp_path/t["video"])
        assert p.codec == "h264" and abs(p.duration-t["seconds"]) < .3
        vfr += p.is_vfr
        assert read_frames(tmp_path/t["video"], [0., t["seconds"]/2]).data.shape[0] == 2
    assert vfr
    rows = load_samples(tmp_path/"annotations.jsonl")
    assert {r.task for r in rows} == {"qa", "caption", "ground"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"clips").iterdir()}
    write_world(tmp_path, WorldConfig(n=12, size=96), workers=1)            # again: nothing is written twice
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/"clips").iterdir()}

@pytest.mark.parametrize("kw", [dict(level="extreme"), dict(split="all")])
def test_wrong_words_are_refused(kw):
    with pytest.raises(VideoVLMError, match="use"): make_scene(0, **kw)
