"""LoRA with ComfyUI's own nodes, in the real server, in graphs as people send them."""

import re

import loras
import pytest
import torch
from comfy_server import link_model
from safetensors.torch import save_file
from small_recipe import WIDTHS

WIDTH = WIDTHS["hidden"]
SHAPES = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.0.img_mlp.0": (4 * WIDTH, WIDTH),
    "double_blocks.0.txt_mod.lin": (6 * WIDTH, WIDTH),
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "single_blocks.0.linear2": (WIDTH, 5 * WIDTH),
}


@pytest.fixture(scope="module")
def put(server, tmp_path_factory):
    """A function that puts a LoRA file where the server finds it, and gives its name."""
    folder = tmp_path_factory.mktemp("loras")

    def put(name, tensors, cut_by=0):
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut_by])
        link_model(path, server.base, "loras")
        return path.name

    return put


@pytest.fixture(scope="module")
def names(put):
    """Three LoRA files; the last is for a text encoder too."""
    encoder = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": loras.random("up", 4 * WIDTHS["clip_l"], 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": loras.random("down", 4, WIDTHS["clip_l"]),
    }
    files = [loras.kohya(SHAPES, rank, alpha=float(rank), seed=str(rank)) for rank in (4, 16, 8)]
    return [put(f"lora-{index}", file) for index, file in enumerate([*files[:2], files[2] | encoder])]


def chained(workflow, names, strengths):
    """``workflow`` with a LoraLoader for each name between the checkpoint and all that uses it."""
    model, clip = ["1", 0], ["1", 1]
    for index, (name, strength) in enumerate(zip(names, strengths, strict=True)):
        inputs = {"model": model, "clip": clip, "lora_name": name, "strength_model": strength, "strength_clip": 1.0}
        workflow[f"lora{index}"] = {"class_type": "LoraLoader", "inputs": inputs}
        model, clip = [f"lora{index}", 0], [f"lora{index}", 1]
    for node in workflow.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["model"] = model
        if node["class_type"] == "T5TokenizerOptions":
            node["inputs"]["clip"] = clip
    return workflow


def test_a_chain_of_three_follows_its_strengths_without_reading_the_checkpoint_again(workflow, picture, names):
    def run(*strengths):
        executed = set()

        def on_message(message):
            if message["type"] == "executing":
                executed.add(message["data"]["node"])

        return picture(chained(workflow(steps=1), names, strengths), on_message), executed

    plain = picture(workflow(steps=1))
    first, _ = run(0.8, 0.5, 1.0)
    second, executed = run(0.8, 0.5, 0.3)
    assert len({plain, first, second}) == 3
    assert "lora2" in executed
    assert "1" not in executed


@pytest.fixture
def streams(server):
    """A function: have the server stream, or stop that and tell how many bytes it streamed meanwhile."""

    def switch(is_on):
        server.free()
        switch = {"1": {"class_type": "TestStreamOnCpu", "inputs": {"is_on": is_on}}}
        assert server.run(switch)["status"]["status_str"] == "success"
        return int((re.findall(r"TestStreamOnCpu: (\d+) bytes", server.log.read_text("utf-8")) or ["0"])[-1])

    yield switch
    switch(False)


def test_a_chain_of_three_on_streamed_blocks_makes_the_same_picture(workflow, picture, names, streams):
    def run(blocks, *strengths):
        counts = {"double_blocks_cuda_size": blocks, "single_blocks_cuda_size": blocks}
        return picture(chained(workflow(steps=1, **counts), names, strengths))

    expected = [run(1, *strengths) for strengths in ((0.8, 0.5, 1.0), (0.8, 0.5, 0.3))]
    streams(True)
    assert [run(0, *strengths) for strengths in ((0.8, 0.5, 1.0), (0.8, 0.5, 0.3))] == expected
    in_4_bits = sum(out * columns for out, columns in SHAPES.values()) / 2
    assert streams(False) > 2 * in_4_bits, "two pictures of one step"


def test_the_log_says_what_a_lora_did(server, workflow, picture, names, put):
    up, down = loras.low_rank("other", (640, 640))
    key = "lora_unet_down_blocks_1_attentions_0_proj_in"
    other = put("sdxl", {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
    damaged = loras.kohya(SHAPES)
    damaged["lora_unet_single_blocks_0_linear2.lora_up.weight"][0, 0] = torch.nan
    picture(chained(workflow(seed=2, steps=1), [names[0], other, put("nan", damaged)], (0.7, 0.7, 0.7)))
    log = server.log.read_text("utf-8")
    assert "LoRA: 5 patches applied at strength 0.7, all that ComfyUI recognised for this model" in log
    assert "LoRA: none of its keys belongs to this model" in log
    assert "LoRA: 4 patches applied at strength 0.7, 1 skipped: diffusion_model.single_blocks.0.linear2.weight (" in log


def test_a_file_that_comfyui_cannot_read_is_an_error_that_says_so(server, workflow, put):
    name = put("truncated", loras.kohya(SHAPES), cut_by=1000)
    history = server.run(chained(workflow(), [name], (1.0,)))
    (data,) = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    assert data["node_type"] == "LoraLoader"
    assert "incomplete" in data["exception_message"]


def test_a_layer_of_which_a_half_is_missing_is_left_out(server, workflow, picture, put):
    file, layer = loras.kohya(SHAPES), "lora_unet_single_blocks_0_linear2"
    without = {name: tensor for name, tensor in file.items() if not name.startswith(layer)}
    halves = {name: file[name] for name in (f"{layer}.lora_up.weight", f"{layer}.alpha") if name in file}
    names = put("without-linear2", without), put("half-of-linear2", without | halves)
    expected, found = (picture(chained(workflow(steps=1), [name], (1.0,))) for name in names)
    assert found == expected
    assert found != picture(workflow(steps=1))
    assert f"LoRA: the file lacks {layer}.lora_down.weight" in server.log.read_text("utf-8")
