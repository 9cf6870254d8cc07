"The HTML page: one file, nothing from outside, strangers' text stays text, half a report is half a page."
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from video_vlm.data import VideoVLMError
from video_vlm.evaluation import Item, Prediction, Task, run_task
from video_vlm.report import ReportConfig, example_block, figure_svg, picture_uri, plot_curve, plot_scores, render_report, render_run

ACC = lambda v: {"accuracy": v, "ci95": [v - .1, v + .1], "n": 50, "by_skill": {"colour": {"accuracy": v, "ci95": [v - .1, v + .1], "n": 25}}}


class Links(HTMLParser):
    def __init__(self, text): super().__init__(); self.found, self.tags = [], []; self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action") and v]


def outside(page): return [u for u in Links(page).found if not u.startswith(("data:", "#"))] + re.findall(r"url\((?!#|&quot;#|\"#)[^)]*\)", page) + re.findall(r"@import", page)


def test_whole_report(tmp_path):
    frames = np.zeros((24, 96, 3), np.uint8)
    report = {"seed": 3, "seconds": {"train": 9.1}, "data": {"found": 9, "rejected": 1, "duplicates": 2, "train": 3, "val": 1, "test": 2, "leaks": 0},
        "eval": {"qa": ACC(.8), "blind": ACC(.3), "shuffled": ACC(.5), "before": {"new_actions": ACC(.2)}, "after": {"new_actions": ACC(.7)}, "retrieval": {"r@1": .6, "n": 50}, "grounding": {"miou": .55}},
        "serving": {"engine": "vllm", "encodes_first": 1, "encodes_second": 0, "ttft_first_s": .5, "ttft_second_s": .1}, "train": {"loss": [[i, 1 / (i + 1)] for i in range(80)]}, "peak_rss_mb": 2048, "versions": {"torch": "2"}}
    evil = '<img src=x onerror=alert(1)>"\'</script><script>alert(2)</script>'
    page = render_report(report, tmp_path / "deep" / "r.html", [dict(question=evil, answer=evil, truth=evil, correct=False, picture=frames), dict(question="q", answer="a", truth="a", correct=True)]).read_text()
    assert outside(page) == [] and "script" not in Links(page).tags and "onerror=alert" not in page.replace("&gt;", "").split("<img")[1].split(">")[0]
    assert page.count("<svg") == 3 and "prefers-color-scheme:dark" in page and "80.0%" in page and "2.0 GiB" in page and page.index("✗") < page.index("✓")
    assert len(page) < 400_000 and Links(page).tags.count("html") == 1


@pytest.mark.parametrize("part", [{}, {"eval": {}}, {"eval": {"qa": ACC(.5)}}, {"data": {"found": 3}}, {"serving": {}}, {"seconds": {"a": 1.}}, {"eval": {"qa": {"accuracy": .5}}}, {"train": {"loss": [[0, 1.]]}},
    {"eval": {"levels": {"easy": ACC(.5)}, "paired": {"over_blind": {"diff": .1, "ci95": [0, .2], "p": .03, "mde": .1}}}}])
def test_parts(tmp_path, part): assert "</html>" in render_report(part, tmp_path / "p.html").read_text()


def test_run_page(tmp_path):
    items = tuple(Item(f"q{i}", f"c{i // 2}", question="?", truth="x", options=("x", "y"), skill=f"s{i % 2}", facts={"fps": i % 3}) for i in range(90))
    run = run_task(Task("bench", items), lambda i, p: "AB"[int(i.id[1:]) % 4 == 0], tmp_path / "run", train={"train_clips": ["c1"]})
    page = render_run(run, baselines={"blind": run}).read_text()
    assert (tmp_path / "run" / "report.html").exists() and outside(page) == [] and "Slices, worst first" in page and "manifest.json" in page
    with pytest.raises(VideoVLMError, match="no folder"): render_run(run_task(Task("t", items), lambda i, p: "A"))


def test_blocks():
    many = [dict(question=str(i), answer="a", truth="b", correct=i % 2 == 0, picture=np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)) for i in range(40)]
    block = example_block(many, ReportConfig(examples=10, wrong_share=.3))["examples"]
    assert [e["correct"] for e in block] == [False] * 3 + [True] * 7
    assert len(example_block(many, ReportConfig(examples=40, max_bytes=20_000))["examples"]) < 12
    assert example_block([dict(question="q", answer="a", truth="a", correct=True, media="/nowhere.mp4")])["examples"][0]["note"].startswith("no picture")
    assert picture_uri(np.zeros((4, 4, 3))).startswith("data:image/jpeg;base64,")
    svg = plot_scores({"model": {"<b>": (.5, .4, .6)}}); assert "<b>" not in svg and "currentColor" in svg
    assert plot_curve({"a": [(0, 1), (1, 2)], "b": [(i, i) for i in range(90)]}).count("<svg") == 1
    assert figure_svg(lambda ax: ax.plot([0, 1])) == figure_svg(lambda ax: ax.plot([0, 1]))       # the same picture is the same text
    with pytest.raises(VideoVLMError): render_report([], "x.html")
