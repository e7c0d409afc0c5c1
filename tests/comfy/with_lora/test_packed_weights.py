"""LoRA on weights of a packed tensor class, as ComfyUI's native quantised formats are.

The parameter has the logical shape, and the state dict the packed parts, which have others. Packed weights stay packed:
what a LoRA adds is computed beside them.
"""

from types import SimpleNamespace

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import loras
import packed_linear
import pytest
import torch
from packed_linear import PackedTensor

from flux_nf4.offload.comfyui.low_rank_beside import LowRankBeside
from flux_nf4.offload.comfyui.patcher import StreamedModelPatcher
from flux_nf4.offload.comfyui.streaming import attach_streaming
from flux_nf4.offload.plan import Residency

CPU = torch.device("cpu")


BOUND = 1e-5
"""Relative, to the sum in one weight; found: below 1e-6."""


@pytest.fixture
def rounded(copied_twin):
    """A stock patcher of the dense twin, of the values that the packed weights have."""
    yield comfy.model_patcher.ModelPatcher(packed_linear.round_like_packed(copied_twin()), CPU, CPU)
    comfy.model_management.unload_all_models()


@pytest.fixture
def load_packed(copied_twin, copies):
    """A function: a streamed patcher of the dense twin with packed weights, of whose blocks so many are resident."""
    model = packed_linear.pack(copied_twin())
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
    patched.clone()  # until then more patches may follow, and the line is for all of them
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


@pytest.fixture
def products():
    """A function: how many products from packed weights and from dense copies a call takes, and its result."""

    def count(function, *args, **kwargs):
        packed_linear.multiplied.clear()
        result = function(*args, **kwargs)
        return dict(packed_linear.multiplied), result

    return count


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def every_shape(twin_model):
    """(out, in) of every Linear, in the blocks and outside."""
    return loras.linear_shapes(twin_model, "")


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_it_is_computed_beside_the_packed_weight(
    layout, load_packed, rounded, sample, with_lora, shapes, every_shape, config, products
):
    """In blocks and outside, for whole weights and for some of their rows."""
    file = loras.kohya(every_shape) if layout == "kohya" else loras.diffusers(config.unet_config, shapes)
    plain, expected = sample(rounded), sample(with_lora(rounded, file, 0.8))
    assert distance(plain, expected) > 0.01
    without, found = products(sample, load_packed())
    assert distance(found, plain) < BOUND
    with_it, found = products(sample, with_lora(load_packed(), file, 0.8))
    assert distance(found, expected) < BOUND
    assert with_it == without
    assert without.keys() == {"packed"}


def test_several_of_them_add_up(load_packed, rounded, sample, with_lora, shapes, products):
    def stacked(patcher):
        for seed, rank, alpha in (("a", 4, 2.0), ("b", 16, 1.0), ("c", 1, 8.0)):
            patcher = with_lora(patcher, loras.kohya(shapes, rank, alpha, seed), 0.4)
        return patcher

    counted, found = products(sample, stacked(load_packed()))
    assert distance(found, sample(stacked(rounded))) < BOUND
    assert counted.keys() == {"packed"}


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha", "difference"])
def test_other_patches_are_computed_with_a_dense_copy(kind, load_packed, rounded, sample, with_lora, shapes, products):
    name = "single_blocks.0.linear1"
    file = loras.adapters(f"diffusion_model.{name}", shapes[name])[kind]
    counted, found = products(sample, with_lora(load_packed(), file, 0.8), steps=1)
    assert distance(found, sample(with_lora(rounded, file, 0.8), steps=1)) < BOUND
    assert counted["dense"] == 1


def test_where_blocks_are_changes_nothing(load_packed, sample, with_lora, shapes):
    latents = [
        sample(with_lora(load_packed(double, single), loras.kohya(shapes), 0.7), steps=1)
        for double, single in ((0, 0), (1, 2), (2, 3))
    ]
    assert all(torch.equal(latent, latents[0]) for latent in latents)


def test_a_change_of_strength_brings_new_scales_and_nothing_else(load_packed, sample, with_lora, shapes, copies):
    file, plain = loras.kohya(shapes, rank=16), load_packed(0, 1)
    adapters = with_lora(plain, file, 1.0).patches

    def at(strength):
        patcher = plain.clone()
        patcher.patches = {key: [(strength, *rest)] for key, [(_, *rest)] in adapters.items()}
        patcher.patches_uuid = object()
        return patcher

    comfy.model_management.load_models_gpu([at(0.3)])
    before = {module: dict(tensors) for module, tensors in plain.model.streaming.extras.items()}
    comfy.model_management.load_models_gpu([at(0.9)])
    after = plain.model.streaming.extras
    assert before.keys() == after.keys()
    changed = {name for module in after for name in after[module] if after[module][name] is not before[module][name]}
    assert changed == {"lora_scale"}
    assert torch.equal(sample(at(0.9)), sample(with_lora(load_packed(), file, 0.9)))


def test_a_hook_counts_for_its_conditioning(load_packed, rounded, sample, shapes, conditioning, products):
    file = loras.kohya(shapes)

    def hooked(patcher):
        hook = comfy.hooks.create_hook_lora(file, 0.8, 0.0)
        positive = comfy.hooks.set_hooks_for_conditioning(conditioning(1), hook)
        return sample(patcher, cfg=3.0, positive=positive, negative=conditioning(2))

    counted, found = products(hooked, load_packed())
    assert distance(found, hooked(rounded)) < BOUND
    assert counted.keys() == {"packed"}


def test_it_goes_with_its_model(load_packed, sample, with_lora, shapes):
    plain = load_packed()
    expected = sample(plain)
    patched = with_lora(plain, loras.kohya(shapes))
    assert not torch.equal(sample(patched), expected)
    assert torch.equal(sample(plain), expected)
    sample(patched, steps=1)
    comfy.model_management.unload_all_models()
    assert not [name for name, _ in plain.model.named_buffers() if "lora_" in name]
    assert torch.equal(sample(plain), expected)


def test_an_output_that_is_not_contiguous_gets_what_a_contiguous_one_gets():
    class Turned(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input).mT.contiguous().mT

    layer, (up, down) = Turned(6, 4).requires_grad_(False), (torch.randn(4, 2), torch.randn(2, 6))
    plain, input = layer.weight.clone(), torch.randn(2, 3, 6)
    beside = LowRankBeside(layer)
    adapter = SimpleNamespace(name="lora", weights=(up, down, None, None, None, None))
    for name, tensor in beside.take_patches([(0.5, adapter, 1.0, None, None)], torch.float32).items():
        layer.register_buffer(name, tensor)
    expected = torch.nn.functional.linear(input, plain + 0.5 * up @ down, layer.bias)
    torch.testing.assert_close(layer(input), expected)
