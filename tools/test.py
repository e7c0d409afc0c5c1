"""Runs every check: lint, format, types, tests. What CI runs.

    python3 tools/test.py
    python3 tools/test.py --static                     (seconds: no tests)
    python3 tools/test.py --comfyui ~/ComfyUI          (or COMFYUI_PATH=~/ComfyUI)
    python3 tools/test.py -- tests/unit -k header      (only these tests, as pytest takes them)

All tests take 10 to 20 minutes on two cores, the first time some more: it installs a few GB. On a machine with a GPU
those in tests/gpu run, too.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import environment
import orderly

_TOOLS = (Path("tools"), Path("benchmarks"), Path("commands"))
_BESIDE = ("tests/browser", "tests/server")
"""Tests that mostly wait for processes of their own: they run beside all others."""

_CLEANING_S = 60.0
"""How long tests may take, once they are told to end, to end the servers that they started."""

_ALIAS = environment.CACHE / "typecheck" / "flux_nf4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="test against this tree")
    parser.add_argument("--static", action="store_true", help="lint, format and types only")
    parser.add_argument("pytest", nargs="*", help="only run pytest, with these arguments")
    given = parser.parse_args()
    environment.enter(Path(given.comfyui) if given.comfyui else None)
    os.chdir(environment.ROOT)
    # Tests and their servers share the cores: threads that wait actively for more work took a quarter of them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    python = [sys.executable, "-m"]
    if given.pytest:
        os.execv(sys.executable, [*python, "pytest", *given.pytest])
    _name_the_package()
    packages = sorted(path.parent.name for path in environment.ROOT.glob("*/__init__.py"))
    checks = {
        "lint": [*python, "ruff", "check", "."],
        "format": [*python, "ruff", "format", "--check", "."],
        "types": [*python, "mypy", *(f"--package={_ALIAS.name}.{name}" for name in packages)],
        "types of tools": [*python, "mypy", *(str(path) for folder in _TOOLS for path in sorted(folder.glob("*.py")))],
    }
    variables = os.environ | {"MYPYPATH": os.pathsep.join((str(_ALIAS.parent), *map(str, _TOOLS)))}
    failed = [name for name, command in checks.items() if not _passes(name, command, variables)]
    if not given.static:
        failed += _failed_tests([*python, "pytest"])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    print("all passed")


def _name_the_package() -> None:
    """Its folder may be called anything, and mypy wants an identifier."""
    _ALIAS.parent.mkdir(parents=True, exist_ok=True)
    if _ALIAS.is_symlink() and _ALIAS.readlink() != environment.ROOT:
        _ALIAS.unlink()  # from before the checkout was moved
    if not _ALIAS.is_symlink():
        _ALIAS.symlink_to(environment.ROOT)


def _failed_tests(pytest: list[str]) -> list[str]:
    """Names of the groups of tests of which one has failed."""
    failed = []
    others = [f"--ignore={folder}" for folder in _BESIDE]
    with tempfile.NamedTemporaryFile("w+", prefix="flux-nf4-tests-") as said:
        beside = subprocess.Popen([*pytest, *_BESIDE], stdout=said, stderr=subprocess.STDOUT, env=_unbuffered())
        try:
            if not _passes("tests", [*pytest, "tests", *others], dict(os.environ)):
                failed.append("tests")
            if _has_gpu() and not _passes("tests on the GPU", [*pytest, "tests/gpu"], dict(os.environ)):
                failed.append("tests on the GPU")
            print(f"== {', '.join(_BESIDE)}, which run beside these", flush=True)
            with Path(said.name).open(encoding="utf-8", errors="replace") as text:
                _show(text, beside)
        finally:
            _end(beside)
    return failed + ([f"tests in {', '.join(_BESIDE)}"] if beside.returncode else [])


def _unbuffered() -> dict[str, str]:
    return os.environ | {"PYTHONUNBUFFERED": "1"}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _show(text: IO[str], process: "subprocess.Popen[bytes]") -> None:
    """Print what ``process`` has written so far, and the rest as it comes: a dot for each test."""
    while True:
        has_ended = process.poll() is not None
        print(text.read(), end="", flush=True)
        if has_ended:
            return
        time.sleep(0.5)


def _passes(name: str, command: list[str], variables: dict[str, str]) -> bool:
    print(f"== {name}", flush=True)
    process = subprocess.Popen(command, env=variables)
    try:
        return process.wait() == 0
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Have a process end as after Ctrl-C, with time to end what it has started. Idempotent."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_CLEANING_S)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    orderly.run(main)
