"Rooms and shelves: a module imports only from lower (number, letter) ones, nothing imports in a circle, and importing needs no GPU, no network and no heavy package."
import ast, os, re, subprocess, sys
from pathlib import Path
import pytest
from test_notebooks import ALL, NBS, Notebook

ROOT = NBS.parent
PKG = ROOT/"video_vlm"
MODULES = [p for p in sorted(PKG.rglob("*.py")) if p.name not in ("_modidx.py", "__init__.py") and "__pycache__" not in p.parts]
name_of = lambda p: p.relative_to(PKG).with_suffix("").as_posix().replace("/", ".")
BENCH = ("09", "ab~")   # measurements may use everything but the command line

def ranks():
    "Module -> (number, letters), from the names of the notebooks."
    res = {}
    for p in ALL:
        exp, m = Notebook(p).default_exp, re.match(r"(\d+)([a-z]*)_", p.name)
        if exp: res[exp] = BENCH if exp.startswith("bench.") else (m.group(1), m.group(2)) if m else None
    return res

RANK = ranks()

def imports(path):
    "Modules of this package that a module imports, anywhere in it, also inside functions: {name: line}."
    found, here = {}, ("video_vlm." + name_of(path)).split(".")
    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(here[:-n.level] + ([n.module] if n.module else [])) if n.level else n.module or ""
            names = [base, *(f"{base}.{a.name}" for a in n.names)]
        elif isinstance(n, ast.Call) and getattr(n.func, "attr", getattr(n.func, "id", "")) == "import_module" and n.args and isinstance(n.args[0], ast.Constant): names = [str(n.args[0].value)]
        for name in names:
            name = name.removeprefix("video_vlm.")
            if not name.startswith("_") and (PKG/(name.replace(".", "/") + ".py")).exists() and name != name_of(path): found.setdefault(name, n.lineno)
    return found

@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    me = name_of(path)
    assert me in RANK, f"{me} has no notebook"
    assert RANK[me], f"the notebook of {me} has no number"
    up = [f"line {line}: {n} {RANK.get(n)}" for n, line in imports(path).items() if not (RANK.get(n) or ("99", "")) < RANK[me] and not (me.startswith("bench.") and n.startswith("bench."))]
    if me == "cli": up = [u for u in up if ": bench." not in u]
    assert not up, f"{me} {RANK[me]} imports from its own level or above:\n  " + "\n  ".join(up)

def test_no_circles():
    graph, done = {name_of(p): set(imports(p)) for p in MODULES}, set()
    def visit(node, trail):
        assert node not in trail, "circle: " + " -> ".join([*trail[trail.index(node):], node])
        if node in done: return
        for n in sorted(graph.get(node, ())): visit(n, [*trail, node])
        done.add(node)
    for node in graph: visit(node, [])

CLEAN = """
import importlib, json, os, socket, sys, traceback
import cv2, fastapi, torch, typer, transformers.models.auto.modeling_auto, transformers.models.siglip.modeling_siglip, transformers.processing_utils   # what many need, once; a module is then imported in a fork of its own
class Without:   # finds what the other finder finds, less the packages that may not be installed
    def __init__(self, inner): self.inner = inner
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {"vllm", "ray", "lancedb", "mlflow"} else self.inner.find_spec(name, path, target)
    def __getattr__(self, k): return getattr(self.inner, k)
sys.meta_path[:] = [Without(f) for f in sys.meta_path]
def refuse(*a, **k): raise OSError("the network must not be needed to import this module")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
def alone(module):
    "What is wrong with importing `module` in a fresh child, '' for nothing."
    r, w = os.pipe()
    if not os.fork():
        try:
            importlib.import_module(module)
            heavy = [m for m in ("vllm", "ray", "lancedb", "mlflow") if m in sys.modules]
            said = f"imported: {heavy}" if heavy else ""
        except BaseException: said = traceback.format_exc()
        os.write(w, said.encode()[-20000:]); os._exit(0)
    os.close(w)
    with os.fdopen(r) as f: said = f.read()
    return said if os.wait()[1] == 0 else said or "the process died"
print("RESULT" + json.dumps({m: alone(m) for m in sys.argv[1:]}))
"""

TO_IMPORT = ["video_vlm", *(f"video_vlm.{name_of(p)}" for p in MODULES)]

@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "Every module imported in a process of its own: {module: what is wrong with it}."
    import json
    env, cwd = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, tmp_path_factory.mktemp("elsewhere")
    r = subprocess.run([sys.executable, "-c", CLEAN, *TO_IMPORT], capture_output=True, text=True, cwd=cwd, env=env, timeout=900)
    assert "RESULT" in r.stdout, r.stderr[-2500:]
    return json.loads(r.stdout.split("RESULT")[1])

@pytest.mark.parametrize("module", TO_IMPORT)
def test_imports_without_gpu_network_or_heavy_packages(module, imported):
    if imported[module]: pytest.fail(imported[module][-2500:], pytrace=False)

def test_every_exporting_notebook_has_its_module():
    missing = [m for m in RANK if not (PKG/(m.replace(".", "/") + ".py")).exists()]
    assert not missing, f"not exported: {missing}"

def test_ten_stages():
    stages = {"data", "dedup", "frames", "encoder", "model", "training", "search", "evaluation", "release", "serving"}
    assert stages <= set(RANK), f"missing: {sorted(stages - set(RANK))}"

LIGHT = """
import contextlib, io, json, os, sys
from pathlib import Path
import mlflow, numpy, pyarrow, typer, video_vlm.evaluation, video_vlm.gateway   # what many of them need, once
from mlflow import MlflowClient
def alone(words):
    "(exit code, model libraries that were imported, what was printed) of a command, in a fork of its own."
    r, w = os.pipe()
    if not os.fork():
        from video_vlm.cli import main
        sys.argv, out = ["video-vlm", *words], io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try: main(); code = 0
            except SystemExit as e: code = e.code or 0
            except BaseException as e: code = repr(e)
        os.write(w, json.dumps([code, [m for m in ("torch", "transformers", "sklearn") if m in sys.modules], out.getvalue()[-2000:]]).encode()); os._exit(0)
    os.close(w)
    with os.fdopen(r) as f: said = f.read()
    os.wait(); return json.loads(said)
Path("model").mkdir(); Path("model/config.json").write_text("{}"); Path("runs/tokens/entries").mkdir(parents=True)
print("RESULT" + json.dumps([[c, *alone(c.split())] for c in sys.argv[1:]]))
"""

def test_commands_without_a_model_do_not_load_one(tmp_path):
    "Keys, bills, versions and erasures are asked for by people and cron jobs that should not wait for torch and transformers."
    import json
    commands = ["keys add acme --folder runs/serve", "keys list --folder runs/serve", "usage --folder runs/serve", "release register model --registry runs/registry", "release list --registry runs/registry",
                "erase --tenant acme --dry-run", "bench", "eval --list", *(f"{c} --help" for c in ("dedup", "search", "index", "moment", "flywheel mine", "serve"))]
    r = subprocess.run([sys.executable, "-c", LIGHT, *commands], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, timeout=600)
    assert "RESULT" in r.stdout, r.stderr[-2500:]
    for command, code, heavy, said in json.loads(r.stdout.split("RESULT")[1]): assert code == 0 and not heavy, (command, code, heavy, said)
