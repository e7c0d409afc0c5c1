"""Every example workflow, small, in the real server."""

import json

import environment
import pytest
import torch
from comfy_server import link_model
from native_files import has_formats
from PIL import Image
from safetensors.torch import save_file
from small_recipe import WIDTHS
from sparse_checkpoint import make_sparse_checkpoint, make_sparse_int8

EXAMPLES = environment.ROOT / "example_workflows"
NAMES = sorted(path.stem for path in (EXAMPLES / "api").glob("*.json"))

OF_OUR_CHECKPOINT = {
    "FluxNF4UNETLoaderStreamed": 0,
    "DualCLIPLoader": 1,
    "FluxNF4DualCLIPLoader": 1,
    "Load4BitTextEncoderStreamed": 1,
    "VAELoader": 2,
}
"""Loaders of what is in the small checkpoint, too: the output of its loader that takes the place of each."""

OF_FLUX2 = {"Flux2Scheduler"}
"""Nodes that ComfyUI has since 0.3.72."""


@pytest.fixture(scope="module")
def small(server, checkpoint, tmp_path_factory):
    """What stands in, by class of node, for files that are not here and for sizes that take long on a CPU."""
    lora = tmp_path_factory.mktemp("loras") / "small_lora.safetensors"
    generator = torch.Generator().manual_seed(1)
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(
        {
            f"{layer}.lora_down.weight": torch.randn(4, WIDTHS["hidden"], generator=generator) / 5,
            f"{layer}.lora_up.weight": torch.randn(WIDTHS["hidden"], 4, generator=generator) / 5,
        },
        lora,
    )
    link_model(lora, server.base, "loras")
    Image.new("RGB", (32, 32), "teal").save(server.base / "input" / "small.png")
    dense = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    make_sparse_checkpoint(dense, double_blocks=1, single_blocks=1, is_all_in_one=False, is_4bit=False, **WIDTHS)
    link_model(dense, server.base, "diffusion_models")
    int8 = dense.with_name("int8.safetensors")
    make_sparse_int8(int8, double_blocks=1, single_blocks=1, **WIDTHS)
    link_model(int8, server.base, "diffusion_models")
    loaders = ("MZ_Flux1CheckpointLoaderNF4_cpuDynOffload", "FluxNF4CheckpointLoaderStreamed")
    return {
        **{loader: {"ckpt_name": checkpoint.name} for loader in loaders},
        "UNETLoader": {"unet_name": dense.name},
        "LoraLoaderModelOnly": {"lora_name": lora.name},
        "EmptySD3LatentImage": {"width": 32, "height": 32},
        "LoadImage": {"image": "small.png"},
        "KSampler": {"steps": 1},
        "Flux2Scheduler": {"steps": 1},
    }


@pytest.fixture
def example(small, checkpoint):
    """A function: the API form of an example with what stands in."""

    def make(name):
        workflow = json.loads((EXAMPLES / "api" / f"{name}.json").read_text("utf-8"))
        for key, node in list(workflow.items()):
            node["inputs"] |= small.get(node["class_type"], {})
            if node["class_type"] == "UNETLoader" and "int8" in name and has_formats():
                node["inputs"]["unet_name"] = "int8.safetensors"
            if node["class_type"] == "FluxKontextImageScale":  # to a megapixel
                scale = {"upscale_method": "area", "width": 32, "height": 32, "crop": "disabled"}
                node |= {"class_type": "ImageScale", "inputs": node["inputs"] | scale}
            if node["class_type"] == "EmptyFlux2LatentImage":  # of the small model, which is a Flux.1
                node |= {"class_type": "EmptySD3LatentImage", "inputs": node["inputs"] | small["EmptySD3LatentImage"]}
            if node["class_type"] in OF_OUR_CHECKPOINT:
                old = {"ckpt_name": checkpoint.name, "double_blocks_cuda_size": 0, "single_blocks_cuda_size": 0}
                slot = OF_OUR_CHECKPOINT[node["class_type"]]
                workflow[key] = {"class_type": loader_of_all, "inputs": old}
                for other in workflow.values():
                    links = {name: [key, slot] for name, value in other["inputs"].items() if value == [key, 0]}
                    other["inputs"] |= links
        return workflow

    loader_of_all = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
    return make


def test_each_has_a_graph_an_api_form_and_a_picture():
    assert NAMES
    for kind in (".json", ".jpg"):
        assert sorted(path.stem for path in EXAMPLES.glob(f"*{kind}")) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if "save" not in name])
def test_it_makes_a_picture(name, example, picture, server):
    workflow = example(name)
    used = {node["class_type"] for node in workflow.values()}
    if missing := (used & OF_FLUX2) - json.loads(server.get("/object_info")).keys():
        pytest.skip(f"this ComfyUI has no {missing.pop()}")
    height, width, pixels = picture(workflow)
    assert (height, width) == (32, 32)
    if "LoraLoaderModelOnly" in {node["class_type"] for node in workflow.values()}:
        for node in workflow.values():
            if node["class_type"] == "LoraLoaderModelOnly":
                node["inputs"]["strength_model"] = 0.0
        assert picture(workflow)[2] != pixels


def test_it_saves_a_file_that_our_loader_lists(server, example):
    history = server.run(example("flux_quantise_and_save"))
    assert history["status"]["status_str"] == "success", history["status"]
    (saved,) = server.base.rglob("flux1-dev-nf4_00001_.safetensors")
    info = json.loads(server.get("/object_info/FluxNF4UNETLoaderStreamed"))["FluxNF4UNETLoaderStreamed"]
    assert saved.name in info["input"]["required"]["unet_name"][0]
    saved.unlink()
