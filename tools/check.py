"""Every check of `make test`, one after the other, each with a heading and its time; goes on after a failure, so that one run tells all.
The closing line is pytest's own summary."""
import os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PY, BIN = [sys.executable], Path(sys.executable).parent
STEPS = [  # title, command, environment
    ("modules, README and notebooks in step", [*PY, "tools/sync.py"], {}),
    ("lint", [*PY, "-m", "ruff", "check", "-q", "nbs", "video_vlm", "tests", "tools"], {}),
    ("notebooks run (nbdev_test)", [str(BIN/"nbdev_test"), "--n_workers", "2", "--do_print", "--timing"], {"OMP_NUM_THREADS": "1"}),
    ("docs build", [*PY, "tools/docs.py", "--force"], {"OMP_NUM_THREADS": "1"}),
    ("pytest", [*PY, "-m", "pytest", "--durations=8"], {"VIDEO_VLM_SITE": "built"}),
]

def plain(seconds): return f"{seconds:.0f} s" if seconds < 100 else f"{seconds/60:.1f} min"

def run(cmd, env):
    "Run, passing the output on; returns (exit status, last line that was not empty)."
    p = subprocess.Popen(cmd, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, errors="replace")
    last = ""
    for line in p.stdout:
        print(line, end="", flush=True)
        if line.strip(): last = line.strip()
    return p.wait(), last

def main():
    start, results, summary = time.time(), [], ""
    for i, (title, cmd, env) in enumerate(STEPS, 1):
        print(f"\n=== [{i}/{len(STEPS)}] {title} (at {plain(time.time()-start)})", flush=True)
        t = time.time()
        code, summary = run(cmd, env)
        results.append((title, code, time.time()-t))
        print(f"--- {title}: {'ok' if code == 0 else f'FAILED (status {code})'}, {plain(time.time()-t)}", flush=True)
    failed = [t for t, code, _ in results if code]
    print(f"\n=== make test: {len(results)-len(failed)} of {len(results)} steps passed in {plain(time.time()-start)}")
    for title, code, seconds in results: print(f"  {'ok    ' if code == 0 else 'FAILED'}  {plain(seconds):>8}  {title}")
    if failed: print(f"failed: {', '.join(failed)}")
    print(summary if re.search(r"\d+ (passed|failed|error|skipped|deselected)", summary) else f"pytest gave no summary: {summary}", flush=True)
    return 1 if failed else 0

if __name__ == "__main__": sys.exit(main())
