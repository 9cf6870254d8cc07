"The example and the figures on the front page, from runs of the demo: `make front ARGS='runs/demo [more seeds ...]'` rewrites two cells of nbs/index.ipynb and their pictures."
import json, sys
from collections import defaultdict
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NB, PICTURE, STRIP = ROOT/"nbs/index.ipynb", "images/skills.png", "images/one_clip.png"
TITLE, EXAMPLE = "## What one run printed", "## What it answers about one clip"
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

def typical(folder):
    "The questions of one held-out medium clip: of those that were asked most kinds of question, the one whose share of right answers is nearest to that of all."
    rows = [r for r in map(json.loads, open(folder/"07_eval/after/predictions.jsonl")) if r["facts"]["level"] == "medium"]
    by, mean = defaultdict(list), sum(r["score"] for r in rows)/len(rows)
    for r in rows: by[r["clip"]].append(r)
    return min(by.items(), key=lambda kv: (-len({r["facts"]["kind"] for r in kv[1]}), abs(sum(r["score"] for r in kv[1])/len(kv[1])-mean), kv[0]))

def example(folder, path):
    "The cell of one clip; its frames go to `path`."
    from video_vlm.data import load_clips
    from video_vlm.frames import read_frames
    from PIL import Image
    import numpy as np
    key, rows = typical(folder)
    clip = next(c for c in load_clips(folder/"00_ingest") if c.id == key)
    frames = read_frames(clip.uri, np.linspace(0, clip.duration-.05, 8), size=(160, round(160*clip.height/clip.width))).data
    Image.fromarray(np.concatenate([np.pad(f, ((0, 0), (0, 3), (0, 0))) for f in frames], 1)).quantize(128).save(path)
    lines = [f"| {r['question']} | {r['answer']}{'' if r['score'] else ' ✗'} | {r['truth']} |" for r in rows]
    return f"""{EXAMPLE}

![Eight moments of a generated clip]({STRIP})

A held-out clip after `make demo`, taken because its share of right answers is nearest to that of all clips: {sum(r['score'] == 1 for r in rows)} of {len(rows)}.

| Question | Answer | Truth |
|---|---|---|
""" + "\n".join(lines)

def replace_cell(nb, title, source):
    "The one cell that begins with `title` gets a new source."
    cells = [c for c in nb.cells if c.source.startswith(title)]
    if len(cells) != 1: sys.exit(f"{NB}: one cell has to begin with {title!r}")
    cells[0].source = source

if __name__ == "__main__":
    folders = [Path(p) for p in sys.argv[1:]]
    missing = [str(f) for f in folders if not (f/"report.json").exists()]
    if missing or not folders: sys.exit(f"no report.json in {', '.join(missing)}" if missing else "which run? make front ARGS=runs/demo")
    reports, nb = [json.loads((f/"report.json").read_text()) for f in folders], nbformat.read(NB, 4)
    replace_cell(nb, TITLE, text(reports)); draw(reports[0]["eval"], NB.parent/PICTURE)
    replace_cell(nb, EXAMPLE, example(folders[0], NB.parent/STRIP))
    nbformat.write(nb, NB)
    print(f"{NB.relative_to(ROOT)}, nbs/{PICTURE}, nbs/{STRIP}; now: make readme")
