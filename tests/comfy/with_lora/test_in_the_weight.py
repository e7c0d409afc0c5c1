"""A LoRA that is added to the weight while that is expanded: when, and that it is the LoRA beside the weight."""

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter
from interpreted_kernel import interpreted
from torch import nn

from flux_nf4.nf4_loader.checkpoint.quant_state import DensePart, NestedAbsmax, QuantState
from flux_nf4.nf4_loader.linear import patched_weight
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit

SHAPE = OUT, IN = 96, 128


@pytest.fixture
def expanded(monkeypatch):
    """The shapes that the interpreted kernel has expanded so far, in a world in which it works on the CPU."""
    shapes = []
    with interpreted() as module:
        expand = module.expand
        monkeypatch.setattr(module, "works_on", lambda *_: True)
        monkeypatch.setattr(module, "expand", lambda *args: shapes.append(args[2].shape) or expand(*args))
        yield shapes


def layer(dtype=torch.float16, shape=SHAPE, rank=8, strength=0.5, nested=()):
    """With LoRA of q, k and v, a third of the rows each."""
    torch.manual_seed(0)
    made = Linear4bit([QuantState("nf4", 64, shape, nested)], bias=True, dtype=dtype)
    for buffer in made.buffers():
        buffer.random_(256) if buffer.dtype == torch.uint8 else buffer.uniform_()
    nn.init.normal_(made.bias)
    made.give = lambda strength: give(made, dtype, rank, strength)
    made.give(strength)
    return made


def give(made, dtype, rank, strength):
    """Returns what this adds to the weight."""
    torch.manual_seed(1)
    rows = made.out_features // 3
    patches, added = [], []
    for start in range(0, made.out_features, rows):
        up, down = torch.randn(rows, rank), torch.randn(rank, made.in_features)
        adapter = LoRAAdapter(set(), (up, down, float(rank), None, None, None))
        patches.append((strength, adapter, 1.0, (0, start, rows), None))
        added.append(strength * up @ down)
    for name, tensor in made.take_patches(patches, dtype).items():
        made.register_buffer(name, tensor, persistent=False)
    return torch.cat(added)


def random_input(made, rows=300):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, rows, made.in_features, generator=generator).to(made.dtype)


def output(made, rows=300):
    with torch.inference_mode():
        return made(random_input(made, rows)).float()


@pytest.mark.parametrize("strength", [0.5, -1.25])
@pytest.mark.parametrize("nested", [(), (NestedAbsmax(OUT * IN // 64, 256),)], ids=["fp32 absmax", "nested absmax"])
def test_it_is_the_lora_beside_the_weight(expanded, monkeypatch, nested, strength):
    made = layer(strength=strength, nested=nested)
    found = output(made)
    assert expanded == [SHAPE]
    monkeypatch.setattr(patched_weight, "works_on", lambda *_: False)
    beside = output(made)
    assert expanded == [SHAPE]
    assert (found - beside).norm() / beside.norm() < 2e-3  # fp16, rounded at other places


def test_another_strength_counts(expanded):
    made = layer(strength=0.5)
    before = output(made)
    made.give(0.7)
    after = output(made)
    made.give(0.5)
    assert torch.equal(output(made), before)
    assert not torch.equal(after, before)
    assert len(expanded) == 3


@pytest.mark.parametrize(
    ("made", "rows"),
    [
        ({}, 200),
        ({"shape": (768, 1024)}, 400),
        ({"rank": 17}, 300),
        ({"dtype": torch.float32}, 300),
        ({"shape": (120, 128)}, 300),
    ],
    ids=["few rows", "a weight larger than what it saves", "many ranks", "fp32", "rows that are no whole tiles"],
)
def test_else_it_is_beside_the_weight(expanded, made, rows):
    output(layer(**made), rows)
    assert expanded == []


@pytest.mark.parametrize("made", [{"dtype": torch.float32}, {"rank": 17}], ids=["fp32", "many ranks"])
def test_triton_is_not_tried_for_what_it_cannot_do(expanded, monkeypatch, made):
    monkeypatch.setattr(patched_weight, "works_on", lambda *_: pytest.fail("tried"))
    output(layer(**made))


def test_a_function_of_the_weight_comes_after_nothing(expanded):
    made = layer()
    made.weight_function.append(lambda weight: weight)
    output(made)
    assert expanded == []


def test_compiled_it_is_beside_the_weight(expanded):
    made = layer(dtype=torch.bfloat16)
    torch.compiler.reset()
    torch.compile(made, backend="eager")(torch.ones(300, IN, dtype=torch.bfloat16))
    assert expanded == []


def test_a_linear_of_parts_is_beside_its_weight(expanded):
    parts = [QuantState("nf4", 64, (OUT // 3, IN))] * 2 + [DensePart((OUT // 3, IN))]
    made = Linear4bit(parts, bias=False, dtype=torch.float16)
    for name, buffer in made.named_buffers():
        buffer.fill_(0x42 if name.startswith("packed") else 0.1)
    added = give(made, torch.float16, rank=8, strength=0.5)
    expected = nn.functional.linear(random_input(made).float(), made.weight.float() + added)
    assert (output(made) - expected).norm() / expected.norm() < 2e-3
    assert expanded == []
