"""What is asked of ComfyUI before anything is streamed: all that the code uses, each missing one by its name."""

import ast
from pathlib import Path

import comfy.model_patcher
import pytest

from flux_nf4.offload.comfyui import requires
from flux_nf4.offload.comfyui.own_model import SharedModulesPatcher
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.requires import UnknownComfyUIError, require_comfyui

ROOT = Path(__file__).parents[2]

ONLY_IN_NEWER_ONES = {"backup_buffers", "pinned"}
"""They are set, for newer ComfyUIs, and never read."""


def names_of_patchers_in(path):
    """What the code of a file reads or sets of ComfyUI's ModelPatcher, by the names that it gives to patchers."""
    is_patchers = path.name == "patcher.py"
    variables = {"patcher", "clone", "self"} if is_patchers else {"patcher", "clone"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Attribute(ast.Call(ast.Name("super")), name) if is_patchers:
                yield name
            case ast.Attribute(ast.Name(variable), name) if variable in variables:
                if not any(name in vars(ours) for ours in (StreamedModelPatcher, SharedModulesPatcher)):
                    yield name


def test_all_that_the_code_uses_of_patchers_is_asked_for():
    files = [*(ROOT / "offload" / "comfyui").glob("*.py"), ROOT / "nodes_compute.py", ROOT / "checkpoints.py"]
    used = {name for path in files for name in names_of_patchers_in(path) if not name.startswith("__")}
    assert {"clone", "pre_run", "patches_uuid", "injections", "callbacks"} <= used
    asked_for = {name.removeprefix("ModelPatcher.") for name in requires._NEEDED["comfy.model_patcher"]}
    assert used - asked_for - set(requires._NEEDED_OF_PATCHERS) == ONLY_IN_NEWER_ONES


@pytest.mark.parametrize("name", requires._NEEDED_OF_PATCHERS)
def test_an_attribute_that_patchers_lack_is_named(name, monkeypatch):
    make = comfy.model_patcher.ModelPatcher.__init__
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "__del__", lambda self: None, raising=False)

    def make_without(self, *args):
        make(self, *args)
        *where, last = name.split(".")
        delattr(self.model if where else self, last)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "__init__", make_without)
    with pytest.raises(UnknownComfyUIError, match=rf"ComfyUI [\d.]+ has no {name}\b.* in its ModelPatchers, which"):
        require_comfyui()


def test_a_patcher_that_is_made_otherwise_is_named(monkeypatch):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "__del__", lambda self: None, raising=False)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "__init__", lambda self, model, device: None)
    with pytest.raises(UnknownComfyUIError, match=r"has no ModelPatcher of a model and two devices \(TypeError: .*\)"):
        require_comfyui()
