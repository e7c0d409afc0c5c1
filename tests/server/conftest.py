"""One ComfyUI server for all tests of this folder, with the package dropped in and small checkpoints."""

import copy
import io
import json
import shutil
from pathlib import Path

import environment
import pytest
from comfy_server import ComfyServer, drop_package, link_model
from make_checkpoint import Recipe, cached_checkpoint
from PIL import Image

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
WORKFLOW = json.loads((environment.ROOT / "tests/support/old_prompt.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def checkpoint():
    """A v2 dev checkpoint with one block of each kind."""
    return cached_checkpoint(environment.CACHE / "checkpoints", Recipe())


@pytest.fixture(scope="session")
def server(tmp_path_factory, comfyui, checkpoint):
    base = tmp_path_factory.mktemp("comfyui")
    drop_package(environment.ROOT, base)
    shutil.copy(Path(__file__).parent / "helper_nodes.py", base / "custom_nodes")
    link_model(checkpoint, base, "checkpoints")
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        yield server


@pytest.fixture(scope="session")
def workflow(checkpoint):
    """A function: text to image with the old node, small, as a fresh dict, with the loader's inputs replaced.

    The text is not padded to 256 tokens, for quick steps, unless asked for.
    """

    def make(seed=1, steps=2, text="a lighthouse", *, padded=False, **loader):
        made = copy.deepcopy(WORKFLOW)
        inputs = {node["class_type"]: node["inputs"] for node in made.values()}
        inputs[OLD_NODE] |= {"ckpt_name": checkpoint.name} | loader
        inputs["CLIPTextEncode"]["text"] = text
        inputs["EmptySD3LatentImage"] |= {"width": 128, "height": 64}
        inputs["KSampler"] |= {"seed": seed, "steps": steps}
        if not padded:
            options = {"clip": inputs["CLIPTextEncode"]["clip"], "min_padding": 0, "min_length": 0}
            made["short"] = {"class_type": "T5TokenizerOptions", "inputs": options}
            inputs["CLIPTextEncode"]["clip"] = ["short", 0]
        return made

    return make


@pytest.fixture(scope="session")
def picture(server):
    """A function: run a workflow, which must succeed, and return its picture as (height, width, bytes)."""

    def run(workflow, on_message=lambda _: None):
        history = server.run(workflow, on_message)
        assert history["status"]["status_str"] == "success", history["status"]
        (png,) = server.images(history)
        image = Image.open(io.BytesIO(png)).convert("RGB")
        return image.height, image.width, image.tobytes()

    return run


@pytest.fixture(scope="session")
def error_of(server):
    """A function: run a workflow, which must fail in the loader, and return the message in its history."""

    def run(workflow):
        history = server.run(workflow)
        assert history["status"]["status_str"] == "error", history["status"]
        (data,) = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
        assert data["node_type"] == OLD_NODE
        return data["exception_message"]

    return run
