"The whole life in small: every stage of the demo, the real engine, the report."
import json
from pathlib import Path

import pytest
from video_vlm.data import VideoVLMError
from video_vlm.demo import DemoConfig, run_demo

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")/"run"
    cfg = DemoConfig(out=str(out), clips=40, duplicates=8, size=160, connect_steps=1, instruct_steps=3, questions=4, gallery=5)
    return cfg, run_demo(cfg), out

def test_report_has_what_it_promises(run):
    cfg, r, out = run
    on_disk = json.loads((out/"report.json").read_text())
    assert on_disk == json.loads(json.dumps(r))
    assert {"found", "rejected", "duplicates", "train", "val", "test", "leaks"} <= set(r["data"])
    for name in ("qa", "blind", "shuffled"): assert {"accuracy", "ci95", "n", "by_skill"} <= set(r["eval"][name])
    assert "new_actions" in r["eval"]["before"] and "new_actions" in r["eval"]["after"]
    assert "r@1" in r["eval"]["retrieval"] and "miou" in r["eval"]["grounding"]
    assert {"engine", "encodes_first", "encodes_second", "ttft_first_s", "ttft_second_s"} <= set(r["serving"])
    assert r["peak_rss_mb"] > 100 and r["versions"]["torch"] and r["seed"] == cfg.seed

def test_messy_files_are_recorded_and_nothing_leaks(run):
    _, r, _ = run
    d = r["data"]
    assert d["found"] == 40+8+5 and d["rejected"] == 5 and len(d["reasons"]) == 5, d
    assert d["leaks"] == 0 and d["duplicates"] >= 6 and d["train"]+d["val"]+d["test"] <= 40

def test_the_second_question_decodes_and_encodes_nothing(run):
    s = run[1]["serving"]
    assert s["encodes_first"] == 1 and s["encodes_second"] == 0 and s["decodes_second"] == 0
    assert all(q["answer"] for q in s["questions"])

def test_page_is_self_contained_and_shows_clips(run):
    page = (run[2]/"report.html").read_text()
    assert page.count("data:image") >= 3 and "<script src" not in page and "https://" not in page.split("<body")[1].split("report.json")[0]

def test_other_settings_in_the_same_folder_are_refused(run):
    with pytest.raises(VideoVLMError, match="other settings"): run_demo(DemoConfig(out=run[0].out, seed=5))
