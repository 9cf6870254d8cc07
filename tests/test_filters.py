"Filters: measured once, decided often; what a score depends on is part of its version; killed, it goes on."
import json, os, shutil, signal, subprocess, sys, time
import numpy as np, pytest
from video_vlm import filters as F
from video_vlm.data import Clip, IngestConfig, VideoVLMError, add_text, ingest, load_clips, write_video
from video_vlm.filters import FilterConfig, Rule, decide, filter_clips, find_pii, load_kept, text_scores

CFG = FilterConfig(workers=1, progress=False)
QUIET = IngestConfig(progress=False)

@pytest.fixture
def stage(tmp_path):
    src = tmp_path/"src"; src.mkdir(); rng = np.random.default_rng(0); big = np.kron(rng.integers(0, 255, (12, 30, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    lively = np.stack([big[:, 3*i:3*i+128] for i in range(24)])
    for name, x in dict(lively=lively, black=lively//50, frozen=lively[:1].repeat(24, 0)).items(): write_video(src/f"{name}.mp4", np.ascontiguousarray(x), fps=12, gop=250)
    (src/"lively.txt").write_text("a coloured wall moves slowly to the left of the picture")
    return ingest(src, tmp_path/"00", QUIET)

def names(stage, out): by = {c.id: c.uri.split("/")[-1] for c in load_clips(stage)}; return {by[i] for i in load_kept(out)}

def test_a_new_threshold_decodes_nothing(stage, tmp_path, monkeypatch):
    out = filter_clips(stage, tmp_path/"f", CFG); assert names(stage, out) == {"lively.mp4"}
    monkeypatch.setattr(F, "measure", lambda *a, **k: pytest.fail("decoded again")); shutil.rmtree(tmp_path/"src")
    loose = CFG.with_rules(frozen=Rule(), motion=Rule(), sharpness=Rule(), black=Rule())
    assert names(stage, decide(out, loose)) == {"lively.mp4", "black.mp4", "frozen.mp4"}
    assert names(stage, filter_clips(stage, out, CFG)) == {"lively.mp4"}

def test_texts_and_languages_are_measured_again_without_decoding(stage, tmp_path, monkeypatch):
    out = filter_clips(stage, tmp_path/"f", CFG); monkeypatch.setattr(F, "measure", lambda *a, **k: pytest.fail("decoded again"))
    clip = next(c for c in load_clips(stage) if c.captions); add_text(stage, [dict(id=clip.id, text="call Mary Johnson at +1 415 555 2671", by="x")])
    assert names(stage, filter_clips(stage, out, CFG)) == set(), "a later caption with a name and a number"
    german = FilterConfig(languages=("de",), workers=1, progress=False).with_rules(pii=Rule())
    assert names(stage, filter_clips(stage, out, german)) == set()

def test_other_frames_are_another_ruler(stage, tmp_path, monkeypatch):
    out = filter_clips(stage, tmp_path/"f", CFG); seen = []; real = F.measure
    monkeypatch.setattr(F, "measure", lambda c, *a, **k: (seen.append(c), real(c, *a, **k))[1])
    filter_clips(stage, out, FilterConfig(frames=8, workers=1, progress=False)); assert len(seen) == 3

def test_a_run_that_was_killed_measures_the_rest_only(stage, tmp_path, monkeypatch):
    real, seen = F.measure, []
    def dies(c, *a, **k):
        if len(seen) == 2: raise KeyboardInterrupt
        seen.append(c.id); return real(c, *a, **k)
    monkeypatch.setattr(F, "measure", dies)
    with pytest.raises(KeyboardInterrupt): filter_clips(stage, tmp_path/"f", CFG)
    with open(tmp_path/"f"/"measured.jsonl", "ab") as f: f.write(b'{"id": "half')
    again = []; monkeypatch.setattr(F, "measure", lambda c, *a, **k: (again.append(c.id), real(c, *a, **k))[1])
    out = filter_clips(stage, tmp_path/"f", CFG); assert len(again) == 1 and again[0] not in seen and names(stage, out) == {"lively.mp4"}

def test_models_plug_in(stage, tmp_path):
    out = filter_clips(stage, tmp_path/"f", CFG.with_rules(agreement=Rule(.5), frozen=Rule(), motion=Rule(), black=Rule(), sharpness=Rule()), agreement=lambda frames, texts: .2, unsafe=lambda frames: float(frames.mean() < 20))
    assert names(stage, out) == {"frozen.mp4"}, "the captioned one disagrees, the black one is called unsafe"

def test_a_classifier_by_name(stage, tmp_path, monkeypatch):
    (tmp_path/"my_checks.py").write_text("import numpy as np\ndef dark(frames): return float(frames.mean() < 20)\ndef light(frames): return float(frames.mean() > 20)\ndef loud(frames): return 3\nclass Seen: score = .9\ndef verdict(frames): return Seen()\n")
    monkeypatch.chdir(tmp_path); monkeypatch.syspath_prepend(str(tmp_path)); open_ = CFG.with_rules(frozen=Rule(), motion=Rule(), black=Rule(), sharpness=Rule())
    assert names(stage, filter_clips(stage, "f", open_, unsafe=F.classifier_of("my_checks:dark"))) == {"lively.mp4", "frozen.mp4"}
    assert names(stage, filter_clips(stage, "f", open_, unsafe=F.classifier_of("my_checks:light"))) == {"black.mp4"}, "another model measures again"
    monkeypatch.setattr(F, "measure", lambda *a, **k: pytest.fail("decoded again")); assert names(stage, filter_clips(stage, "f", open_, unsafe=F.classifier_of("my_checks:light"))) == {"black.mp4"}
    assert F.classifier_of("my_checks:verdict")(None) == .9
    for bad, why in (("my_checks:loud", "no probability"), ("my_checks:none", "no module:function"), ("nowhere", "no module:function"), ("", "no module:function"), ("a b:c", "no module:function")):
        with pytest.raises(VideoVLMError, match=why): F.classifier_of(bad)

def test_kinds_of_pii():
    kinds = {k for k, *_ in find_pii("Mary Johnson, mary.j@example.org, +49 30 901820")}; assert kinds == {"EMAIL", "PHONE", "PERSON"}
    assert text_scores(Clip("1", "x")) == dict(pii=None, language=None)

@pytest.mark.slow
def test_no_model_says_so(tmp_path):
    with pytest.raises(VideoVLMError, match="no SigLIP"): F.siglip_agreement(tmp_path)
