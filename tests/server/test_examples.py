"""Every example workflow, small, in the real server."""

import copy
import json

import environment
import pytest
import torch
from comfy_server import link_model
from PIL import Image
from safetensors.torch import save_file

EXAMPLES = environment.ROOT / "example_workflows"
NAMES = sorted(path.stem for path in (EXAMPLES / "api").glob("*.json"))


@pytest.fixture(scope="module")
def small(server, checkpoint, tmp_path_factory):
    """What stands in, by class of node, for files that are not here and for sizes that take long on a CPU."""
    lora = tmp_path_factory.mktemp("loras") / "small_lora.safetensors"
    generator = torch.Generator().manual_seed(1)
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(
        {
            f"{layer}.lora_down.weight": torch.randn(4, 3072, generator=generator) / 50,
            f"{layer}.lora_up.weight": torch.randn(3072, 4, generator=generator) / 50,
        },
        lora,
    )
    link_model(lora, server.base, "loras")
    Image.new("RGB", (64, 64), "teal").save(server.base / "input" / "small.png")
    loaders = ("MZ_Flux1CheckpointLoaderNF4_cpuDynOffload", "FluxNF4CheckpointLoaderStreamed")
    return {
        **{loader: {"ckpt_name": checkpoint.name} for loader in loaders},
        "LoraLoaderModelOnly": {"lora_name": lora.name},
        "EmptySD3LatentImage": {"width": 64, "height": 64},
        "LoadImage": {"image": "small.png"},
        "KSampler": {"steps": 1},
    }


def test_each_has_a_graph_an_api_form_and_a_picture():
    assert NAMES
    for kind in (".json", ".jpg"):
        assert sorted(path.stem for path in EXAMPLES.glob(f"*{kind}")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, server, small, picture):
    workflow = json.loads((EXAMPLES / "api" / f"{name}.json").read_text("utf-8"))
    for node in workflow.values():
        node["inputs"] |= small.get(node["class_type"], {})
        if node["class_type"] == "FluxKontextImageScale":  # to a megapixel
            scale = {"upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}
            node |= {"class_type": "ImageScale", "inputs": node["inputs"] | scale}
    height, width, pixels = picture(workflow)
    assert (height, width) == (64, 64)
    if "LoraLoaderModelOnly" in {node["class_type"] for node in workflow.values()}:
        without = copy.deepcopy(workflow)
        for node in without.values():
            if node["class_type"] == "LoraLoaderModelOnly":
                node["inputs"]["strength_model"] = 0.0
        assert picture(without)[2] != pixels
