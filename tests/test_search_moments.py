"Moments: sources that were invented are found out, spans lie inside the clip, a folder is indexed for its owner, commands speak plainly."
import json, random, sys
from pathlib import Path

import numpy as np
import pytest
from video_vlm.data import VideoVLMError, write_video
from video_vlm.encoder import VisualTokens
from video_vlm.model import load_model
from video_vlm.moments import LookConfig, answer_from, check_citations, cite, clip_of, events_of, find, find_moment, find_moments, from_zero, index_folder, long_tokens, open_index, part_of, read_facts, rerank, saliency, sentence_fits, space_of
from video_vlm.pretrain import checkpoint_folder
from video_vlm.search import Hit, SearchError, search
from video_vlm.world import make_scene, render

@pytest.fixture(scope="module")
def vlm(): return load_model(checkpoint_folder("tiny"))

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    d = tmp_path_factory.mktemp("videos")
    for i in range(2): write_video(d/f"scene{i}.mp4", *render(s := make_scene(91_000_000+i, "easy"), (64, 48), np.arange(0, s.seconds, 1/6)))
    (d/"broken.mp4").write_text("no video\n"*50)
    return d

# ---- citations

def test_invented_citations_are_removed_and_counted():
    hits = [Hit("abc", 2., 6., 1.)]
    text, good, bad = check_citations("First [abc 2.0s-3.0s], then [abc 5.0s-9.0s] and [zzz 1.0s-2.0s], [abc 4s-3s].", hits)
    assert len(good) == 1 and bad == 3 and "zzz" not in text and "[abc 2.0s-3.0s]" in text

@pytest.mark.parametrize("seed", range(20))
def test_planted_citations_are_told_apart(seed):
    r = random.Random(seed); hits = [Hit(f"{i:064x}"[::-1], a := r.randrange(100)/2, a+4., 1.) for i in range(1, 6)]
    words, want = [], 0
    for _ in range(12):
        h = r.choice(hits); kind = r.choice(["good", "early", "late", "clip", "backwards", "none"])
        a, b = h.start+r.choice([0., .5, 1.]), h.end-r.choice([0., .5, 1.])
        a, b, clip = dict(good=(a, b, h.clip[:12]), early=(a-50, b, h.clip), late=(a, b+30, h.clip), clip=(a, b, "f"*12), backwards=(b, a, h.clip), none=(None, None, ""))[kind]
        if a is not None and a < 0: a = 0.; kind = "early" if h.start > .1 else "good"
        words.append("It moves." if a is None else f"So [{clip} {a:.1f}s-{b:.1f}s]."); want += kind == "good"
    text, good, bad = check_citations(" ".join(words), hits)
    assert len(good) == want and bad == sum("[" in w for w in words)-want and text.count("[") == want
    assert all(any(g.clip == h.clip and h.start-.1 <= g.start < g.end <= h.end+.1 for h in hits) for g in good)

def test_a_shortened_name_must_be_unambiguous():
    hits = [Hit("abcdefgh1111", 0., 4., 1.), Hit("abcdefgh2222", 0., 4., 1.)]
    assert check_citations("x [abcdefgh 1.0s-2.0s]", hits)[2] == 1 and check_citations("x [abcdefgh2 1.0s-2.0s]", hits)[1][0].clip == "abcdefgh2222"
    assert check_citations("x [abc 1.0s-2.0s]", hits[:1])[2] == 1

@pytest.mark.parametrize("write, invented", [(lambda q, l: "It moves [ffffffffffff 0.0s-1.0s] [clip0000 1.0s-2.0s].", 1), (lambda q, l: "It moves.", 0), (lambda q, l: f"Yes {cite(l[-1].hit)} [clip0000 5.0s-99.0s]", 1), (lambda q, l: "", 0)])
def test_every_answer_ends_with_a_source_that_was_looked_at(vlm, write, invented):
    r = np.random.default_rng(1); vt = VisualTokens(r.normal(size=(16, 16, 128)).astype(np.float16), np.arange(16)/2, np.arange(16)/2+.5, "k")
    hits = [Hit("clip0000", 0., 4., 1.), Hit("clip0000", 4., 8., 1.)]
    got = answer_from("What happens?", [(h, part_of(vt, h.start, h.end)) for h in hits], *vlm, write)
    assert got.invented == invented and got.citations and all(any(h.clip == c.clip and h.start-.1 <= c.start < c.end <= h.end+.1 for h in hits) for c in got.citations)
    assert got.text.count("[") == len(got.citations) and len(got.looks) == 2 and got.looks[0].evidence >= got.looks[1].evidence

