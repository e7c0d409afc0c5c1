"""Kernels for 4-bit weights on a GPU, against plain arithmetic with the values that the CPU makes of the same bytes."""

from dataclasses import replace

import comfy.model_management
import comfy.sd
import loras
import pytest
import torch
from gpu_models import DEVICE, TINY

from flux_nf4.low_rank import beside
from flux_nf4.nf4_loader.checkpoint.quant_state import NestedAbsmax, NestedTables, QuantState
from flux_nf4.nf4_loader.linear import expanded_weight, kernels, patched_weight
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.with_triton import launch

FORMATS = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "nested nf4": {"nested": True},
    "nested fp4": {"nested": True, "quant_type": "fp4"},
    "nf4 in blocks of 128": {"blocksize": 128},
}


def layers_in_4_bits(patcher):
    """By name."""
    modules = patcher.model.diffusion_model.named_modules()
    found = {name: m for name, m in modules if any(b.dtype == torch.uint8 for b in m.buffers(recurse=False))}
    assert found
    return found


def values_of(layer):
    """The dense weight, on the CPU, of where its bytes are now."""
    return layer.weight.clone().cpu()


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def exact(layer, values, input):
    """What the layer computes, in fp64 with its weight's ``values``."""
    return torch.nn.functional.linear(input.double(), values.to(DEVICE).double(), layer.bias.double())


@pytest.fixture(scope="module", params=FORMATS)
def of_format(request, load_recipe):
    return load_recipe(replace(TINY, double_blocks=1, single_blocks=2, **FORMATS[request.param]))


def test_every_format_has_the_values_of_the_cpu(of_format):
    patcher = of_format.resident()
    layers = layers_in_4_bits(patcher)
    expected = {name: values_of(layer) for name, layer in layers.items()}
    comfy.model_management.load_models_gpu([patcher])
    modulation = tuple(patcher.model.streaming.modulation.ahead.modules)
    for name, layer in layers.items():
        at = {buffer.device.type for buffer in layer.buffers()}
        assert at == {DEVICE.type} or layer in modulation, "modulation may be in RAM"
        assert torch.equal(values_of(layer), expected[name]), name


def test_every_format_gives_the_same_latents_streamed_and_resident(of_format):
    expected = of_format.sample(of_format.resident())
    assert torch.equal(of_format.sample(of_format.with_counts(0, 0)), expected)


@pytest.mark.parametrize("rows", [1, 33, 2000])
def test_every_format_computes_what_its_values_say(rows, of_format):
    patcher = of_format.resident()
    layers = layers_in_4_bits(patcher)
    comfy.model_management.load_models_gpu([patcher])
    for name, layer in layers.items():
        if layer.device == DEVICE:  # modulation may be in RAM
            input = random_input(layer, rows)
            with torch.inference_mode():
                assert relative(layer(input), exact(layer, values_of(layer), input)) < 2**-7, name


@pytest.mark.parametrize("rows", [1, 4, 33, 512, 4096])
def test_a_layer_computes_what_its_values_say(rows, wide):
    patcher = wide.resident()
    layers = {name: layers_in_4_bits(patcher)[name] for name in NAMES}
    values = {name: values_of(layer) for name, layer in layers.items()}
    comfy.model_management.load_models_gpu([patcher])
    for name, layer in layers.items():
        input = random_input(layer, rows)
        with torch.inference_mode():
            found = layer(input)
        assert found.dtype == input.dtype
        assert relative(found, exact(layer, values[name], input)) < 2**-8, name  # bf16 rounds to 2**-9


NAMES = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1", "img_in")


def random_input(layer, rows):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(1, rows, layer.in_features, generator=generator).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("rank", [16, 32], ids=["within the weight", "beside the weight"])
@pytest.mark.parametrize("rows", [4, 4096])
def test_a_layer_with_a_lora_computes_what_its_values_and_factors_say(rows, rank, wide):
    assert patched_weight.works_on(DEVICE, torch.bfloat16), "Triton does not work here"
    name, strength = "single_blocks.0.linear1", 0.8
    patcher = wide.resident()
    layer = layers_in_4_bits(patcher)[name]
    values = values_of(layer)
    up, down = (factor.bfloat16() for factor in loras.low_rank(name, tuple(values.shape), rank))
    file = {f"diffusion_model.{name}.lora_{half}.weight": factor for half, factor in (("B", up), ("A", down))}
    comfy.model_management.load_models_gpu([comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]])
    input = random_input(layer, rows)
    with torch.inference_mode():
        found = layer(input)
    without = exact(layer, values, input)
    expected = without + strength * (input.double() @ down.to(DEVICE).double().T) @ up.to(DEVICE).double().T
    assert relative(expected, without) > 0.02, "the LoRA changes too little to prove anything"
    assert relative(found, expected) < 2**-7


