"""LoRA on weights of a packed tensor class, as ComfyUI's native quantised formats are.

The parameter has the logical shape, and the state dict the packed parts, which have others.
"""

import copy

import loras
import packed_linear
import pytest
import torch
from packed_linear import PackedTensor

from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.streaming import attach_streaming
from flux_nf4.offload.plan import Residency

CPU = torch.device("cpu")


@pytest.fixture
def load_packed(twin_model, copies):
    """A function: a streamed patcher of the dense twin with packed weights in its blocks, so many of them resident."""
    config = twin_model.model_config  # which some versions cannot copy
    model = packed_linear.pack(copy.deepcopy(twin_model, {id(config): config}))
    blocks = {"double": list(model.diffusion_model.double_blocks), "single": list(model.diffusion_model.single_blocks)}
    attach_streaming(model, blocks)

    def load(double=0, single=1):
        patcher = StreamedModelPatcher(model, load_device=CPU, offload_device=CPU)
        patcher.residency = Residency((("double", double), ("single", single)))
        return patcher

    return load


def test_no_patch_of_a_lora_is_refused(load_packed, shapes, config, with_lora, caplog):
    """Its factors have the logical shape; also those that are for some rows of a weight."""
    for file in (loras.kohya(shapes), loras.diffusers(config.unet_config, shapes)):
        patched = with_lora(load_packed(), file)
        assert patched.patches.keys() == {f"diffusion_model.{name}.weight" for name in shapes}
    assert "skipped" not in caplog.text


def test_a_patch_of_the_packed_shape_is_refused(load_packed, shapes, with_lora, caplog):
    name, (rows, columns) = next(iter(shapes.items()))
    patched = with_lora(load_packed(), loras.kohya({name: (rows, columns // 2)}))
    assert not patched.patches
    assert "0 patches applied at strength 1, 1 skipped" in caplog.text


def test_what_nodes_read_is_the_weight_and_not_its_packed_parts(load_packed, shapes, with_lora):
    patched = with_lora(load_packed(), loras.kohya(shapes))
    read = patched.get_key_patches("diffusion_model.single_blocks")
    assert read.keys() == {
        name for name, _ in patched.model.named_parameters() if name.startswith("diffusion_model.single_blocks")
    }
    name = "single_blocks.0.linear1"
    (weight, convert), *patches = read[f"diffusion_model.{name}.weight"]
    assert isinstance(weight, PackedTensor)
    assert tuple(convert(weight, inplace=True).shape) == shapes[name]
    assert len(patches) == 1
