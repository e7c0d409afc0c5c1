"""Benchmarks say at once what they need, on any Python; and their modules import one another one way only."""

import ast
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_gpus
from inside_comfyui import ALLOCATOR

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEXTS = {path.stem: path.read_text("utf-8") for path in FOLDER.glob("*.py")}
SCRIPTS = sorted(name for name, text in TEXTS.items() if "\nif __name__ ==" in text)
NEED_NO_GPU = ("host_cost", "load", "page")
NEED_GPU = [name for name in SCRIPTS if name not in NEED_NO_GPU]


def run(name, *arguments, **variables):
    """Its exit code, and what it says in 120 seconds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COMFYUI_PATH", "FLUX_NF4_ENTERED")} | variables
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """PYTHONPATH for a Python that finds no PyTorch."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    return str(folder)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "page"])
def test_a_python_without_pytorch_is_told_what_it_lacks(name, without_torch):
    code, said, error = run(name, PYTHONPATH=without_torch)
    assert (code, said, error.count("\n")) == (1, "", 1)
    assert error.startswith("This Python has no PyTorch.")
    _, said, error = run(name, "--help", PYTHONPATH=without_torch)
    assert said.startswith(ast.get_docstring(ast.parse(TEXTS[name]))[:60])
    assert error.startswith("This Python has no PyTorch.")


@pytest.mark.parametrize("name", ["describe", "quantise"])
def test_commands_help_a_python_without_pytorch_as_far_as_they_can(name, without_torch):
    code, said, error = run(f"../commands/{name}", "--help", PYTHONPATH=without_torch)
    text = (FOLDER.parent / "commands" / f"{name}.py").read_text("utf-8")
    assert said.startswith(ast.get_docstring(ast.parse(text))[:60])
    assert (code, error.startswith("This Python has no PyTorch.")) == (1, True)


@pytest.mark.parametrize(("name", "default"), [("soak", "(default: 200)"), ("page", "(default: 192)")])
def test_help_has_each_default(name, default):
    code, said, error = run(name, "--help")
    assert (code, error) == (0, "")
    assert default in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_ends_in_order(name):
    last = ast.parse(TEXTS[name]).body[-1]
    assert [ast.unparse(line) for line in last.body] == ["orderly.run(main)"]


def test_ctrl_c_is_one_line():
    command = [sys.executable, str(FOLDER / "host_cost.py"), "--repeats", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):  # a minute at most
            if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text("utf-8"):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "\ninterrupted\n")
    finally:
        process.kill()


def test_without_a_gpu_or_a_comfyui_nothing_begins(comfyui, tmp_path):
    output = tmp_path / "results"
    code, said, error = run("streaming", "--output", str(output))
    assert (code, said) == (1, "")
    assert error == "COMFYUI_PATH is not set. Set it to the folder of the ComfyUI to measure in.\n"
    code, said, error = run("streaming", "--output", str(output), COMFYUI_PATH=str(comfyui), CUDA_VISIBLE_DEVICES="")
    assert (code, said) == (1, "")
    assert error.startswith("This measures a GPU")
    assert not output.exists()


@pytest.mark.parametrize("name", NEED_GPU)
def test_all_that_need_a_gpu_ask_for_it(name, comfyui, tmp_path, monkeypatch):
    file = tmp_path / "flux.safetensors"
    file.touch()
    arguments = {"fidelity": [str(file)]}.get(name, [])
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setenv(ALLOCATOR, "")  # else it starts anew, with the one of ComfyUI
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(tmp_path / "results")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = runpy.run_path(str(FOLDER / f"{name}.py"))  # not by its name, which others may have, too
    with pytest.raises(SystemExit, match="This measures a GPU, and PyTorch sees none here"):
        script["main"]()
    assert list(tmp_path.iterdir()) == [file]


def test_a_list_of_contenders_makes_no_folder(tmp_path):
    code, said, _ = run("compare", "--list", "--output", str(tmp_path / "results"))
    assert code == 0
    assert "streamed-0-0" in said
    assert list(tmp_path.iterdir()) == []


def test_modules_import_one_another_one_way_only():
    imports = {}
    for name, text in TEXTS.items():
        nodes = list(ast.walk(ast.parse(text)))
        named = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        named |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports[name] = named & TEXTS.keys()
    left = dict(imports)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}, "these import one another"


def test_one_gpu_is_told_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="This measures two GPUs, and PyTorch sees one here"):
        two_gpus.require_two_gpus()


def test_a_dry_run_shares_the_work_of_two_devices(comfyui, tmp_path):
    """Or says that this ComfyUI cannot."""
    has_split = importlib.util.find_spec("comfy.multigpu") is not None
    folders = ("--output", str(tmp_path / "results"), "--folder", str(tmp_path))
    short = ("--steps", "2", "--rounds", "1", *folders)
    code, said, error = run("two_gpus", "--dry-run", *short, COMFYUI_PATH=str(comfyui))
    if not has_split:
        assert code == 1
        assert error.endswith("This ComfyUI has no MultiGPU CFG Split: 0.33.0 has it, 0.3.75 has not.\n")
        return
    assert code == 0, error
    found = json.loads((tmp_path / "results" / "two_gpus.json").read_text())
    assert [row["resident"] for row in found["rows"]] == list(two_gpus.RESIDENT)
    for row in found["rows"]:
        assert f"{row['resident']}, 64: one GPU" in said
        assert 0 <= row["difference"] < 1e-5
        assert row["ratio"] > 0
        assert 0 < row["host_busy"] < 64
