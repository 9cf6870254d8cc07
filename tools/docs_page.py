"One notebook to a page, in a worker process (a module of its own: the notebook shell takes over `__main__`)."
import ast, os, re

def show_source(cell):
    "Exported code appears on the page, folded, behind its documentation: `#| export` becomes nbdev's `#| exports`; cells of imports stay hidden."
    if cell.cell_type != "code" or not re.match(r"#\|\s*export\s*$", (cell.source.splitlines() or [""])[0]): return
    try: body = ast.parse(cell.source).body
    except SyntaxError: return
    if any(not isinstance(n, (ast.Import, ast.ImportFrom)) for n in body): cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, count=1, flags=re.M)

def process_notebook(src, dst):
    "nbdev's processors on one notebook: documentation of exported symbols, hidden cells, links. Returns an error text, or None."
    import warnings
    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults, exec_show_docs
    warnings.simplefilter("ignore")
    os.environ["IN_TEST"] = "1"   # as nbdev does: notebooks behave as under test
    class NoExec(FilterDefaults):
        def base_procs(self): return [p for p in super().base_procs() if p is not exec_show_docs]
    error = None
    for procs in (FilterDefaults, NoExec):
        nb = read_nb(src)
        for cell in nb.cells: show_source(cell)
        try: procs()(nb); break
        except Exception as e:
            cause = e.__cause__ or e
            error = error or f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]} ({str(e).splitlines()[0]} which the docs build runs)"
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = cell.source.replace('#| code-fold: show\n#| code-summary: "Exported source"', '#| code-fold: true\n#| code-summary: "Source"')
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, dst)
    return error