def test_nothing_retrieved_is_no_source(vlm):
    got = answer_from("What happens?", [], *vlm)
    assert "nothing" in got.text and not got.citations and not got.invented

# ---- spans

@pytest.mark.parametrize("seconds, seed", [(1, 0), (8, 1), (9, 2), (45, 3)])
def test_moments_lie_inside_the_clip(vlm, seconds, seed):
    n = seconds*2; vt = VisualTokens(np.random.default_rng(seed).normal(size=(n, 16, 128)).astype(np.float16), 100+np.arange(n)/2, 100.5+np.arange(n)/2, "k")
    found = find_moments("the red square moves left", vt, *vlm, LookConfig(looks=2))
    assert all(100 <= m.start < m.end <= 100+seconds and 0 <= m.confidence <= 1 for m in found) and found == sorted(found, key=lambda m: -m.confidence) and sum(m.confidence for m in found) <= 1+1e-6
    assert find_moment("the red square moves left", vt, *vlm, LookConfig(looks=2)) == [(m.start, m.end) for m in found]
    assert all(100 <= e.start < e.end <= 100+seconds and e.text[0].isupper() for e in events_of(part_of(vt, 100, 100+min(seconds, 9)), *vlm))
    assert from_zero(vt).starts[0] == 0 and np.allclose(np.diff(from_zero(vt).starts), np.diff(vt.starts))
    with pytest.raises(SearchError, match="no frames"): part_of(vt, 0., 50.)
    hits = [Hit("c", 100., 100.+min(seconds, 4), 0.), Hit("c", 100., 100.5, 0.)]
    assert set(h.end for h in rerank(hits, "a red square", lambda _: vt, *vlm)) == {h.end for h in hits} and rerank([], "x", None, *vlm) == []

@pytest.mark.parametrize("seconds", [.5, 1, 3, 8.5])
def test_every_two_seconds_have_a_saliency(vlm, seconds):
    n = int(seconds*2); vt = VisualTokens(np.random.default_rng(0).normal(size=(n, 16, 128)).astype(np.float16), np.arange(n)/2, np.arange(n)/2+.5, "k")
    curve = saliency("a red square", vt, *vlm); assert len(curve) == max(1, int(seconds/2)) and np.isfinite(curve).all()

def test_what_happens_is_surer_than_what_does_not(vlm):
    "Ten scenes: the model always names a time, and knows when there is nothing to time."
    from video_vlm.frames import FramePlan
    from video_vlm.world import phrase
    there, gone, enc = [], [], vlm[0].encoder
    for i in range(10):
        s, other = make_scene(92_000_000+i, "easy"), make_scene(92_100_000+i, "easy"); x, t = render(s, (128, 128), np.arange(0, s.seconds-.01, .25))
        plan = FramePlan(tuple(t.tolist()), 0., s.seconds, size=enc.size, group=enc.group, tokens_per_group=enc.tokens_per_group)
        vt = VisualTokens(np.asarray(enc.encode(x, plan), np.float16), *np.array(plan.group_spans, np.float64).T, "k")
        for made, q in ((there, phrase(s, s.events[0])), (gone, phrase(other, other.events[0]))): made.append(max((m.confidence for m in find_moments(q, vt, *vlm)), default=0.))
    assert np.median(there) > 10*np.median(gone) and np.mean([a > b for a in there for b in gone]) > .8

def test_the_right_sentence_fits_best(vlm, videos):
    from video_vlm.world import captions
    lines = [captions(make_scene(91_000_000+i, "easy"))[0] for i in range(8)]; vt = long_tokens(clip_of(videos/"scene0.mp4"), vlm[0].encoder)
    few, all_ = sentence_fits(*vlm, lines, look=3)(vt), sentence_fits(*vlm, lines)(vt)
    assert (few > -1e3).sum() == 3 and np.allclose(few[few > -1e3], all_[few > -1e3], atol=1e-2) and all_.argmax() == 0 and (all_ > -1e3).all()

def test_pieces_make_the_whole(vlm, videos):
    c, enc = clip_of(videos/"scene0.mp4"), vlm[0].encoder
    vt = long_tokens(c, enc, cfg=LookConfig(piece=2.))
    assert (np.diff(vt.starts) > 0).all() and np.allclose(vt.starts[1:], vt.ends[:-1], atol=.02) and abs(vt.ends[-1]-c.duration) < .02 and vt.starts[0] < .2

# ---- folders and commands