@pytest.mark.parametrize("shape", [(9216, 3072), (3072, 12288), (21504, 3072), (40, 328)], ids=str)
@pytest.mark.parametrize("is_nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_is_expanded_to_the_bits_of_bitsandbytes(quant_type, is_nested, shape, monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    generator = torch.Generator(DEVICE).manual_seed(0)
    state = QuantState(quant_type, 64, shape)
    packed = torch.randint(256, (state.packed_bytes,), dtype=torch.uint8, device=DEVICE, generator=generator)
    absmax, tables = torch.rand(state.absmax_count, device=DEVICE, generator=generator), None
    if is_nested:
        state = replace(state, nested=(NestedAbsmax(state.absmax_count, 256),))
        absmax = (255 * absmax).to(torch.uint8)
        sizes = NestedTables.shapes(state.nested).values()
        tables = NestedTables(*(torch.rand(size, device=DEVICE, generator=generator) for size in sizes))
    for dtype in (torch.bfloat16, torch.float16):
        expected = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, kernels.fp32_absmax(state, absmax, tables), 64, quant_type, shape, dtype
        )
        for _ in range(2):
            assert torch.equal(expanded_weight.expand(packed, absmax, state, dtype, tables), expected)
    assert launch._compiled
    assert None not in launch._compiled.values()


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(("rows", "columns", "out"), [(512, 3072, 9216), (4608, 3072, 21504), (4099, 15360, 3080)])
def test_a_lora_is_added_to_an_output_within_rounding(rows, columns, out, rank, monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    output, input, down, up = (
        random(*shape).bfloat16() for shape in ((rows, out), (rows, columns), (rank, columns), (out, rank))
    )
    down, scale = down / columns**0.5, random(rank).abs()
    assert beside.works_on(DEVICE, torch.bfloat16), "Triton does not work here"
    expected = output.double() + (input.double() @ down.double().T * scale) @ up.double().T
    for _ in range(2):
        found = output.clone()
        beside.add(found, input, down, up, scale)
        assert relative(found, expected) < 2**-8
    assert None not in launch._compiled.values()


def test_many_rows_are_multiplied_with_the_patched_weight(wide, monkeypatch):
    """Which is what the test above is about, and shows only if it is seen to happen."""
    shapes, expand = [], patched_weight.expand
    monkeypatch.setattr(patched_weight, "expand", lambda *args: shapes.append(args) or expand(*args))
    file = loras.kohya(loras.linear_shapes(wide.loaded.model), 16)
    patcher = comfy.sd.load_lora_for_models(wide.with_counts(0, 0), None, file, 0.8, 0)[0]
    wide.sample(patcher)
    assert shapes


@pytest.mark.parametrize("rows", [600, 1600, 4608])
def test_a_large_layer_has_the_bits_of_its_whole_weight_and_takes_less_memory(rows):
    shape = (55296, 6144)  # linear1 of FLUX.2-dev
    layer = Linear4bit([QuantState("nf4", 64, shape)], bias=False, dtype=torch.bfloat16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    layer.packed_0.random_(0, 256, generator=generator)
    layer.absmax_0.uniform_(generator=generator)
    input = torch.randn(1, rows, shape[1], generator=generator, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        found, taken = with_peak(lambda: layer(input))
        expected, whole = with_peak(lambda: torch.nn.functional.linear(input, layer.dequantise(torch.bfloat16)))
    assert torch.equal(found, expected)
    assert whole - taken > 400 << 20


def with_peak(call):
    """What ``call`` returns, and how many bytes of the device more than before it took at most."""
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    result = call()
    return result, torch.cuda.max_memory_allocated(DEVICE) - before
