"""Build the site from the notebooks: `_proc` (nbdev's processing: exported code becomes documented signatures), then `_docs`.

With `quarto` on PATH the pages are made by Quarto; without it by smalldocs, in pure Python and offline. nbdev's own `nbdev_docs` is not used: where
Quarto is missing it tries to install it with sudo and then runs pip (style guide, trap 8). Nothing outside `_proc` and `_docs` is written."""
import argparse, json, os, re, shutil, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_page import process_notebook

ROOT = Path(__file__).resolve().parent.parent
PROC, DOCS, NBS = ROOT/"_proc", ROOT/"_docs", ROOT/"nbs"

SOURCE_LINK = re.compile(r"\[source\]\([^)]*\)\{[^}]*\}\s*")   # to a file on GitHub; the page carries the source itself
FOREIGN_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)\s]*\.md\)")   # in a docstring inherited from another package
SYMBOL_LINK = re.compile(r'<a href="([^"#]*)#([^"]+)"([^>]*)>(\s*<code\b)')

# ---- notebooks to pages

def process(force, workers):
    "Process the notebooks that changed, copy the other files; returns {notebook: error} (its page is then made without signatures)."
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context
    if force: shutil.rmtree(PROC, ignore_errors=True)
    newest = max(f.stat().st_mtime for f in (ROOT/"settings.ini", Path(__file__), Path(__file__).with_name("docs_page.py")))
    files = [p for p in sorted(NBS.rglob("*")) if p.is_file() and not any(part[0] in "._" for part in p.relative_to(NBS).parts)]
    for p in PROC.rglob("*.ipynb") if PROC.exists() else ():   # pages whose notebook is gone
        if not (NBS/p.relative_to(PROC)).exists(): p.unlink()
    todo = {}
    for src in files:
        dst = PROC/src.relative_to(NBS)
        if src.suffix != ".ipynb": dst.parent.mkdir(parents=True, exist_ok=True); shutil.copy2(src, dst)
        elif not dst.exists() or dst.stat().st_mtime < max(src.stat().st_mtime, newest): todo[src] = dst
    errors, done = {}, 0
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        jobs = {pool.submit(process_notebook, src, dst): src for src, dst in todo.items()}
        for job in as_completed(jobs):
            done += 1; src = jobs[job]
            print(f"    [{done}/{len(todo)}] {src.relative_to(NBS)}", flush=True)
            if error := job.result(): errors[src] = error; os.utime(todo[src], (0, 0))   # tried again next time
    finally:   # the workers hold whole notebooks: ending them is quicker than letting them tidy up
        for p in list((pool._processes or {}).values()): p.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    return errors

def site_base():
    "Where nbdev's links point: the published site."
    from nbdev.config import get_config
    cfg = get_config()
    return cfg.doc_host.rstrip("/") + "/" + cfg.doc_baseurl.strip("/") + "/"

def page_name(path):
    "Name of a notebook's page: without its number."
    from nbdev.doclinks import _nbpath2html
    return _nbpath2html(path)

def local_links(base):
    "Make links to symbols work in any copy of the site: absolute ones of nbdev become relative to the page; none inside code."
    in_code = re.compile(r"\[(`[^`\]]+`)\]\(" + re.escape(base) + r"[^)\s]*\)")
    for p in PROC.rglob("*.ipynb"):
        up = "../"*(len(p.relative_to(PROC).parts)-1)
        old = p.read_text(encoding="utf-8")
        nb = json.loads(old)
        def mend(text):
            parts = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
            return "".join(in_code.sub(r"\1", t) if i % 2 else t.replace("](" + base, "](" + up) for i, t in enumerate(parts))
        for c in nb["cells"]:
            if c["cell_type"] == "markdown": c["source"] = mend("".join(c["source"]))
            for o in c.get("outputs", []):
                if "text/markdown" in o.get("data", {}): o["data"]["text/markdown"] = FOREIGN_LINK.sub(r"\1", SOURCE_LINK.sub("", mend("".join(o["data"]["text/markdown"]))))
        stamp = p.stat()
        p.write_text(json.dumps(nb), encoding="utf-8")
        os.utime(p, (stamp.st_atime, stamp.st_mtime))

