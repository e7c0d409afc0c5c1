"""The oracle: a picture of the NF4 file equals stock ComfyUI's picture of its dense twin, pixel by pixel.

The twin has every 4-bit weight dequantised to fp32, which is what a CPU computes in. With ``T5_LAYERS=24`` the files
are whole and stock ComfyUI loads MODEL, CLIP and VAE of the twin; with fewer, the twin's CLIP and VAE come from our
node, since stock ComfyUI always builds 24 layers.
"""

import os
from dataclasses import replace

import pytest
import torch
from comfy_server import link_model
from make_checkpoint import Recipe, make_checkpoint, make_twin

T5_LAYERS = int(os.environ.get("T5_LAYERS", "1"))


@pytest.fixture(params=["dev-v1", "dev-v2", "schnell-v1", "schnell-v2"])
def files(request, tmp_path, server):
    """An NF4 file and its dense twin in the server's folders; gone after the test (they are large)."""
    variant, style = request.param.split("-")
    recipe = Recipe(variant=variant, nested=style == "v1", t5_layers=T5_LAYERS)
    nf4, twin = tmp_path / f"{request.param}.safetensors", tmp_path / f"{request.param}-twin.safetensors"
    make_checkpoint(nf4, recipe)
    make_twin(twin, replace(recipe, unet_only=T5_LAYERS < 24), torch.float32)
    link_model(nf4, server.base, "checkpoints")
    link_model(twin, server.base, "checkpoints" if T5_LAYERS == 24 else "diffusion_models")
    yield nf4.name, twin.name
    nf4.unlink()
    twin.unlink()
    server.free()


def stock(workflow, twin):
    """The same workflow with the stock loader of the twin."""
    if T5_LAYERS == 24:
        workflow["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": twin}}
    else:
        workflow["9"] = {"class_type": "UNETLoader", "inputs": {"unet_name": twin, "weight_dtype": "default"}}
        workflow["6"]["inputs"]["model"] = ["9", 0]
    return workflow


def test_the_picture_equals_that_of_the_dense_twin(files, workflow, picture):
    nf4, twin = files
    ours = picture(workflow(ckpt_name=nf4, padded=True))
    assert len(set(ours[2])) > 50, "the picture is too plain to prove anything"
    assert ours == picture(stock(workflow(ckpt_name=nf4, padded=True), twin))
    assert ours != picture(workflow(ckpt_name=nf4, text="a bicycle", padded=True)), "the prompt must matter"
