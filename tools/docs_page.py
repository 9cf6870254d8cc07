"One notebook to a page, in a worker process (a module of its own: the notebook shell takes over `__main__`)."
import os

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
        try: procs()(nb); break
        except Exception as e: error = error or f"{type(e.__cause__ or e).__name__}: {str(e.__cause__ or e).strip().splitlines()[0]} (in a cell that the docs build runs: {str(e).splitlines()[0]})"
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, dst)
    return error