def title_of(path):
    "First heading of a notebook."
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(c["source"])
        if m := re.search(r"^(?:#|title:)\s+(.+?)\s*$", text, re.M): return m.group(1).strip("'\"")
    return path.stem

def explicit(contents):
    "Pages that the sidebar names one by one."
    return {p for c in contents for p in ([c] if isinstance(c, str) else [c["href"]] if "href" in c else explicit(c.get("contents", [])))}

def sidebar(contents, named):
    "Sidebar entries with globs spelled out (less the pages named elsewhere), each page with the number of its stage in front."
    res = []
    for c in contents:
        if isinstance(c, dict) and "contents" in c: res.append({**c, "contents": sidebar(c["contents"], named)})
        elif isinstance(c, dict) and "auto" in c:
            for p in sorted(p.relative_to(NBS) for p in NBS.glob(c["auto"])):
                number = re.match(r"(\d+[a-z]*)_", p.name)
                title = title_of(NBS/p)
                if p.as_posix() not in named: res.append({"text": (f"{number.group(1)} " if number else "") + title[0].upper() + title[1:], "href": p.as_posix()})
        else: res.append(c)
    return [c for c in res if isinstance(c, str) or c.get("contents", True)]   # no empty sections

def settings():
    "The site's settings with the sidebar spelled out, written into `_proc`."
    cfg = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    bar = cfg["website"]["sidebar"]
    bar["contents"] = sidebar(bar["contents"], explicit(bar["contents"]))
    (PROC/"_quarto.yml").write_text(yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True), encoding="utf-8")

# ---- pages to a site

def render_quarto():
    r = subprocess.run(["quarto", "render", "--no-cache", "--no-execute"], cwd=PROC)
    if r.returncode: sys.exit(f"quarto render failed with status {r.returncode}")

def mathml(html):
    "Formulas as MathML, so that no page asks another server for a script."
    import html as h
    from latex2mathml.converter import convert
    def one(m):
        tex = re.sub(r"^\\[(\[]|\\[)\]]$", "", h.unescape(m.group(2)).strip())
        try: return convert(tex, display="block" if m.group(1) == "display" else "inline")
        except Exception as e: return f'<code class="math-error" title="{h.escape(str(e))}">{h.escape(tex)}</code>'
    html = re.sub(r'<span class="math (inline|display)">(.*?)</span>', one, html, flags=re.S)
    return re.sub(r'<(link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(</script>)?', "", html)

def settle_symbols(folder):
    "Links that nbdev made from a name in backticks, where its page does not document that name (a private one): to the page, not to a missing place on it."
    pages = read_site(folder)
    for name in pages:
        def one(m):
            target = ((folder/name).parent/unquote(m.group(1)) if m.group(1) else folder/name).resolve()
            page = pages.get(target.relative_to(folder.resolve()).as_posix()) if target.exists() else None
            return m.group(0) if page is None or unquote(m.group(2)) in page.ids else f'<a href="{m.group(1) or "#"}"{m.group(3)}>{m.group(4)}'
        f = folder/name
        f.write_text(SYMBOL_LINK.sub(one, f.read_text(encoding="utf-8")), encoding="utf-8")

def render_smalldocs():
    "smalldocs, with nbdev's page names, symbols' anchors and formulas put right."
    from smalldocs.config import load
    from smalldocs.site import Site
    class Pages(Site):
        def read(self, src):
            page = super().read(src)
            page.out = page.out.with_name(page_name(Path(src.name)).name)
            return page
        def find_page(self, target):
            by_out = {p.out: p for p in self.pages.values()}
            return super().find_page(target) or by_out.get(target)
    quiet_keys = re.compile(r"html-math-method|output-file|keep-md|commonmark")
    site = Pages(load(PROC), quiet=True)
    pages = site.build()
    for page in site.pages.values():
        f = site.out/page.out
        f.write_text(mathml(f.read_text(encoding="utf-8")), encoding="utf-8")
    for css in (site.out/"site_libs").rglob("*.css"):   # themes ask Google for fonts; the page's own stack of fonts serves
        text = css.read_text(encoding="utf-8")
        if "@import" in text: css.write_text(re.sub(r'@import\s+url\(["\']?https?:[^)]*\)\s*;?', "", text), encoding="utf-8")
    for w in site.warnings:
        if not quiet_keys.search(w) and "broken link" not in w: print(f"    note: {w}")
    return pages

