"""int8 on a GPU: the kernels' rows, whole Linears, and a streamed model, if comfy-kitchen and Triton work there."""

import pytest
import torch
from gpu_models import DEVICE

from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import int8_weight, kernels, kitchen, measured
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.nodes_compute import choose
from flux_nf4.with_triton import launch

DTYPE = torch.bfloat16
FASTER = "int8 where faster"


@pytest.fixture(autouse=True)
def _there_is_int8():
    problem = kitchen.problem_on(DEVICE, DTYPE) or int8_weight.problem_on(DEVICE, DTYPE)
    if problem is not None:
        pytest.skip(problem)


@pytest.fixture
def always_faster(monkeypatch):
    monkeypatch.setattr(measured, "timings", {})
    monkeypatch.setattr(measured, "measure", lambda case: measured.Timing(2.0, 1.0))


def layer_of(shape):
    generator = torch.Generator(DEVICE).manual_seed(0)
    layer = Linear4bit([QuantState("nf4", 64, shape)], bias=True, dtype=DTYPE, device=DEVICE)
    layer.packed_0.random_(256, generator=generator)
    layer.absmax_0.uniform_(0.01, 0.03, generator=generator)
    layer.bias.data.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("shape", [(3072, 3072), (9216, 3072), (3072, 15360), (48, 256)])
def test_the_rows_are_those_of_comfy_kitchen(shape):
    layer = layer_of(shape)
    scale, rows = torch.zeros(shape[0], device=DEVICE), torch.empty(shape, dtype=torch.int8, device=DEVICE)
    int8_weight.write_int8_rows(*layer.packed_weight(), DTYPE, (), scale, rows)
    expected = int8_weight.rotated(kernels.dequantise(*layer.packed_weight(), torch.float32))
    reference, reference_scale = kitchen.quantise(layer.dequantise(DTYPE))
    own, theirs = (
        (made * by[:, None] - expected).norm() / expected.norm()
        for made, by in ((rows, scale), (reference, reference_scale))
    )
    assert own < 1.02 * theirs < 0.012


@pytest.mark.parametrize("shape", [(3072, 3072), (21504, 3072), (3072, 15360), (6144, 24576)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernels_that_are_called_directly_give_comfy_kitchens_bits(shape, has_bias):
    """On older GPUs, and with a comfy-kitchen that is not known, its own code calls them, which takes longer."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    input = torch.randn(2, 300, shape[1], generator=generator, device=DEVICE).to(DTYPE)
    rows = torch.randint(-127, 128, shape, generator=generator, device=DEVICE).to(torch.int8)
    scale = torch.rand(shape[0], generator=generator, device=DEVICE)
    bias = torch.randn(shape[0], generator=generator, device=DEVICE).to(DTYPE) if has_bias else None
    own = kitchen._linear_on(DEVICE, DTYPE)
    assert hasattr(own, "_theirs") == (torch.cuda.get_device_capability(DEVICE) >= (8, 0))
    expected = kitchen._functions("cuda").int8_linear(
        input, rows, scale, bias, out_dtype=DTYPE, convrot=True, convrot_groupsize=kitchen.GROUP
    )
    assert torch.equal(own(input, rows, scale, bias), expected)


def test_compiled_kernels_are_kept_and_write_the_same_rows(monkeypatch):
    """A Triton that calls them otherwise than expected would launch all by its own, slower way."""
    monkeypatch.setattr(launch, "_compiled", {})
    layer = layer_of((3072, 3072))
    scale = torch.zeros(3072, device=DEVICE)
    found = []
    for are_known in (False, False, True):
        rows = torch.empty(layer.shape, dtype=torch.int8, device=DEVICE)
        int8_weight.write_int8_rows(*layer.packed_weight(), DTYPE, (), scale, rows, scales_are_known=are_known)
        found.append(rows)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert len(launch._compiled) == 2
    assert None not in launch._compiled.values()


def test_a_weight_that_begins_at_any_byte_gives_the_same_rows():
    layer = layer_of((48, 512))
    packed, absmax, state = layer.packed_weight()
    odd = torch.cat((packed[:1], packed))[1:]
    found = []
    for own in (packed, odd):
        scale, rows = torch.zeros(48, device=DEVICE), torch.empty(layer.shape, dtype=torch.int8, device=DEVICE)
        int8_weight.write_int8_rows(own, absmax, state, DTYPE, (), scale, rows)
        found.append(rows)
    assert odd.data_ptr() % 16
    assert torch.equal(*found)


@pytest.mark.usefixtures("always_faster")
def test_a_linear_is_near_the_exact_one_and_repeats_its_bits():
    layer = layer_of((9216, 3072))
    input = torch.randn(512, 3072, device=DEVICE) * torch.where(torch.rand(3072, device=DEVICE) < 0.01, 20.0, 1.0)
    exact = layer(input.to(DTYPE)).float()
    layer.compute_by(FASTER, DEVICE, DTYPE)
    found = layer(input.to(DTYPE))
    assert 0.005 < (found.float() - exact).norm() / exact.norm() < 0.016
    assert torch.equal(layer(input.to(DTYPE)), found)


@pytest.mark.usefixtures("always_faster")
def test_streamed_is_equal_to_resident(wide):
    resident = choose(wide.resident(), FASTER)
    expected = wide.sample(resident)
    assert resident.report().streamed == ()
    streamed = choose(wide.with_counts(0, 0), FASTER)
    assert torch.equal(wide.sample(streamed), expected)
    assert streamed.report().streamed
    assert not torch.equal(wide.sample(choose(wide.with_counts(0, 0), None)), expected)


def test_both_ways_are_timed():
    timing = measured.measure(measured.Case((3072, 3072), 1024, DTYPE, DEVICE, True))
    assert 0 < timing.int8_ms < 50
    assert 0 < timing.exact_ms < 50
