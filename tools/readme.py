"README.md from nbs/index.ipynb (`make readme`): the first page of the site as GitHub shows it, with links that work from the top of the repository."
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NB = ROOT/"nbs"/"index.ipynb"
NOTE = "<!-- made from nbs/index.ipynb by `make readme`; edit there -->\n"

def from_top(text):
    "Relative links and pictures of a notebook in nbs/, as seen from the top level."
    outside = r"(?![a-z]+:|#|/|nbs/)"
    text = re.sub(rf"(!?\[[^\]]*\]\(){outside}(?:\./)?", r"\1nbs/", text)
    text = re.sub(rf'((?:src|srcset|href)="){outside}', r"\1nbs/", text)
    return re.sub(r"nbs/\.\./", "", text)

def outputs(cell):
    "Stored outputs of a code cell that a README can show: text and tables."
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        text = data.get("text/markdown") or o.get("text") or data.get("text/plain")
        if text is None: continue
        text = "".join(text).rstrip()
        yield text if "text/markdown" in data else f"```text\n{text}\n```"

def text():
    "The README as one string."
    parts = [NOTE]
    for cell in json.loads(NB.read_text(encoding="utf-8"))["cells"]:
        src = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            if not re.match(r"#+ .* -$", src): parts.append(from_top(src))
        elif cell["cell_type"] == "code" and not re.match(r"#\|\s*(hide|export|default_exp|eval:\s*false)", src):
            code = "\n".join(l for l in src.splitlines() if not l.startswith("#|"))
            if code.strip(): parts.append(f"```python\n{code}\n```")
            parts += outputs(cell)
    return "\n\n".join(p for p in parts if p.strip()) + "\n"

if __name__ == "__main__":
    old = (ROOT/"README.md").read_text(encoding="utf-8") if (ROOT/"README.md").exists() else ""
    (ROOT/"README.md").write_text(text(), encoding="utf-8")
    print("README.md written" if old != text() else "README.md was up to date")
