"""Whatever ends the demo or the tests, their ComfyUI server ends with them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment
import pytest


def servers_of(pid):
    """The ids of the ComfyUI servers that process ``pid`` has started and that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z" and "main.py\0--port" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    return found


def is_gone(pid):
    try:
        return not Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True


@pytest.fixture
def start(comfyui, tmp_path):
    """A function: a command as a child, and the id of the server that it starts."""

    def run(*command):
        variables = {"FLUX_NF4_ENTERED": "1", "COMFYUI_PATH": str(comfyui), "TMPDIR": str(tmp_path)}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=os.environ | variables, stdout=log, stderr=log, cwd=environment.ROOT
            )
        end = time.monotonic() + 120
        while not (servers := servers_of(process.pid)):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()  # noqa: PT018
            time.sleep(0.1)
        return process, servers[0]

    return run


@pytest.mark.parametrize(
    "signals", [(signal.SIGHUP,), (signal.SIGINT, signal.SIGINT)], ids=["a closed terminal", "Ctrl-C twice"]
)
def test_the_demo_leaves_nothing(signals, start, checkpoint, tmp_path):
    process, server = start("tools/demo.py", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "pictures"))
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    assert process.wait(30) == 128 + signals[0]
    assert is_gone(server)
    assert list(tmp_path.glob("flux-nf4-*")) == []
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert log.endswith("\ninterrupted\n")


def test_tests_that_are_ended_leave_no_server(start):
    process, server = start("-m", "pytest", "tests/server/test_node.py", "-q", "-p", "no:cacheprovider")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 2
    assert is_gone(server)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--double", "1000"), "1000 is no number from -1 to 100"),
        (("--double", "-3"), "-3 is no number from -1 to 100"),
        (("--size", "0"), "0 is no number from 64 to 4096, a multiple of 16"),
        (("--steps", "few"), "few is no number from 1 to 1000"),
        (("--checkpoint", "/nowhere.safetensors"), "there is no such file"),
        (("--output", "README.md"), "it is a file"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(arguments, said):
    command = [sys.executable, "tools/demo.py", *arguments]
    ended = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stdout == ""
