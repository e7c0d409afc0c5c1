"""A weight that is large when it is dense is expanded in slices of rows, where that gives the bits of the whole."""

import functools

import pytest
import torch
from torch import nn

from flux_nf4.nf4_loader.linear import kernels, matmul

LARGE_BYTES = matmul._LARGE_BYTES
SHAPE = (1280, 128)
SLICES = [512, 512, 256]
"""Rows of each: of three equal slices, rounded up to whole tiles."""


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    """In fp32 the weight of `SHAPE` is large."""
    monkeypatch.setattr(matmul, "_LARGE_BYTES", 4 * 1280 * 128 - 1)
    monkeypatch.setattr(matmul, "_SLICE_BYTES", 4 * 500 * 128)


@pytest.fixture
def expanded(monkeypatch):
    """The rows of each weight that is expanded."""
    rows, dequantise = [], kernels.dequantise

    def note(packed, absmax, state, *args):
        rows.append(state.shape[0])
        return dequantise(packed, absmax, state, *args)

    monkeypatch.setattr(kernels, "dequantise", note)
    return rows


@pytest.fixture
def make(quantised_layer):
    def make(nested=False, bias=False, blocksize=64, shape=SHAPE):
        layer = quantised_layer(shape, "nf4", blocksize, nested, bias, torch.float32)
        if bias:
            layer.bias.copy_(torch.linspace(-1, 1, shape[0]))
        return layer

    return make


@functools.cache
def rows(count):
    return torch.randn(1, count, SHAPE[1], generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_it_is_expanded_in_slices_and_multiplied_with_each(nested, make, expanded):
    layer = make(nested)
    with torch.inference_mode():
        found = layer(rows(600))
    assert expanded == SLICES
    weight = layer.dequantise(torch.float32)
    slices = [nn.functional.linear(rows(600), part) for part in weight.split(SLICES)]
    assert found.shape == (1, 600, SHAPE[0])
    torch.testing.assert_close(found, torch.cat(slices, -1), rtol=1e-6, atol=1e-5)


def test_with_a_lora_the_product_is_added(make, expanded):
    layer = make()
    up, down = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((1280, 4), (4, 128)))
    with torch.inference_mode():
        without = layer(rows(600))
        file = {"k.lora_up.weight": up, "k.lora_down.weight": down}
        for name, tensor in layer.take_patches(patches_of(file), torch.float32).items():
            layer.register_buffer(name, tensor, persistent=False)
        found = layer(rows(600))
    assert expanded == 2 * SLICES
    torch.testing.assert_close(found, without + rows(600) @ down.T @ up.T, rtol=1e-5, atol=1e-4)


def patches_of(file):
    """What ComfyUI makes of a LoRA for one weight, at strength 1."""
    from comfy.lora import load_lora

    (patch,) = load_lora(file, {"k": "k.weight"}).values()
    return [(1.0, patch, 1.0, None, None)]


def test_of_all_layers_these_are_large_in_bf16():
    """Those of FLUX.2-dev that would be the peak of its forward."""
    width = 6144
    layers = {"linear1": (9, 1), "mlp.0": (6, 1), "linear2": (1, 4), "mlp.2": (1, 3), "qkv": (3, 1), "proj": (1, 1)}
    large = {name for name, (rows, columns) in layers.items() if 2 * width**2 * rows * columns > LARGE_BYTES}
    assert large == {"linear1", "mlp.0"}
    assert LARGE_BYTES / 3 > 2 * 3072 * 7 * 3072, "linear1 of Flux.1"


def test_all_else_is_expanded_at_once(make, expanded):
    cases = {
        "few rows, for which there is a fused kernel": (make(), rows(512)),
        "a bias, which cuBLAS adds in another order": (make(bias=True), rows(600)),
        "rows that do not begin a block": (make(blocksize=256), rows(600)),
        "a smaller weight": (make(shape=(1279, 128)), rows(600)),
    }
    for name, (layer, input) in cases.items():
        expanded.clear()
        with torch.inference_mode():
            layer(input)
        assert expanded == [layer.out_features], name


def test_a_gradient_goes_through(make, expanded):
    layer, input = make(), rows(600).clone().requires_grad_()
    layer(input).sum().backward()
    assert expanded == [SHAPE[0]]
    torch.testing.assert_close(
        input.grad, layer.dequantise(torch.float32).sum(0).expand_as(input), rtol=1e-4, atol=1e-4
    )
