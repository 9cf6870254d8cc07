"The page of a data run: every stage that is there, in its own words; what is missing is said."
import numpy as np, pytest
from video_vlm.bench.dedup import moving_discs
from video_vlm.data import IngestConfig, VideoVLMError, ingest, write_video
from video_vlm.data_report import DataReportConfig, data_report, find_stages, funnel_rows, read_run
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

def test_ingest_alone_is_enough(run, tmp_path):
    page = data_report(run, tmp_path/"p.html", stages=dict(ingest=run/"00_ingest")).read_text(); assert "not run: filters, dedup, splits, removed" in page

def test_nothing_there(tmp_path):
    with pytest.raises(VideoVLMError, match="no finished ingest"): data_report(tmp_path)