@pytest.fixture(scope="module")
def indexed(vlm, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("search")
    assert index_folder(videos, out, *vlm, tenant="acme", dry=True)[0] == 2
    return out, index_folder(videos, out, *vlm, name=str(checkpoint_folder("tiny")), tenant="acme", progress=False)

def test_a_folder_is_indexed_for_its_owner(vlm, videos, indexed):
    out, (done, rejected) = indexed
    assert (done.new, done.kept, done.failed, [Path(c.uri).name for c in rejected]) == (2, 0, {}, ["broken.mp4"])
    assert index_folder(videos, out, *vlm, tenant="acme", progress=False)[0].kept == 2
    hits = find(out, *vlm, "a square moves", k=5, tenant="acme")
    assert hits and all(h.text and Path(read_facts(out)["uris"][h.clip]).exists() for h in hits) and find(out, *vlm, "a square moves", k=5) == []
    like = find(out, *vlm, like=str(videos/"scene1.mp4"), tenant="acme"); other = clip_of(videos/"scene0.mp4").id
    assert {h.clip for h in like} == {other} and find(out, *vlm, "square", like=other[:10], tenant="acme")
    word = max(like[0].text.strip(".").split(), key=len)                       # whatever the model said of it can be searched for
    assert other in {h.clip for h in search(open_index(out), word, tenant="acme")} and not search(open_index(out), word, tenant="other")

def test_another_model_is_refused(vlm, videos, indexed):
    out, model = indexed[0], vlm[0]; w = next(model.projector.parameters()); old, before = w.detach().clone(), space_of(model)
    try:
        w.data += 1.
        assert space_of(model) != before
        with pytest.raises(SearchError, match="cannot be compared"): find(out, *vlm, "square")
        with pytest.raises(SearchError, match="cannot be compared"): index_folder(videos, out, *vlm, progress=False)
    finally: w.data.copy_(old)
    assert space_of(model) == before

def command(capsys, monkeypatch, *words):
    "Exit code, stdout and stderr of a command, in this process."
    from video_vlm.cli import main
    monkeypatch.setattr(sys, "argv", ["video-vlm", *map(str, words)])
    try: main(); code = 0
    except SystemExit as e: code = e.code or 0
    return code, *capsys.readouterr()

def test_the_command_that_finds_a_moment(videos, capsys, monkeypatch, tmp_path):
    from PIL import Image
    run = lambda *w: command(capsys, monkeypatch, "moment", *w)
    code, said, err = run(videos/"scene0.mp4", "something moves", "-k", 2, "--out", tmp_path/"new"/"m.png"); lines = said.splitlines()
    assert code == 0 and 1 <= sum("sure 0." in l for l in lines) <= 2 and "s - " in lines[0] and Image.open(tmp_path/"new"/"m.png").width > 300, err
    code, said, _ = run(videos/"scene0.mp4", "something moves", "--out", tmp_path/"m.html"); assert code == 0 and "data:image/jpeg" in (tmp_path/"m.html").read_text()
    for words, what in (((videos/"broken.mp4", "x"), "no media container"), ((videos/"no.mp4", "x"), "does not exist"), ((videos, "x"), "is a folder"), ((videos/"scene0.mp4", " ?"), "which moment"), ((videos/"scene0.mp4", "x", "-k", 0), "1 or more"),
                        ((videos/"scene0.mp4", "x", "--out", tmp_path/"m.gif"), ".png or .html"), ((videos/"scene0.mp4", "x", "--model", "no/such"), "no/such")):
        code, said, err = run(*words); assert code == 2 and what in err and not said and len([l for l in err.splitlines() if l.strip()]) == 1, (words, err)

def test_commands(indexed, videos, capsys, monkeypatch, tmp_path):
    out, run = indexed[0], lambda *w: command(capsys, monkeypatch, *w)
    code, said, err = run("index", videos, "--out", out, "--tenant", "acme", "--dry-run")
    assert code == 0 and "0 clips would be indexed" in said and "broken.mp4" in said, err
    code, said, err = run("search", "a square moves", "--out", out, "--tenant", "acme", "--k", 3, "--diverse")
    assert code == 0 and "scene" in said, err
    page = (out/"search.html").read_text("utf8"); assert "data:image/jpeg" in page and "http" not in page.split("</style>")[1].replace("http-equiv", "")
    code, said, _ = run("search", "square", "--out", out); assert code == 0 and "nothing found" in said
    for words, what in ((("search", "x", "--out", tmp_path/"no"), "video-vlm index"), (("search", "--out", out), "nothing to search"), (("search", "x", "--out", out, "--k", 0), "1 or more"), (("search", "--like", "nothing", "--out", out), "neither a file"),
                        (("index", tmp_path/"no", "--out", out), "does not exist"), (("index", tmp_path, "--out", out), "no videos in")):
        code, said, err = run(*words)
        assert code == 2 and what in err and len([l for l in err.splitlines() if l.strip()]) == 1, (words, err)
