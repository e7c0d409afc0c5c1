"""The oracle: a picture of the NF4 file equals stock ComfyUI's picture of its dense twin, pixel by pixel.

The twin has every 4-bit weight dequantised to fp32, which is what a CPU computes in.
"""

from dataclasses import replace

import pytest
import torch
from comfy_server import link_model
from make_checkpoint import make_checkpoint, make_twin
from small_recipe import small_recipe


@pytest.fixture(params=["dev-v1", "dev-v2", "schnell-v1", "schnell-v2"])
def files(request, tmp_path, server):
    """An NF4 file and its dense twin in the server's folders; gone after the test."""
    variant, style = request.param.split("-")
    recipe = small_recipe(variant=variant, nested=style == "v1")
    nf4, twin = tmp_path / f"{request.param}.safetensors", tmp_path / f"{request.param}-twin.safetensors"
    make_checkpoint(nf4, recipe)
    make_twin(twin, replace(recipe, unet_only=True), torch.float32)
    link_model(nf4, server.base, "checkpoints")
    link_model(twin, server.base, "diffusion_models")
    yield nf4.name, twin.name
    nf4.unlink()
    twin.unlink()
    server.free()


def test_the_picture_equals_that_of_the_dense_twin(files, workflow, stock, picture):
    nf4, twin = files
    ours = picture(workflow(ckpt_name=nf4, padded=True))
    assert len(set(ours[2])) > 50, "the picture is too plain to prove anything"
    assert ours == picture(stock(workflow(ckpt_name=nf4, padded=True), twin))
    assert ours != picture(workflow(ckpt_name=nf4, text="a bicycle", padded=True)), "the prompt must matter"
