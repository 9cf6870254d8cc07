"Lint of the notebooks: the rules of howto/contributing that a machine can check. One notebook: `pytest tests/test_notebooks.py -k 02_frames`."
import ast, json, re
from pathlib import Path
import pytest

NBS = Path(__file__).resolve().parent.parent/"nbs"
ALL = [p for p in sorted(NBS.rglob("*.ipynb")) if not {".ipynb_checkpoints", "_proc"} & set(p.parts)]
HEAVY = {"vllm", "ray", "lancedb", "mlflow"}                       # never at import time
EXPORTS = {"export", "exports", "exporti", "exec_doc"}
DIRECTIVES = EXPORTS | {"default_exp", "hide", "hide_input", "hide_output", "eval:", "slow", "gpu", "multigpu", "net", "code-fold:", "code-summary:", "echo:", "output:",
                        "include:", "label:", "fig-cap:", "fig-alt:", "tbl-cap:", "export_internal", "skip_showdoc", "warning:"}
MAX_LINES, MAX_KB, MIN_PROSE, GOOD_PROSE = 40, 300, 1, 2   # words of prose for an exported line: the floor, and what to aim at

class Cell:
    def __init__(self, raw):
        self.raw, self.kind, self.src = raw, raw["cell_type"], "".join(raw["source"])
        self.lines = self.src.splitlines()
        heads = [l for l in self.lines if l.startswith("#|")]
        self.directives = {h[2:].split()[0] for h in heads if h[2:].split()} if self.kind == "code" else set()
        self.exported = bool(self.directives & EXPORTS)
        self.written = [l for l in self.lines if l.strip()]                # the directive counts: it is a line that is read
        self.body = [l for l in self.written if not l.startswith("#|")]
    @property
    def tree(self):
        text = "\n".join(l if not re.match(r"\s*[%!]", l) else "pass" for l in self.lines)
        return ast.parse(text).body
    def imports(self, deep=False):
        nodes = [n for t in self.tree for n in ast.walk(t)] if deep else self.tree
        return [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    def where(self): return f"cell starting {next((l for l in self.lines if l.strip() and not l.startswith('#|')), '')[:80]!r}"

class Notebook:
    def __init__(self, path):
        self.path, self.cells = path, [Cell(c) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        self.code = [c for c in self.cells if c.kind == "code"]
        self.exported = [c for c in self.code if c.exported]
        self.default_exp = next((m.group(1) for c in self.code if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c.src, re.M))), None)
        self.numbered = bool(re.match(r"\d", path.name))
    def prose(self): return "\n".join(re.sub(r"```.*?```", "", c.src, flags=re.S) for c in self.cells if c.kind == "markdown")

@pytest.fixture(params=ALL, ids=lambda p: p.relative_to(NBS).with_suffix("").as_posix())
def nb(request): return Notebook(request.param)

@pytest.fixture
def exporting(nb):
    if not nb.exported: pytest.skip("exports nothing")
    return nb

def say(problems):
    if problems: pytest.fail("\n".join(problems), pytrace=False)

def test_title_and_subtitle(nb):
    first = nb.cells[0]
    m = re.match(r"# (\S.*)\n+> (\S.*)", first.src)
    assert first.kind == "markdown" and m, "the first cell is `# title` and `> subtitle`"
    assert not re.search(r"[$\\]", m.group(2)), "the subtitle becomes a docstring: no LaTeX in it"

def test_says_what_it_receives_and_hands_on(exporting):
    if not exporting.numbered: return
    start = "\n".join(c.src for c in exporting.cells[:4] if c.kind == "markdown").lower()
    assert "receives" in start and "hands on" in start, "one of the first cells says what the notebook receives and what it hands on"

def test_size(nb):
    kb = nb.path.stat().st_size/1024
    assert kb <= MAX_KB, f"{kb:.0f} KB with outputs, {MAX_KB} at most: smaller pictures"

def test_directives_are_known(nb):
    bad = []
    for c in nb.code:
        bad += [f"unknown directive #| {d} in {c.where()}" for d in c.directives if d not in DIRECTIVES]
        for l in c.lines:
            if re.match(r"\s*#\s*(\|\s*)?(export|exporti|exports|default_exp|hide)\b(?!:)", l) and not re.match(r"#\|\s*(export|exporti|exports|default_exp|hide)(\s|$)", l): bad.append(f"{l!r} is no directive: write `#| export`")
            if re.match(r"#\|(export|exporti|exports|default_exp|hide)\b", l): bad.append(f"{l!r}: write `#| export`, with a space")
        stray = [l for i, l in enumerate(c.lines) if re.match(r"#\|\s*(export|hide|default_exp)\b", l) and any(k.strip() and not k.startswith("#|") for k in c.lines[:i])]
        bad += [f"{l!r} is not at the top of its cell" for l in stray]
    say(bad)

