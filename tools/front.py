"The figures on the front page from reports of the demo: `make front ARGS='runs/demo/report.json [more seeds ...]'` rewrites one cell of nbs/index.ipynb and its picture."
import json, sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NB, PICTURE, TITLE = ROOT/"nbs/index.ipynb", "images/skills.png", "## What one run printed"
SHUFFLED = ("order", "direction", "action") # skills that need frames in order

def draw(e, path):
    "Right answers by skill with 95% intervals; what the same model says without the video, and of shuffled frames where time matters."
    by = sorted(e["qa"]["by_skill"].items(), key=lambda kv: kv[1]["accuracy"]); y = range(len(by)); acc = [100*v["accuracy"] for _, v in by]
    other = lambda name, k: 100*e[name]["by_skill"].get(k, dict(accuracy=0))["accuracy"]
    fig, ax = plt.subplots(figsize=(7.2, .27*len(by)+.8), dpi=110)
    ax.barh(y, acc, color="#3b76c4", height=.62, label="right answers, 95% interval")
    ax.errorbar(acc, y, xerr=[[a-100*v["ci95"][0] for a, (_, v) in zip(acc, by)], [100*v["ci95"][1]-a for a, (_, v) in zip(acc, by)]], fmt="none", ecolor="#16324f", elinewidth=1)
    ax.scatter([other("blind", k) for k, _ in by], y, color="#e08a1e", s=22, zorder=3, label="without the video")
    timed = [(i, k) for i, (k, _) in enumerate(by) if k in SHUFFLED]
    ax.scatter([other("shuffled", k) for _, k in timed], [i for i, _ in timed], color="#b03a3a", marker="x", s=26, zorder=3, label="frames shuffled")
    ax.set_yticks(y, [f"{k} ({v['n']})" for k, v in by]); ax.set_xlim(0, 100); ax.set_xlabel("% of questions about held-out clips")
    ax.spines[["top", "right"]].set_visible(False); ax.legend(fontsize=7, loc="lower right", framealpha=.9)
    fig.tight_layout(); fig.savefig(path, metadata={"Software": None}); plt.close(fig)

def text(reports):
    "The cell, from the first report and the lines of all."
    pct, span = lambda s: f"{100*s['accuracy']:.1f}%", lambda s: f"{100*s['ci95'][0]:.0f} to {100*s['ci95'][1]:.0f}"
    r = reports[0]; e, d, s = r["eval"], r["data"], r["serving"]
    rows = [f"| {x['seed']} | {pct(q)} ({span(q)}) | {pct(x['eval']['blind'])} | {pct(x['eval']['shuffled'])} | {pct(b['new_actions'])} → {pct(a['new_actions'])} ({span(a['new_actions'])}) | {pct(b['old_skills'])} → {pct(a['old_skills'])} | {x['eval']['grounding']['miou']:.2f} | {x['eval']['retrieval']['r@1']:.2f} | {x['total_seconds']:.0f} s |"
            for x in reports for q, b, a in [(x["eval"]["qa"], x["eval"]["before"], x["eval"]["after"])]]
    return f"""{TITLE}

![Right answers by skill with intervals, beside the same model without the video]({PICTURE})

`make demo`, seed {r['seed']}, {r['cpus']} CPU cores: {d['found']} files found, {d['rejected']} of them broken and named, {d['duplicates']} near-duplicates kept on one side of the split; {e['qa']['n']} questions about {e['qa']['n_clips']} held-out clips.
Captions named {100*e['caption']['facts']['value']:.0f}% of the facts. Served by {s['engine']}, the first token of a first question took {s['ttft_first_s']:.2f} s, of a second one {s['ttft_second_s']:.2f} s: it decoded {s['decodes_second']} and encoded {s['encodes_second']} times. Peak memory {r['peak_rss_mb']:,} MiB.

| seed | right (95% interval) | without the video | frames shuffled | two actions never seen before: before → after training | all else | moments, mIoU | retrieval, R@1 of {e['retrieval']['n']} | in all |
|---|---|---|---|---|---|---|---|---|
""" + "\n".join(rows) + "\n\n`video-vlm bench demo --json` prints these figures for your machine."

if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit("which report? make front ARGS=runs/demo/report.json")
    reports = [json.loads(Path(p).read_text()) for p in sys.argv[1:]]
    nb = nbformat.read(NB, 4)
    cells = [c for c in nb.cells if c.source.startswith(TITLE)]
    if len(cells) != 1: sys.exit(f"{NB}: one cell has to begin with {TITLE!r}")
    cells[0].source = text(reports); draw(reports[0]["eval"], NB.parent/PICTURE)
    nbformat.write(nb, NB)
    print(f"{NB.relative_to(ROOT)} and nbs/{PICTURE}; now: make readme")
