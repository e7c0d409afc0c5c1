"""What a reader must know to repeat a run: the machine, the versions, the command."""

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from arguments import ROOT
from inside_comfyui import ALLOCATOR

_PACKAGES = ("torch", "bitsandbytes", "comfy-aimdo", "comfy-kitchen", "diffusers", "gguf", "triton")


def about() -> dict[str, str]:
    """What a reader must know to repeat the run."""
    return {
        "command": f"COMFYUI_PATH=... python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "date": time.strftime("%Y-%m-%d"),
        "device": device(),
        "host": f"{os.cpu_count()} cores, {_ram_gib():.0f} GiB RAM, {platform.system()}",
        "comfyui": comfyui_version(Path(os.environ["COMFYUI_PATH"])),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)]
        ),
        "allocator": os.environ[ALLOCATOR] or "torch's own",
        "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
    }


def device() -> str:
    return _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]) or "CPU"


def comfyui_version(tree: Path) -> str:
    path = tree / "comfyui_version.py"
    return path.read_text().split('"')[-2] if path.exists() else "unknown"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _ram_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