def test_default_exp(nb):
    if nb.exported: assert nb.default_exp, "exports, but has no `#| default_exp`"
    say([f"`#| export {c.lines[0].split()[-1]}`: one notebook, one module" for c in nb.exported if re.match(r"#\|\s*export\s+\S", c.lines[0])])

def test_module_name(exporting):
    bench = exporting.path.parent.name == "benchmarks"
    assert exporting.default_exp.startswith("bench.") == bench, "nbs/benchmarks exports to bench.*, and nothing else does"

def test_code_cells_are_short(nb):
    say([f"{len(c.written)} lines, {MAX_LINES} at most: {c.where()}" for c in nb.code if len(c.written) > MAX_LINES])

def test_imports_have_their_own_cells(nb):
    bad = []
    for c in nb.code:
        if "nbdev_export(" in c.src or re.search(r"^#\|\s*eval:\s*false", c.src, re.M): continue
        found = c.imports(deep=not c.exported)   # the docs build runs every cell with an import in it, at any depth
        others = [n for n in c.tree if not isinstance(n, (ast.Import, ast.ImportFrom)) and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        if found and others: bad.append(f"import beside other code: {c.where()}")
    say(bad)

def test_no_star_imports(nb):
    say([f"star import: {c.where()}" for c in nb.code for n in c.imports() if any(a.name == "*" for a in n.names)])

def test_heavy_imports_are_inside_functions(nb):
    names = lambda n: {a.name.split(".")[0] for a in n.names} if isinstance(n, ast.Import) else {(n.module or "").split(".")[0]}
    say([f"{', '.join(names(n) & HEAVY)} imported at the top: {c.where()}" for c in nb.code for n in c.imports() if names(n) & HEAVY])

def test_asserts_beside_exports(exporting):
    checks = re.compile(r"\bassert\b|\btest_(eq|fail|close|ne|is|stdout|shuffled|warns|sig|eq_type)\b|with ExceptionExpected|expect_fail")
    assert any(checks.search(c.src) for c in exporting.code if not c.exported), "no cell outside the exported ones asserts anything"

def test_prose(exporting, note):
    lines = sum(len(c.body) for c in exporting.exported)
    words = len(re.findall(r"\w[\w'-]*", exporting.prose()))
    said = f"{words} words of prose for {lines} exported lines ({words/max(lines, 1):.1f} a line)"
    if words < GOOD_PROSE*lines: note("notebooks that say little (for information)", f"{exporting.path.stem}: {said}")
    assert words >= MIN_PROSE*lines, f"{said}, {MIN_PROSE} at least, {GOOD_PROSE} to aim at: say why"

def test_ends_with_export(exporting):
    tail = [c for c in exporting.cells if c.src.strip()][-2:]
    assert re.match(r"#+ Export -\s*$", tail[0].src.strip()) and "nbdev_export()" in tail[1].src and "hide" in tail[1].directives, "the last two cells are `## Export -` and a hidden nbdev_export()"

def test_outputs(nb):
    bad, stored = [], 0
    for c in nb.code:
        for o in c.raw.get("outputs", []):
            stored += 1
            if o["output_type"] == "error" and "raises-exception" not in c.raw["metadata"].get("tags", []): bad.append(f"stored error {o.get('ename')}: {c.where()}")
    runs = [c for c in nb.code if not c.directives & (EXPORTS | {"hide", "default_exp"})]
    if nb.exported and runs and not stored: bad.append("no stored outputs: run it (make notebooks)")
    say(bad)

def test_no_paths_of_one_machine(nb):
    text = "\n".join(c.src + json.dumps(c.raw.get("outputs", [])) for c in nb.cells)
    say([f"path of one machine: {m}" for m in sorted({m.group(0) for m in re.finditer(r"(?<![\w.])/(?:work|root|home/\w+)/[\w./-]*", text)})])

def test_pictures_come_from_here(nb):
    text = "\n".join(c.src for c in nb.cells if c.kind == "markdown")
    bad = [f"picture from another server: {u}" for u in re.findall(r"!\[[^\]]*\]\((https?://[^)]+)\)", text)] + (["mermaid needs a script from another server: plain text or an SVG file"] if "```mermaid" in text else [])
    say(bad)
