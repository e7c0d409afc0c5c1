"""Patches on a Linear whose q, k and v are kept in different ways."""

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from torch.nn.functional import linear

from flux_nf4.nf4_loader.checkpoint.quant_state import DensePart, QuantState
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit
from flux_nf4.offload.comfyui.patching import Patching

OUT, IN, RANK = 96, 128, 4
STRENGTH = 0.5


@pytest.fixture
def layer():
    torch.manual_seed(0)
    parts = [QuantState("nf4", 64, (32, IN)), QuantState("fp4", 32, (32, IN)), DensePart((32, IN))]
    layer = Linear4bit(parts, bias=True, dtype=torch.float32)
    for name, buffer in layer.named_buffers():
        buffer.copy_(torch.randint(256, buffer.shape)) if name.startswith("packed") else buffer.uniform_()
    torch.nn.init.normal_(layer.bias)
    return layer


@pytest.fixture
def patched(layer):
    """A function: its output for a random input, and the one without a bias of its plain weight, with this patch."""

    def run(rows, adapter, offset):
        model = torch.nn.ModuleDict({"layer": layer})
        patches = {"layer.weight": [(STRENGTH, adapter, 1.0, offset, None)]}
        extras = Patching(model, []).apply(patches, {}, torch.device("cpu"), torch.float32)
        assert not extras, "it is in no block, so that its buffers are put in place at once"
        input = torch.randn(rows, IN)
        with torch.inference_mode():
            return input, layer(input)

    return run


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("rows", [slice(0, OUT), slice(32, 64)], ids=["all", "k"])
@pytest.mark.parametrize("tokens", [3, 300])
def test_a_lora_is_added(rows, tokens, layer, patched):
    up, down = torch.randn(rows.stop - rows.start, RANK), torch.randn(RANK, IN)
    offset = (0, rows.start, rows.stop - rows.start) if rows != slice(0, OUT) else None
    adapter = LoRAAdapter(set(), (up, down, float(RANK), None, None, None))
    input, found = patched(tokens, adapter, offset)
    weight = layer.dequantise(torch.float32)
    plain = linear(input, weight, layer.bias)
    weight[rows] += STRENGTH * up @ down
    expected = linear(input, weight, layer.bias)
    assert (expected - plain).norm() > 0.1 * plain.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_difference_is_added(layer, patched):
    difference = torch.randn(OUT, IN)
    input, found = patched(5, ("diff", (difference,)), None)
    weight = layer.dequantise(torch.float32) + STRENGTH * difference
    assert torch.equal(found, linear(input, weight, layer.bias))
