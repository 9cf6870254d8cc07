"The page of a data run: every stage that is there, in its own words; what is missing is said."
import numpy as np, pytest
from video_vlm.bench.dedup import moving_discs
from video_vlm.data import IngestConfig, VideoVLMError, ingest, write_video
from video_vlm.data_report import DataReportConfig, data_report, find_stages, funnel_rows, read_run, shot_cards, text_blocks
from video_vlm.dedup import DedupConfig, dedup
from video_vlm.filters import FilterConfig, filter_clips
from video_vlm.splits import decontaminate, split

QUIET = IngestConfig(progress=False)

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    d = tmp_path_factory.mktemp("run"); v, b = d/"v", d/"bench"; v.mkdir(); b.mkdir()
    for k in range(3): write_video(v/f"{k}.mp4", moving_discs(k, seconds=3.), fps=12)
    write_video(v/"0_mirror.mp4", np.ascontiguousarray(moving_discs(0, seconds=3.)[:, :, ::-1]), fps=12); write_video(v/"dark <b>.mp4", moving_discs(5, seconds=3.)//60, fps=12)
    (v/"bad.mp4").write_bytes(b"x"); write_video(b/"asked.mp4", moving_discs(1, seconds=3.), fps=12, crf=35)
    st = ingest(v, d/"r"/"00_ingest", QUIET); filter_clips(st, d/"r"/"00b", FilterConfig(workers=1, progress=False)); de = dedup(st, d/"r"/"01", DedupConfig(workers=1, progress=False))
    rm = decontaminate(st, de, d/"r"/"01a_d", videos=b, cfg=DedupConfig(workers=1, progress=False)); split(st, de, d/"r"/"01a", exclude=rm)
    return d/"r"

def test_page(run):
    page = data_report(run).read_text()
    for t in ("bad.mp4", "not_media", "0.mp4", "0_mirror.mp4", "mirrored", "Why these are one", "met a benchmark", "datasheet.html", "leaks"): assert t in page, t
    assert "dark &lt;b&gt;" in page and "<b>.mp4" not in page, "names are escaped"
    rows = {l: n for l, n, *_ in funnel_rows(read_run(find_stages(run)))}
    assert rows["files found"] == 6 and rows["refused when read"] == 1 and rows["clips"] == 5 and rows["further copies"] == 1 and rows["met a benchmark"] == 1

def test_shots_and_captions(tmp_path):
    v = tmp_path/"v"; v.mkdir(); x = [moving_discs(k, seconds=2.) for k in (0, 7, 9)]
    for name, y in dict(one=x[0], three=np.concatenate([x[0], 255-x[1], x[2]//3]), other=x[1]).items(): write_video(v/f"{name}.mp4", y, fps=12); (v/f"{name}.txt").write_text("two discs cross a wall <b>" if name != "other" else "nothing of the kind happens")
    st = ingest(v, tmp_path/"r"/"00", QUIET); dedup(st, tmp_path/"r"/"01", DedupConfig(workers=1, progress=False)); run = read_run(find_stages(tmp_path/"r"))
    cards = shot_cards(run, DataReportConfig(shots=2)); assert [c["question"] for c in cards][0] == "three.mp4" and cards[0]["answer"].startswith("3 shots") and len(cards) == 2 and all(c["uri"].startswith("data:image") for c in cards)
    assert not shot_cards(run, DataReportConfig(shots=0)) and "2 of them shown" in shot_cards(run, DataReportConfig(shots=1), most=2)[0]["answer"]
    table, = text_blocks(run); assert [r[2] for r in table["rows"]] == ["same words"] and {r[-1] for r in table["rows"]} <= {"yes", "no"}
    page = data_report(tmp_path/"r").read_text(); assert "Shots" in page and "Captions that say the same" in page and "wall &lt;b&gt;" in page and "by the frames" in page
    (v/"three.mp4").unlink(); assert [c["question"] for c in shot_cards(run)] != ["three.mp4"], "a file that is gone is passed over"

def test_ingest_alone_is_enough(run, tmp_path):
    page = data_report(run, tmp_path/"p.html", stages=dict(ingest=run/"00_ingest")).read_text(); assert "not run: filters, dedup, splits, removed" in page

def test_nothing_there(tmp_path):
    with pytest.raises(VideoVLMError, match="no finished ingest"): data_report(tmp_path)
