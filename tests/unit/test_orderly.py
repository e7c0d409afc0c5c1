"""Commands end in one line, with nothing left behind."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = Path(__file__).parents[2] / "commands"

HEAD = f"""
import sys, time
sys.path.insert(0, {str(COMMANDS)!r})
import orderly
"""

CLEANS_UP = """
def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        sys.stdin.read()
        print("cleaned up", flush=True)

orderly.run(main)
"""
"""It needs until its input is closed."""


def start(body):
    command = [sys.executable, "-c", HEAD + body]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_one_line_after_cleaning_up(number):
    process = start(CLEANS_UP)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    said, error = process.communicate(timeout=20)
    assert (process.returncode, said, error) == (128 + number, "cleaning up\ncleaned up\n", "\ninterrupted\n")


def test_a_signal_while_it_imports_ends_it_in_one_line():
    process = start("print('importing', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "\ninterrupted\n")
    assert process.returncode == -signal.SIGINT  # a shell says 130


def test_a_second_signal_waits_for_the_cleaning_up():
    process = start(CLEANS_UP)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
        assert [process.stderr.readline() for _ in range(2)] == ["\n", "ending: a moment\n"]
    assert process.communicate(timeout=20) == ("cleaned up\n", "\ninterrupted\n")
    assert process.returncode == 130


ENDS_SLOWLY = """
import atexit, os, signal

class UntilTheEnd:
    def __del__(self, kill=os.kill, of=os.getpid(), number=signal.SIGINT):
        kill(of, number)

sys.until_the_end = UntilTheEnd()  # after the handlers of signals
atexit.register(os.kill, os.getpid(), signal.SIGINT)  # before

def main():
    os.kill(os.getpid(), signal.SIGINT)

orderly.run(main)
"""


def test_a_second_signal_at_the_end_of_the_process_changes_nothing():
    process = start(ENDS_SLOWLY)
    assert process.communicate(timeout=20) == ("", "\ninterrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "nothing can be written")],
)
def test_what_the_machine_lacks_is_one_line(number, said):
    process = start(f"def main():\n    raise OSError({number}, 'x', '/some/file')\norderly.run(main)")
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert error.startswith("/some/file: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_fault_of_ours_is_no_line_but_a_traceback():
    process = start(f"def main():\n    raise OSError({errno.EINVAL}, 'x')\norderly.run(main)")
    assert "Traceback" in process.communicate(timeout=20)[1]
    assert "Traceback" in start("import nothing_of_this_name").communicate(timeout=20)[1]


def test_a_reader_that_has_read_enough_is_no_error():
    process = start("def main():\n    while True:\n        print('x' * 1000)\norderly.run(main)")
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(20) == 0


def test_what_went_well_is_no_error():
    assert start("orderly.run(lambda: None)").communicate(timeout=20) == ("", "")