def publish():
    "Swap the new site in whole."
    built, old = PROC/"_docs", ROOT/"_docs.old"
    (built/".nojekyll").touch()
    shutil.rmtree(old, ignore_errors=True)
    if DOCS.exists(): DOCS.rename(old)
    shutil.copytree(built, DOCS)
    shutil.rmtree(old, ignore_errors=True)

# ---- looking at what was built

class Page(HTMLParser):
    "What a page points at, and what on it can be pointed at."
    def __init__(self, text):
        super().__init__(); self.links, self.ids, self.images = [], set(), 0
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        self.images += tag in ("img", "svg")
        for k in ("href", "src", "poster"):
            if a.get(k): self.links.append((tag, a[k]))
        for part in (a.get("srcset") or "").split(","):
            if part.strip(): self.links.append((tag, part.split()[0]))

def read_site(folder=DOCS):
    "Every page of a built site, parsed."
    return {p.relative_to(folder).as_posix(): Page(p.read_text(encoding="utf-8")) for p in sorted(Path(folder).rglob("*.html")) if "site_libs" not in p.parts}

def broken_links(folder=DOCS, pages=None):
    "Links inside the site that lead nowhere (a missing file or a missing anchor), and assets that would come from another server."
    folder, pages, bad = Path(folder).resolve(), pages or read_site(folder), []
    for name, page in pages.items():
        for tag, link in page.links:
            u = urlsplit(link)
            if u.scheme in ("data", "mailto", "javascript"): continue
            if u.scheme or u.netloc:
                if tag in ("script", "img", "iframe", "source", "video") : bad.append(f"{name}: {tag} from another server: {link[:100]}")
                continue
            target = (folder/name if not u.path else folder/u.path.lstrip("/") if u.path.startswith("/") else (folder/name).parent/unquote(u.path)).resolve()
            if target.is_dir(): target = target/"index.html"
            if not target.exists(): bad.append(f"{name}: {link} leads nowhere"); continue
            other = pages.get(target.relative_to(folder).as_posix()) if target.is_relative_to(folder) else None
            if u.fragment and other and unquote(u.fragment) not in other.ids and u.fragment != "top": bad.append(f"{name}: {link}: no such place on that page")
    return sorted(set(bad))

def build(force=False, workers=2):
    "The whole way; returns the pages and the errors of notebooks."
    start = time.time()
    with_quarto = bool(shutil.which("quarto"))
    print(f"    {len(list(NBS.rglob('*.ipynb')))} notebooks, pages by {'Quarto' if with_quarto else 'smalldocs (no quarto on PATH)'}", flush=True)
    errors = process(force, workers)
    local_links(site_base())
    settings()
    print(f"    notebooks processed, {time.time()-start:.0f} s", flush=True)
    render_quarto() if with_quarto else render_smalldocs()
    settle_symbols(PROC/"_docs")
    publish()
    pages = read_site()
    print(f"    {len(pages)} pages in {DOCS.relative_to(ROOT)}/, {sum(p.images for p in pages.values())} pictures, {time.time()-start:.0f} s", flush=True)
    return pages, errors

def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--force", action="store_true", help="process every notebook again")
    a.add_argument("--workers", type=int, default=2)
    args = a.parse_args()
    os.chdir(ROOT)
    pages, errors = build(args.force, args.workers)
    bad = broken_links(pages=pages)
    if bad: print("\n".join(["broken links:", *("  " + b for b in bad)]))
    for src, error in errors.items(): print(f"{src.relative_to(ROOT)}: {error}")
    return 1 if bad or errors else 0

if __name__ == "__main__": sys.exit(main())   # the guard is needed: nbdev's workers import this file
