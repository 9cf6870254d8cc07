"""Run notebooks from the top in fresh kernels and keep their outputs, then clean them: what the pages and GitHub show.
`tools/notebooks.py` runs all of them in order, `tools/notebooks.py nbs/02_frames.ipynb ...` some. A notebook that fails keeps its old outputs."""
import argparse, os, subprocess, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds a cell
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress")   # tqdm's wish for widgets is no output for a page
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")    # nor are the bars of transformers over loading and writing weights

def flagged(cell, flags):
    "Whether a cell carries a test flag (`#| gpu`): it is not run here and keeps the output it has."
    heads = [l.strip() for l in cell.source.splitlines() if l.strip().startswith("#|")]
    return any(h[2:].split(":")[0].strip() in flags or h.replace(" ", "") == "#|eval:false" for h in heads)

def chatter(output):
    "Warnings of other packages about this machine: nothing for a page."
    return output.output_type == "stream" and output.name == "stderr" and "site-packages" in output.text and "Warning" in output.text

def execute(path, flags):
    "Run one notebook; returns an error text, or None when the new outputs are written."
    nb = nbformat.read(path, 4)
    skip = {c.id: (c.cell_type, c.get("outputs")) for c in nb.cells if c.cell_type == "code" and (flagged(c, flags) or "nbdev_export()" in c.source)}
    for c in nb.cells:
        if c.id in skip: c.cell_type = "raw"
    client = NotebookClient(nb, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    try: client.execute()
    except CellExecutionError as e: return str(e)[-3000:]
    except Exception as e: return f"{type(e).__name__}: {e}"
    for c in nb.cells:
        if c.id in skip: c.cell_type, c["outputs"], c["execution_count"] = *skip[c.id], None
        elif c.cell_type == "code": c["outputs"] = [o for o in c.outputs if not chatter(o)]
    tmp = path.with_suffix(".tmp")
    nbformat.write(nb, tmp)
    os.replace(tmp, path)

def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("notebooks", nargs="*", type=Path)
    chosen = args.parse_args().notebooks
    files = [p.resolve() for p in chosen] or [p for p in sorted((ROOT/"nbs").rglob("*.ipynb"))
                                              if ".ipynb_checkpoints" not in p.parts and not (p.parent/".notest").exists()]
    flags, failed = set(get_config().tst_flags.split()), []
    for i, p in enumerate(files, 1):
        if not p.exists(): sys.exit(f"{p} is not there")
        print(f"[{i}/{len(files)}] {p.relative_to(ROOT)}", flush=True)
        t = time.time()
        if error := execute(p, flags): failed.append(p.name); print(error)
        else: subprocess.run([str(Path(sys.executable).parent/"nbdev_clean"), "--fname", str(p)], cwd=ROOT, check=True)
        print(f"    {'FAILED' if error else 'done'}, {time.time()-t:.0f} s", flush=True)
    if failed: sys.exit(f"failed: {', '.join(failed)}")

if __name__ == "__main__": main()
