"""Makes this package importable as ``flux_nf4``, whatever its folder is called, and ComfyUI as ComfyUI sees itself.

``COMFYUI_PATH`` names the ComfyUI tree. The tests in ``unit`` need none. ComfyUI is on the CPU, unless only tests in
``gpu`` are asked for.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is slow, at making inputs, too: that says nothing of the package.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).parent.parent
COMFYUI_PATH = os.environ.get("COMFYUI_PATH")


def _enter_comfyui(tree: str) -> None:
    sys.path.insert(0, tree)
    is_for_gpu = _only_gpu_tests_are_asked_for(sys.argv[1:]) and torch.cuda.is_available()
    arguments, sys.argv = sys.argv, ["comfyui", *([] if is_for_gpu else ["--cpu"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # reads sys.argv once

    sys.argv = arguments


def _only_gpu_tests_are_asked_for(arguments: list[str]) -> bool:
    """ComfyUI picks its device when it is imported, before pytest has told any conftest what it will run."""
    given = [Path(argument.split("::")[0]).resolve() for argument in arguments]
    tests = [path for path in given if path.is_relative_to(ROOT / "tests") and path.exists()]
    return bool(tests) and all(path.is_relative_to(ROOT / "tests" / "gpu") for path in tests)


def pytest_collection_finish():
    """What is imported stays: from now on, no garbage collection looks through it. Tests ask for hundreds of them."""
    gc.collect()
    gc.freeze()


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

import orderly  # noqa: E402
import package  # noqa: E402, F401

orderly.end_on_signals()  # a test that is ended, in whatever way, ends its servers

if COMFYUI_PATH:
    _enter_comfyui(COMFYUI_PATH)
