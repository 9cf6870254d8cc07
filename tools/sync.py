"""Are the notebooks clean, is the package what they export, is README.md what index.ipynb says? Works on a copy in a temporary folder,
so it never changes the working tree and does not care what is committed. Prints each file that is out of step and how to mend it."""
import difflib, os, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SKIP = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "nbdev.yml")

def nbdev(cmd, cwd):
    "Run one of nbdev's commands in the copy."
    r = subprocess.run([str(BIN/cmd)], cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if r.returncode: sys.exit(f"{cmd} failed in a copy of this tree:\n{(r.stdout + r.stderr)[-3000:]}")

def changed(a, b, pattern):
    "Relative paths under two folders that match `pattern` and differ, or are in one only."
    names = sorted({p.relative_to(d) for d in (a, b) for p in d.rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts})
    read = lambda p: p.read_text(encoding="utf-8") if p.exists() else None
    return [(n, read(a/n), read(b/n)) for n in names if read(a/n) != read(b/n)]

def short_diff(old, new, lines=12):
    return "\n".join("      " + l[:150] for l in list(difflib.unified_diff(old.splitlines(), new.splitlines(), "now", "should be", lineterm="", n=0))[:lines])

def problems():
    "One text for each file that is out of step."
    with tempfile.TemporaryDirectory(prefix="video_vlm_sync_") as tmp:
        copy = Path(tmp)
        shutil.copytree(ROOT/"nbs", copy/"nbs", symlinks=True, ignore=SKIP)
        for f in ("settings.ini", "_quarto.yml"): shutil.copy2(ROOT/f, copy/f)
        (copy/"video_vlm").mkdir()
        for f in ROOT.glob("video_vlm/**/__init__.py"):   # written once by nbdev, then only its version line
            (copy/f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(f, copy/f.relative_to(ROOT))
        nbdev("nbdev_clean", copy); nbdev("nbdev_export", copy)
        for n, old, new in changed(ROOT/"nbs", copy/"nbs", "*.ipynb"): yield f"nbs/{n} is not clean (nbdev_clean)\n{short_diff(old, new)}"
        for n, old, new in changed(ROOT/"video_vlm", copy/"video_vlm", "*.py"):
            if old is None: yield f"video_vlm/{n} is missing (nbdev_export)"
            elif new is None: yield f"video_vlm/{n} has no notebook: delete it, or write it in nbs/"
            else: yield f"video_vlm/{n} is not what its notebook exports (nbdev_export; never edit the module)\n{short_diff(old, new)}"
    sys.path.insert(0, str(ROOT/"tools"))
    import readme
    if (ROOT/"README.md").read_text(encoding="utf-8") != readme.text(): yield "README.md is not what nbs/index.ipynb says (make readme)"

if __name__ == "__main__":
    found = list(problems())
    print("\n".join(found) if found else "notebooks clean, modules exported, README made")
    sys.exit(1 if found else 0)
