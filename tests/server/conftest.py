"""One ComfyUI server for the tests of this folder, with the package dropped in and a small Flux.1."""

import copy
import functools
import io
import json
import shutil
from pathlib import Path

import environment
import pytest
from comfy_server import ComfyServer, drop_package, link_model
from make_checkpoint import cached_checkpoint
from PIL import Image
from small_recipe import small_recipe

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
WORKFLOW = json.loads((environment.ROOT / "tests/support/old_prompt.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def checkpoint():
    """A small v2 dev checkpoint with one block of each kind."""
    return cached_checkpoint(environment.CACHE / "checkpoints", small_recipe())


@pytest.fixture(scope="session")
def dropped(checkpoint):
    """A function: give a server's folder the package, the checkpoint, and what the tests need inside the server."""

    def drop(base):
        drop_package(environment.ROOT, base)
        for nodes in (Path(__file__).parent / "helper_nodes.py", environment.ROOT / "tests/support/small_flux.py"):
            shutil.copy(nodes, base / "custom_nodes")
        link_model(checkpoint, base, "checkpoints")
        return base

    return drop


@pytest.fixture(scope="session")
def server(tmp_path_factory, comfyui, dropped):
    with ComfyServer(comfyui, dropped(tmp_path_factory.mktemp("comfyui")), ("--cpu",)) as server:
        yield server


@pytest.fixture(scope="session")
def workflow(checkpoint):
    """A function: text to image with the old node, small, as a fresh dict, with the loader's inputs replaced.

    The picture is small and the text not padded to 256 tokens, unless asked for: steps and the VAE are quick.
    """

    def make(seed=1, steps=2, text="a lighthouse", *, padded=False, **loader):
        made = copy.deepcopy(WORKFLOW)
        inputs = {node["class_type"]: node["inputs"] for node in made.values()}
        inputs[OLD_NODE] |= {"ckpt_name": checkpoint.name} | loader
        inputs["CLIPTextEncode"]["text"] = text
        inputs["EmptySD3LatentImage"] |= {"width": 48, "height": 32}
        inputs["KSampler"] |= {"seed": seed, "steps": steps}
        if not padded:
            options = {"clip": inputs["CLIPTextEncode"]["clip"], "min_padding": 0, "min_length": 0}
            made["short"] = {"class_type": "T5TokenizerOptions", "inputs": options}
            inputs["CLIPTextEncode"]["clip"] = ["short", 0]
        return made

    return make


@pytest.fixture(scope="session")
def stock():
    """A function: a workflow with the stock loader of a dense twin, of its transformer or of all that is in it."""

    def change(workflow, twin, is_whole=False):
        if is_whole:
            workflow["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": twin}}
        else:
            workflow["9"] = {"class_type": "UNETLoader", "inputs": {"unet_name": twin, "weight_dtype": "default"}}
            workflow["6"]["inputs"]["model"] = ["9", 0]
        return workflow

    return change


@pytest.fixture(scope="session")
def picture_of():
    """A function: have a server run a workflow, which must succeed; returns its picture as (height, width, bytes)."""

    def run(server, workflow, on_message=lambda _: None):
        history = server.run(workflow, on_message)
        assert history["status"]["status_str"] == "success", history["status"]
        (png,) = server.images(history)
        image = Image.open(io.BytesIO(png)).convert("RGB")
        return image.height, image.width, image.tobytes()

    return run


@pytest.fixture(scope="session")
def picture(server, picture_of):
    """A function: `picture_of` a workflow in the server of the tests."""
    return functools.partial(picture_of, server)


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
