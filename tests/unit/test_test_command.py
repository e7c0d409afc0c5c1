"""The command that runs all tests: signs of life, and an end to what it started."""

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def command():
    """``tools/test.py``, whose name is also one of the standard library's."""
    spec = importlib.util.spec_from_file_location("test_command", Path(__file__).parents[2] / "tools" / "test.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script):
    """A process that has said a word."""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def test_tests_that_run_beside_show_each_dot(command, tmp_path, monkeypatch):
    path, shown = tmp_path / "said", []
    script = "import time\nfor dot in '...':\n    print(dot, end='', flush=True)\n    time.sleep(0.7)"
    with path.open("w") as said:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=said)
    monkeypatch.setattr(command, "print", lambda text, **_: shown.append(text), raising=False)
    with path.open() as text:
        command._show(text, process)
    assert "".join(shown) == "..."
    assert len([text for text in shown if text]) > 1


def test_a_process_is_told_to_end_and_has_time_for_it(command, tmp_path):
    done = tmp_path / "done"
    process = start(f"""
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    open({str(done)!r}, "w").close()
""")
    command._end(process)
    assert done.exists()
    command._end(process)


def test_a_process_that_does_not_end_is_killed(command, monkeypatch):
    monkeypatch.setattr(command, "_CLEANING_S", 0.5)
    script = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('x', flush=True)\ntime.sleep(60)"
    process = start(script)
    command._end(process)
    assert process.wait(10) == -signal.SIGKILL
