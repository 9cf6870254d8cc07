"Shared surroundings of all tests: offline, quiet, no fight over two cores; and the folder of real files, where it is there."
import os
from pathlib import Path

for key, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "2", "IN_TEST": "1"}.items():
    os.environ.setdefault(key, value)   # before torch or transformers is imported

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTES = {}   # heading -> lines, printed above pytest's last line

@pytest.fixture(scope="session")
def root(): return ROOT

@pytest.fixture(scope="session")
def shared_data():
    "Real files beside the repository; tests that need them are skipped where they are not."
    folder = ROOT.parent/"shared"/"data"
    if not folder.is_dir(): pytest.skip(f"no real files here ({folder} is missing)")
    return folder

@pytest.fixture(scope="session")
def note():
    "note(heading, line): a line (or anything that str() makes one of) for the report at the end of the run."
    return lambda heading, line: NOTES.setdefault(heading, []).append(str(line))

@pytest.fixture(scope="session")
def say():
    "say(*words): the command line as a person types it, `(exit code, what was printed)`; a mistake is 2 and its one line, a fault of ours fails the test."
    from typer.testing import CliRunner
    from video_vlm.cli import app
    from video_vlm.data import VideoVLMError
    def run(*words):
        r = CliRunner().invoke(app, [str(w) for w in words])
        if isinstance(r.exception, VideoVLMError): return 2, str(r.exception)
        assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
        return r.exit_code, r.output
    return run

FORKS = ("test_training", "test_training_processes", "test_preference")   # they fork this process: before other tests have started threads and process groups in it

def pytest_collection_modifyitems(items): items.sort(key=lambda i: i.module.__name__ not in FORKS)

def pytest_terminal_summary(terminalreporter):
    for heading, lines in NOTES.items():
        terminalreporter.section(heading)
        for line in lines: terminalreporter.write_line(line)
