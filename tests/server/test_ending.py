"""Whatever ends the demo or the tests, their ComfyUI server ends with them."""

import contextlib
import os
import re
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

        def has_started_or_ended():
            return process.poll() is not None or (servers_of(process.pid) and not has_open(process.pid))

        wait_until(has_started_or_ended, tmp_path / "log")
        assert process.poll() is None, (tmp_path / "log").read_text()
        return process, servers_of(process.pid)[0]

    return run


def wait_until(holds, log):
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def has_open(pid):
    """Whether a process has its server's log open: until it knows the server that it starts."""
    try:
        return any(link.readlink().name == "server.log" for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return True  # it is opening or closing files


def is_stopped(pid):
    """Whether all threads are: one that still runs would let the process end."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


def is_told_to_end(pid):
    """Whether a process that is stopped has been sent SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return bool(pending & 1 << signal.SIGTERM - 1)


@pytest.mark.parametrize(
    ("number", "is_sent_again"),
    [(signal.SIGHUP, False), (signal.SIGINT, True)],
    ids=["a closed terminal", "Ctrl-C twice"],
)
def test_the_demo_leaves_nothing(number, is_sent_again, start, checkpoint, tmp_path):
    process, server = start("tools/demo.py", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "pictures"))
    log = tmp_path / "log"
    if is_sent_again:
        os.kill(server, signal.SIGSTOP)  # else it may have ended, and the demo, too, when the second comes
        wait_until(lambda: is_stopped(server), log)
    process.send_signal(number)
    if is_sent_again:
        wait_until(lambda: is_told_to_end(server), log)
        process.send_signal(number)
        wait_until(lambda: "ending: a moment" in log.read_text(), log)
        with contextlib.suppress(ProcessLookupError):  # after 10 s it is killed
            os.kill(server, signal.SIGCONT)
    assert process.wait(120) == 128 + number
    assert is_gone(server)
    assert list(tmp_path.glob("flux-nf4-*")) == []
    assert "Traceback" not in log.read_text()
    assert log.read_text().endswith("\ninterrupted\n")


def test_tests_that_are_ended_leave_no_server(start):
    process, server = start("-m", "pytest", "tests/server/test_node.py", "-q", "-p", "no:cacheprovider")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 2
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
    ended = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stdout == ""
