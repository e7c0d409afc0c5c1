"""Makes this package importable as ``flux_nf4``, whatever its folder is called, and ComfyUI as ComfyUI sees itself.

``COMFYUI_PATH`` names the ComfyUI tree. The tests in ``unit`` need none.
"""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
COMFYUI_PATH = os.environ.get("COMFYUI_PATH")


def _alias_package() -> None:
    package = types.ModuleType("flux_nf4")
    package.__path__ = [str(ROOT)]
    sys.modules["flux_nf4"] = package


def _enter_comfyui(tree: str) -> None:
    sys.path.insert(0, tree)
    arguments, sys.argv = sys.argv, ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # reads sys.argv once

    sys.argv = arguments


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def comfyui():
    """The ComfyUI tree under test."""
    assert COMFYUI_PATH, "run the tests with: python3 tools/test.py (it sets COMFYUI_PATH)"
    return Path(COMFYUI_PATH)


sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "commands", "benchmarks", "tests/support")]
_alias_package()
if COMFYUI_PATH:
    _enter_comfyui(COMFYUI_PATH)
