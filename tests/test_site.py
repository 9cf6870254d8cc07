"The site: every notebook has a page with its pictures, no link leads nowhere, nothing comes from another server; and README.md is the first page."
import json, os, re, sys
from pathlib import Path
from urllib.parse import unquote
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import docs, readme, sync
from test_notebooks import ALL, NBS

@pytest.fixture(scope="module")
def site():
    "The pages in _docs, parsed; built here unless `make test` has just done it."
    newest = max(p.stat().st_mtime for p in [*ALL, ROOT/"_quarto.yml"])
    built = docs.DOCS/"index.html"
    if os.environ.get("VIDEO_VLM_SITE") != "built" or not built.exists() or built.stat().st_mtime < newest:
        import subprocess
        r = subprocess.run([sys.executable, str(ROOT/"tools"/"docs.py")], capture_output=True, text=True, cwd=ROOT)
        assert built.exists(), (r.stdout + r.stderr)[-3000:]
    return docs.read_site()

def page_of(nb): return docs.page_name(nb.relative_to(NBS)).as_posix()

@pytest.mark.parametrize("nb", ALL, ids=lambda p: p.relative_to(NBS).with_suffix("").as_posix())
def test_page(site, nb):
    name = page_of(nb)
    assert name in site, f"no page {name}"
    cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    hidden = lambda c: re.search(r"^#\|\s*(hide|hide_output|output:\s*false)\b", "".join(c["source"]), re.M)
    stored = sum(any(m.startswith("image/") for m in o.get("data", {})) for c in cells if c["cell_type"] == "code" and not hidden(c) for o in c.get("outputs", []))
    assert site[name].images >= stored, f"{stored} stored pictures, {site[name].images} on the page"
    html = (docs.DOCS/name).read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" not in html
    assert len(re.sub(r"<[^>]+>", "", html)) > 400

def test_symbols_are_documented(site):
    undocumented = []
    for nb in ALL:
        text = nb.read_text(encoding="utf-8")
        names = {m for c in json.loads(text)["cells"] if c["cell_type"] == "code" and re.match(r"#\|\s*exports?\s*$", ("".join(c["source"]).splitlines() or [""])[0])
                 for m in re.findall(r"^(?:def|class)\s+([A-Za-z]\w*)", "".join(c["source"]), re.M)}
        places = {i.lower() for i in site[page_of(nb)].ids} | {i.lower().rsplit(".", 1)[-1] for i in site[page_of(nb)].ids}   # a patched method is Class.method there
        undocumented += [f"{page_of(nb)}: {n}" for n in sorted(names) if n.lower() not in places]
    assert not undocumented, "\n".join(undocumented)

def test_no_broken_links(site):
    bad = docs.broken_links(pages=site)
    assert not bad, "\n" + "\n".join(bad)

def test_nothing_comes_from_another_server(site):
    css = [p for p in (docs.DOCS/"site_libs").rglob("*.css")] + [docs.DOCS/"styles.css"]
    bad = [f"{p.name}: {m}" for p in css for m in re.findall(r"(?:@import|url\()[^;)]*https?://[^;)]*", p.read_text(encoding="utf-8")) if "www.w3.org" not in m]
    bad += [f"{n}: link to {l}" for n, page in site.items() for tag, l in page.links if tag == "link" and l.startswith("http") and "cdn" in l]
    assert not bad, "\n".join(bad)

def test_link_check_finds_faults(tmp_path):
    (tmp_path/"a.html").write_text('<a href="b.html#here">x</a><a href="b.html#gone">x</a><a href="c.html">x</a><img src="i.png"><script src="https://cdn.example.org/x.js"></script>')
    (tmp_path/"b.html").write_text('<h2 id="here">x</h2><a href="a.html">x</a><a href="https://example.org">x</a>')
    bad = docs.broken_links(tmp_path)
    assert [b.split(" ", 1)[1].split(" ")[0].rstrip(":") for b in bad] == ["b.html#gone", "c.html", "i.png", "script"], bad

def test_first_page(site):
    html = (docs.DOCS/"index.html").read_text(encoding="utf-8")
    assert "images/pipeline.svg" in html and (docs.DOCS/"images"/"pipeline.svg").exists()
    svg = (docs.DOCS/"images"/"pipeline.svg").read_text(encoding="utf-8")
    assert all(f">{n:02d}</text>" in svg for n in range(10)), "ten stages in the picture"
    assert not re.search(r"(?:href|src)=.https?://|@import|url\(https?:", svg), "the picture needs nothing from elsewhere"

def test_sidebar_lists_every_page_in_order(site):
    html = (docs.DOCS/"index.html").read_text(encoding="utf-8")
    bar = re.search(r'<nav[^>]*id="quarto-sidebar".*?</nav>', html, re.S).group(0)
    links = [unquote(l).removeprefix("./") for l in re.findall(r'href="([^"#]+\.html)', bar)]
    assert {page_of(p) for p in ALL} <= set(links), f"not in the sidebar: {sorted({page_of(p) for p in ALL} - set(links))}"
    stages = [page_of(p) for p in ALL if re.match(r"\d", p.name)]
    assert [l for l in dict.fromkeys(links) if l in stages] == stages

def test_readme():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert text == readme.text(), "README.md is not what nbs/index.ipynb says: make readme"
    local = [l.split("#")[0] for l in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", l)]
    missing = [l for l in local if not (ROOT/unquote(l)).exists()]
    assert local and not missing, f"README.md points at nothing: {missing}"
    assert "make demo" in text and "make test" in text and all(f"[{n:02d} " in text for n in range(10))

def test_top_level_settings_are_shared():
    link = NBS/"_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"
