"""Every check of `make test`, one after the other, each with a heading and its time; goes on after a failure, so that one run tells all.
A step that hangs is ended at its limit. The closing line is pytest's own summary."""
import os, re, signal, subprocess, sys, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PY, BIN = [sys.executable], Path(sys.executable).parent
ONE = {"OMP_NUM_THREADS": "1"}   # two workers on two cores
STEPS = [  # title, command, environment, limit in seconds
    ("modules, README and notebooks in step", [*PY, "tools/sync.py"], {}, 300),
    ("lint", [*PY, "-m", "ruff", "check", "-q", "nbs", "video_vlm", "tests", "tools"], {}, 120),
    ("notebooks run (nbdev_test)", [str(BIN/"nbdev_test"), "--n_workers", "2", "--do_print", "--timing"], ONE, 1500),
    ("docs build", [*PY, "tools/docs.py", "--force"], ONE, 900),
    ("pytest", [*PY, "-m", "pytest", "--durations=8"], {**ONE, "VIDEO_VLM_SITE": "built"}, 1500),
]

def plain(seconds): return f"{seconds:.0f} s" if seconds < 100 else f"{seconds/60:.1f} min"

def run(cmd, env, limit):
    "Run, passing the output on; returns (exit status, last line that was not empty)."
    p = subprocess.Popen(cmd, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, errors="replace", start_new_session=True)
    late = threading.Event()
    def end(): late.set(); os.killpg(p.pid, signal.SIGKILL)
    timer, last = threading.Timer(limit, end), ""
    timer.start()
    try:
        for line in p.stdout:
            print(line, end="", flush=True)
            if line.strip(): last = line.strip()
        code = p.wait()
    except KeyboardInterrupt: os.killpg(p.pid, signal.SIGTERM); raise
    finally: timer.cancel()
    if late.is_set(): print(f"ended after its limit of {plain(limit)}", flush=True)
    return code, last

def main():
    start, results, summary = time.time(), [], ""
    for i, (title, cmd, env, limit) in enumerate(STEPS, 1):
        print(f"\n=== [{i}/{len(STEPS)}] {title} (at {plain(time.time()-start)})", flush=True)
        t = time.time()
        code, summary = run(cmd, env, limit)
        results.append((title, code, time.time()-t))
        print(f"--- {title}: {'ok' if code == 0 else f'FAILED (status {code})'}, {plain(time.time()-t)}", flush=True)
    failed = [t for t, code, _ in results if code]
    print(f"\n=== make test: {len(results)-len(failed)} of {len(results)} steps passed in {plain(time.time()-start)}")
    for title, code, seconds in results: print(f"  {'ok    ' if code == 0 else 'FAILED'}  {plain(seconds):>8}  {title}")
    if failed: print(f"failed: {', '.join(failed)}")
    print(summary if re.search(r"\d+ (passed|failed|error|skipped|deselected)", summary) else f"pytest gave no summary: {summary}", flush=True)
    return 1 if failed else 0

if __name__ == "__main__":
    try: sys.exit(main())
    except KeyboardInterrupt: sys.exit(130)
