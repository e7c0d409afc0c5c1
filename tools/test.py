"""Runs every check: lint, format, types, tests. What CI runs.

python3 tools/test.py
python3 tools/test.py --comfyui ~/ComfyUI          (or COMFYUI_PATH=~/ComfyUI)
python3 tools/test.py -- tests/unit -k header      (only these tests, as pytest takes them)
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import environment

_TOOLS = (Path("tools"), Path("benchmarks"), Path("commands"))
_BESIDE = ("tests/browser", "tests/server")
"""Tests that mostly wait for processes of their own: they run beside all others."""

_ALIAS = environment.CACHE / "typecheck" / "flux_nf4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="test against this tree")
    parser.add_argument("--static", action="store_true", help="lint, format and types only")
    parser.add_argument("pytest", nargs="*", help="only run pytest, with these arguments")
    given = parser.parse_args()
    environment.enter(Path(given.comfyui) if given.comfyui else None)
    os.chdir(environment.ROOT)
    python = [sys.executable, "-m"]
    if given.pytest:
        raise SystemExit(subprocess.run([*python, "pytest", *given.pytest], check=False).returncode)
    _ALIAS.parent.mkdir(parents=True, exist_ok=True)
    if not _ALIAS.is_symlink():
        # A name for the package: its folder may be called anything, and mypy wants an identifier.
        _ALIAS.symlink_to(environment.ROOT)
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


def _failed_tests(pytest: list[str]) -> list[str]:
    others = [f"--ignore={folder}" for folder in _BESIDE]
    with tempfile.TemporaryFile("w+") as said:
        beside = subprocess.Popen([*pytest, *_BESIDE], stdout=said, stderr=subprocess.STDOUT)
        try:
            failed = [] if _passes("tests", [*pytest, "tests", *others], dict(os.environ)) else ["tests"]
            print(f"== {', '.join(_BESIDE)}, which run beside these", flush=True)
            beside.wait()
        finally:
            beside.kill()
        said.seek(0)
        print(said.read(), flush=True)
    return failed + ([f"tests in {', '.join(_BESIDE)}"] if beside.returncode else [])


def _passes(name: str, command: list[str], variables: dict[str, str]) -> bool:
    print(f"== {name}", flush=True)
    return subprocess.run(command, env=variables, check=False).returncode == 0


if __name__ == "__main__":
    main()
