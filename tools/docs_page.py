"One notebook to a page, in a worker process (a module of its own: the notebook shell takes over `__main__`)."
import ast, os, re

def show_source(cell):
    "Exported code appears on the page, folded, behind its documentation: `#| export` becomes nbdev's `#| exports`; cells of imports stay hidden."
    if cell.cell_type != "code" or not re.match(r"#\|\s*export\s*$", (cell.source.splitlines() or [""])[0]): return
    try: body = ast.parse(cell.source).body
    except SyntaxError: return
    if any(not isinstance(n, (ast.Import, ast.ImportFrom)) for n in body): cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, count=1, flags=re.M)

def name_source(cell):
    "Say in the fold's heading what is inside."
    head = '#| code-fold: show\n#| code-summary: "Exported source"'
    if cell.cell_type != "code" or head not in (cell.source or ""): return
    names = re.findall(r"^(?:async def|def|class)\s+(\w+)|^(\w+)\s*(?::[^=\n]+)?=(?!=)", cell.source, re.M)
    what = ", ".join(dict.fromkeys(a or b for a, b in names))
    cell.source = cell.source.replace(head, f'#| code-fold: true\n#| code-summary: "Source: {what[:90]}"' if what else '#| code-fold: true\n#| code-summary: "Source"')

def lookup_without_commands():
    "A name in backticks means the stage function (`dedup.dedup`), never the command line's wrapper of the same name (`cli.dedup`)."
    import nbdev.doclinks as links
    if hasattr(links, "_with_commands"): return
    links._with_commands = table = links._build_lookup_table
    links._build_lookup_table = lambda strip_libs=None, incl_libs=None, skip_mods=None: table(strip_libs, incl_libs, skip_mods or ("video_vlm.cli",))

def forgiving_signatures():
    "A class whose inherited annotations name what only its parent's module imports (transformers' configs) is shown with them as written."
    import inspect
    import fastcore.docments as docments
    def signature(sym, eval_str=False, **kwargs):
        try: return inspect.signature(sym, eval_str=eval_str, **kwargs)
        except NameError: return inspect.signature(sym, **kwargs)
    docments.signature = signature

def process_notebook(src, dst):
    "nbdev's processors on one notebook: documentation of exported symbols, hidden cells, links. Returns an error text, or None."
    import warnings
    from execnb.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults, exec_show_docs
    warnings.simplefilter("ignore")
    lookup_without_commands(); forgiving_signatures()
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
    for cell in nb.cells: name_source(cell)
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, dst)
    return error
