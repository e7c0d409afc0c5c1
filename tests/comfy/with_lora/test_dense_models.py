"""LoRA on any dense model of ComfyUI's whose blocks are streamed: as without streaming, to the bit."""

import copy

import comfy.model_management
import loras
import pytest
import torch
from scaled_fp8 import in_scaled_fp8, load_scaled_fp8
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.streaming import attach_streaming
from flux_nf4.offload.plan import Residency


@pytest.fixture
def streamed(twin_model, copies):
    """A streamed patcher of a dense model."""
    config = twin_model.model_config  # which some versions cannot copy
    model = copy.deepcopy(twin_model, {id(config): config})
    blocks = {"double": list(model.diffusion_model.double_blocks), "single": list(model.diffusion_model.single_blocks)}
    attach_streaming(model, blocks)
    cpu = torch.device("cpu")
    patcher = StreamedModelPatcher(model, load_device=cpu, offload_device=cpu)
    patcher.residency = Residency((("double", 0), ("single", 1)))
    return patcher


@pytest.mark.parametrize("kind", ["low rank", "dora", "all layers, biases and norms"])
def test_it_is_as_in_stock_comfyui(kind, streamed, twin, twin_model, sample, with_lora, shapes):
    file = loras.kohya(shapes)
    if kind == "dora":
        adapters = [loras.adapters(f"diffusion_model.{name}", shape)["dora"] for name, shape in shapes.items()]
        file = {key: value for each in adapters for key, value in each.items()}
    if kind.startswith("all"):
        file = loras.black_forest_labs(twin_model)
    expected, plain = sample(with_lora(twin, file, 0.8)), sample(twin)
    assert not torch.equal(expected, plain)
    assert torch.equal(sample(with_lora(streamed, file, 0.8)), expected)
    assert torch.equal(sample(streamed), plain)


@pytest.fixture
def scaled(twin_model, config, monkeypatch):
    """A stock patcher of the same model in scaled fp8."""
    tensors = {name: tensor.clone() for name, tensor in twin_model.diffusion_model.state_dict().items()}
    own_config = type(config)(dict(config.unet_config))
    with torch.inference_mode():
        patcher, _ = load_scaled_fp8(in_scaled_fp8(tensors), own_config, monkeypatch)
    yield patcher
    comfy.model_management.unload_all_models()


def assert_as_stock(found, expected, patcher, bound):
    """To the bit; where weights are of a class of ComfyUI's own, a LoRA is added beside them: then to a rounding."""
    if any(is_traceable_wrapper_subclass(parameter) for parameter in patcher.model.parameters()):
        assert (found - expected).norm() < bound * expected.norm()
    else:
        assert torch.equal(found, expected)


@torch.inference_mode()  # as ComfyUI runs nodes: quantised tensors may not change between the modes
@pytest.mark.parametrize("resident", [0, 1])
def test_scaled_fp8_is_as_in_stock_comfyui(resident, scaled, sample, with_lora, shapes, copies):
    """With LoRA as where it offloads a model: one that it has loaded whole it quantises again."""
    patched = with_lora(scaled, loras.kohya(shapes), 0.8)
    offloaded = patched.clone()
    offloaded.partially_load = lambda device, *_, **__: offloaded.load(device, lowvram_model_memory=1) or 0
    plain, expected = sample(scaled), sample(offloaded)
    residency = Residency((("double", resident), ("single", resident)))
    assert torch.equal(sample(stream_model(scaled, residency, None)), plain)
    assert copies.nbytes > 0
    assert not torch.equal(expected, plain)
    assert_as_stock(sample(stream_model(patched, residency, None)), expected, scaled, 1e-5)


@torch.inference_mode()
def test_scaled_fp8_outside_of_blocks_is_patched_as_stock_comfyui_patches_what_it_loads_whole(
    scaled, sample, with_lora, twin_model, copies
):
    layers = {name: twin_model.diffusion_model.get_submodule(name) for name in ("img_in", "final_layer.linear")}
    file = loras.kohya({name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    patched = with_lora(scaled, file, 0.8)
    plain, expected = sample(scaled), sample(patched)
    assert not torch.equal(expected, plain)
    comfy.model_management.unload_all_models()
    streamed = stream_model(patched, Residency((("double", 0), ("single", 1))), None)
    # There stock ComfyUI quantises the patched weight once more.
    assert_as_stock(sample(streamed), expected, scaled, 0.05)
    assert copies.nbytes > 0


def test_what_nodes_read_of_a_resident_block_is_in_host_memory(streamed, with_lora, shapes):
    """Not a copy, nor what would keep the block on the device."""
    streamed.residency = Residency()
    patched = with_lora(streamed, loras.kohya(shapes))
    comfy.model_management.load_models_gpu([patched])
    streamer = streamed.model.streaming.streamer
    assert len(streamer.plan.resident) == len(streamer.blocks)
    assert streamed.model.streaming.modulation_stays
    arenas = [each.arena for each in streamed.model.streaming.streamers]
    arena = {record.untyped_storage().data_ptr() for each in arenas for record in each.records}
    read = patched.get_key_patches("diffusion_model.double_blocks")
    assert len(read) == sum(1 for _ in streamed.model.diffusion_model.double_blocks.parameters())
    for key, ((weight, _), *_) in read.items():
        bound = streamed.model.get_parameter(key)
        assert weight.untyped_storage().data_ptr() in arena
        assert bound.untyped_storage().data_ptr() not in arena
        assert torch.equal(weight, bound)


def test_patched_weights_take_no_more_of_the_device_than_their_factors(streamed, with_lora, shapes):
    patched = with_lora(streamed, loras.kohya(shapes))
    comfy.model_management.load_models_gpu([streamed])
    before = streamed.model.streaming.streamer.device_bytes
    comfy.model_management.load_models_gpu([patched])
    factors = sum(4 * 4 * (rows + columns) for rows, columns in shapes.values())
    assert 0 < streamed.model.streaming.streamer.device_bytes - before <= factors
    assert not any("weight" in module.__dict__ for module in streamed.model.modules())
