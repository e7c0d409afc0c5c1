"""Models that other nodes have loaded, streamed: the same latents, and the MODEL they came from stays as it was."""

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from torch import nn

from flux_nf4.offload.comfyui.adopt import stream_model
from flux_nf4.offload.comfyui.contract import UnknownComfyUIError, require_comfyui
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.streaming import Residency

CPU = torch.device("cpu")


@pytest.fixture
def dense(load):
    """A stock patcher of a dense model with random weights, in the tiny model's shape."""
    config = load().model.model_config
    made = type(config)(dict(config.unet_config))
    made.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = made.get_model({}, "")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def host_memory(patcher):
    blocks = [*patcher.model.diffusion_model.double_blocks, *patcher.model.diffusion_model.single_blocks]
    return {parameter.data_ptr() for block in blocks for parameter in block.parameters()}


@pytest.mark.parametrize(
    "residency",
    [Residency(), Residency((("double", 2), ("single", 3))), Residency(budget_bytes=14_000_000)],
    ids=["automatic", "counts", "budget"],
)
def test_a_streamed_dense_model_gives_the_same_latents(residency, dense, sample, copies):
    expected = sample(dense)
    streamed = stream_model(dense, residency, "7")
    assert isinstance(streamed, StreamedModelPatcher)
    assert torch.equal(sample(streamed), expected)
    assert copies.nbytes > 0
    assert streamed.report().node_id == "7"


def test_the_model_it_came_from_goes_on_and_shares_its_memory(dense, sample, copies):
    expected = sample(dense)
    streamed = stream_model(dense, Residency((("double", 0), ("single", 0))), None)
    assert not isinstance(dense, StreamedModelPatcher)
    assert host_memory(dense) == host_memory(streamed)
    for patcher in (streamed, dense, streamed, dense):
        assert torch.equal(sample(patcher), expected)


def test_patches_and_options_come_along(dense, sample, copies):
    key = "diffusion_model.single_blocks.1.linear1.weight"
    plain = sample(dense)
    patched = dense.clone()
    torch.manual_seed(1)
    shape = patched.model.diffusion_model.single_blocks[1].linear1.weight.shape
    patched.add_patches({key: ("diff", (torch.randn(shape),))}, 0.5)
    patched.model_options["transformer_options"]["mark"] = "kept"
    expected = sample(patched)
    streamed = stream_model(patched, Residency((("double", 1), ("single", 1))), None)
    assert torch.equal(sample(streamed), expected)
    assert not torch.equal(expected, plain)
    assert streamed.model_options["transformer_options"]["mark"] == "kept"


def test_a_streamed_model_is_planned_anew_and_not_stacked(load, sample, copies):
    first = load(2, 2)
    again = stream_model(first, Residency((("double", 5), ("single", 0))), "9")
    assert again.model is first.model
    assert torch.equal(sample(again), sample(first))
    assert (again.plan != first.plan, again.node_id) == (True, "9")


def test_a_model_that_is_not_built_of_blocks_is_refused(dense):
    dense.model.diffusion_model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(1, 1)]))
    with pytest.raises(ValueError, match="is not built of blocks"):
        stream_model(dense, Residency(), None)


def test_tensors_of_another_package_are_refused_by_name(dense):
    class Packed(torch.Tensor):
        pass

    layer = dense.model.diffusion_model.double_blocks[1].img_attn.proj
    layer.register_buffer("codes", torch.zeros(4).as_subclass(Packed))
    with pytest.raises(ValueError, match=r"double_blocks\.1\.img_attn\.proj\.codes is a Packed"):
        stream_model(dense, Residency(), None)


def test_it_holds_where_comfyui_runs_nodes(dense, sample):
    """In inference mode, on the CPU as load device; blocks then compute straight from host memory."""
    with torch.inference_mode():
        for _ in range(2):
            expected = sample(dense)
            streamed = stream_model(dense, Residency((("double", 7), ("single", 7))), None)
            for patcher in (streamed, dense, streamed, dense):
                assert torch.equal(sample(patcher), expected)
        comfy.model_management.unload_all_models()
        for patcher in (dense, streamed):
            assert torch.equal(sample(patcher), expected)


def test_a_comfyui_that_has_changed_is_named_and_the_model_stays_as_it_is(dense, monkeypatch, caplog):
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, "partially_unload")
    assert stream_model(dense, Residency(), None) is dense
    assert "has no comfy.model_patcher.ModelPatcher.partially_unload, which streaming needs" in caplog.text
    assert "The model is not streamed" in caplog.text


def test_a_4_bit_model_is_refused_there(load, monkeypatch):
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, "partially_unload")
    with pytest.raises(UnknownComfyUIError, match=r"ComfyUI [\d.]+ has no .*partially_unload"):
        load()


def test_nothing_is_missing_from_this_comfyui():
    require_comfyui()


def test_a_dense_model_is_copied_once_for_any_number_of_settings(dense, sample, copies):
    expected = sample(dense)
    few, many = (stream_model(dense, Residency((("double", n), ("single", n))), None) for n in (1, 4))
    assert few.model is many.model
    assert host_memory(few) == host_memory(many) == host_memory(dense)
    for streamed in (few, many, few):
        assert torch.equal(sample(streamed), expected)
    again = few.model
    del few, many, streamed
    assert stream_model(dense, Residency(), None).model is again
