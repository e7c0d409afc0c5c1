"""The 4-bit Linear: computes like a dense one, reads like a dense one, and stays packed."""

import copy
import io
import operator
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from flux_nf4.nf4_loader.checkpoint.quant_state import DensePart, NestedAbsmax, QuantState
from flux_nf4.nf4_loader.linear import kernels, matmul
from flux_nf4.nf4_loader.linear.linear4bit import Linear4bit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE = (48, 128)


@pytest.fixture
def make_linear(quantised_layer):
    """A function that makes a `Linear4bit` with random values."""

    def make(quant_type="nf4", blocksize=64, nested=False, bias=True, dtype=torch.bfloat16):
        linear = quantised_layer(SHAPE, quant_type, blocksize, nested, bias, dtype)
        if bias:
            linear.bias.copy_(torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(1)))
        return linear

    return make


@pytest.fixture
def linear(make_linear):
    return make_linear()


@pytest.fixture
def input():
    return torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.fixture
def unread(monkeypatch):
    """Makes every dequantisation fail."""

    def refuse(*arguments):
        raise AssertionError("the weight was dequantised")

    monkeypatch.setattr(kernels, "dequantise", refuse)


# Forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("quant_type", "blocksize", "nested"), [("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, 0)])
def test_forward_is_a_dense_linear_with_the_dequantised_weight(
    make_linear, quantise, reference, input, quant_type, blocksize, nested, bias, dtype
):
    linear = make_linear(quant_type, blocksize, nested, bias)
    weight = reference(*quantise(SHAPE, quant_type, blocksize, nested), SHAPE, dtype)
    expected = nn.functional.linear(input.to(dtype), weight, linear.bias.to(dtype) if bias else None)
    found = linear(input.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_absmax_that_is_nested_is_expanded_part_by_part(quantise, reference, fp32_absmax):
    """As of q, k and v, which were quantised each by itself and are one weight in the model."""
    shapes = ((48, 128), (16, 128), (32, 128))
    parts = [quantise(shape, nested=True) for shape in shapes]
    parts[1][1].state2.code = parts[1][1].state2.code / 2
    nested = tuple(NestedAbsmax(state.absmax.numel(), 256) for _, state in parts)
    linear = Linear4bit([QuantState("nf4", 64, (96, 128), nested)], bias=False, dtype=torch.bfloat16)
    linear.packed_0.copy_(torch.cat([packed.view(-1) for packed, _ in parts]))
    linear.absmax_0.copy_(torch.cat([state.absmax for _, state in parts]))
    linear.nested_absmax_0.copy_(torch.cat([state.state2.absmax for _, state in parts]))
    linear.nested_map_0.copy_(torch.stack([state.state2.code for _, state in parts]))
    linear.nested_offset_0.copy_(torch.stack([state.offset for _, state in parts]))
    _, absmax, _ = linear.packed_weight()
    assert torch.equal(absmax, torch.cat([fp32_absmax(state) for _, state in parts]))
    expected = [reference(*part, shape, torch.bfloat16) for part, shape in zip(parts, shapes, strict=True)]
    assert torch.equal(linear.dequantise(torch.bfloat16), torch.cat(expected))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_layers_of_a_kind_are_compiled_once(make_linear, input, nested):
    layers = [make_linear(nested=nested) for _ in range(2)]
    for buffer in (layers[1].absmax_0, layers[1].nested_offset_0) if nested else (layers[1].absmax_0,):
        buffer.mul_(2)
    torch.compiler.reset()
    compiled = torch.compile(lambda layer, input: layer(input), backend="aot_eager", fullgraph=True)
    stance = "default"
    for layer in layers:
        with torch.inference_mode(), torch.compiler.set_stance(stance):
            found = compiled(layer, input)
        assert torch.equal(found, layer(input))
        stance = "fail_on_recompile"


def test_forward_takes_any_leading_dimensions(linear, input):
    assert torch.equal(linear(input.view(1, 3, 1, -1)).view(3, -1), linear(input))
    assert linear(input[0]).shape == (SHAPE[0],)
    assert linear(input[:0]).shape == (0, SHAPE[0])


def test_forward_is_the_same_in_inference_mode(linear, input):
    expected = linear(input)
    with torch.inference_mode():
        assert torch.equal(linear(input), expected)


def test_a_new_way_is_one_entry(monkeypatch, linear, input):
    def takes(layer, rows, dtype, device):
        return layer is linear and (rows, dtype, device.type) == (3, torch.bfloat16, "cpu")

    way = matmul.Way(takes, lambda layer, input, bias: input.new_full((*input.shape[:-1], layer.out_features), 7))
    plain = linear(input[:2])
    monkeypatch.setattr(matmul, "WAYS", (way, *matmul.WAYS))
    assert torch.equal(linear(input), torch.full((3, SHAPE[0]), 7).bfloat16())
    assert torch.equal(linear(input[:2]), plain)


def test_a_layer_that_is_elsewhere_is_brought_to_its_input(monkeypatch, linear, input):
    expected, meta, cpu = linear(input), torch.device("meta"), torch.device("cpu")
    there = linear.on(meta)
    assert there.packed_0.is_meta
    assert not linear.packed_0.is_meta
    monkeypatch.setattr(Linear4bit, "on", lambda layer, device: linear if (layer, device) == (there, cpu) else None)
    assert torch.equal(there(input), expected)


# ComfyUI's functions on weight and bias


def test_weight_functions_are_applied_in_order_to_the_dense_weight(linear, input):
    linear.weight_function = [lambda weight: weight + 1, lambda weight: weight * 2]
    expected = nn.functional.linear(input, (linear.dequantise(torch.bfloat16) + 1) * 2, linear.bias)
    assert torch.equal(linear(input), expected)


def test_bias_functions_are_applied_in_order(linear, input):
    linear.bias_function = [lambda bias: bias + 1, lambda bias: bias * 2]
    expected = nn.functional.linear(input, linear.dequantise(torch.bfloat16), (linear.bias + 1) * 2)
    assert torch.equal(linear(input), expected)


def test_both_functions_work_together(linear, input):
    linear.weight_function = [lambda weight: weight * 3]
    linear.bias_function = [lambda bias: bias - 1]
    expected = nn.functional.linear(input, linear.dequantise(torch.bfloat16) * 3, linear.bias - 1)
    assert torch.equal(linear(input), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_get_tensors_in_compute_dtype_and_logical_shape(linear, input, dtype):
    seen = {}

    def look(name):
        return lambda value: seen.setdefault(name, value)

    linear.weight_function = [look("weight")]
    linear.bias_function = [look("bias")]
    linear(input.to(dtype))
    assert {name: (value.shape, value.dtype) for name, value in seen.items()} == {
        "weight": (SHAPE, dtype),
        "bias": (SHAPE[:1], dtype),
    }
    assert type(seen["weight"]) is torch.Tensor


def test_functions_in_place_leave_the_linear_as_it_was(linear, input):
    before = linear(input)
    kept = {name: tensor.clone() for name, tensor in linear._buffers.items()} | {"bias": linear.bias.clone()}
    linear.weight_function = [lambda weight: weight.mul_(5)]
    linear.bias_function = [lambda bias: bias.add_(7)]
    first, second = linear(input), linear(input)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)
    for name, tensor in kept.items():
        assert torch.equal(getattr(linear, name), tensor), name
    linear.weight_function, linear.bias_function = [], []
    assert torch.equal(linear(input), before)


def test_a_bias_function_is_not_called_without_bias(make_linear, input):
    linear = make_linear(bias=False)
    expected = linear(input)
    linear.bias_function = [operator.neg]
    assert torch.equal(linear(input), expected)


# The weight as others see it


@pytest.mark.usefixtures("unread")
def test_looking_at_the_weight_reads_as_dense_and_dequantises_nothing(linear):
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (SHAPE, torch.bfloat16, torch.device("cpu"))
    assert (weight.ndim, weight.numel(), weight.size(1), len(weight)) == (2, 48 * 128, 128, 48)
    assert (weight.nbytes, weight.element_size(), weight.stride()) == (2 * 48 * 128, 2, (128, 1))
    assert weight.is_contiguous()
    assert not weight.requires_grad
    assert "(48, 128), nf4/64" in repr(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_dtype_is_the_one_asked_for(make_linear, dtype):
    linear = make_linear(dtype=dtype)
    assert linear.weight.dtype == dtype
    assert linear.weight.detach().dtype == dtype
    assert torch.equal(linear.weight.detach(), linear.dequantise(dtype))


def test_a_weight_on_the_meta_device_says_so():
    parts = [QuantState("nf4", 64, SHAPE)]
    linear = Linear4bit(parts, bias=True, dtype=torch.bfloat16, device=torch.device("meta"))
    assert linear.weight.is_meta
    assert linear.weight.shape == SHAPE
    assert linear.packed_0.shape == (48 * 64,)
    assert linear.absmax_0.shape == (96,)


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


USES = {
    "detach": lambda weight: weight.detach(),
    "clone": lambda weight: weight.clone(),
    "float": lambda weight: weight.float(),
    "to fp16": lambda weight: weight.to(torch.float16),
    "copied to its device": lambda weight: weight.to("cpu", copy=True),
    "add": lambda weight: weight + 1,
    "add from the right": lambda weight: torch.ones(SHAPE, dtype=torch.bfloat16) + weight,
    "with itself": lambda weight: weight * weight,
    "matmul": lambda weight: weight @ torch.ones(SHAPE[1], 2, dtype=torch.bfloat16),
    "linear": lambda weight: nn.functional.linear(torch.ones(2, SHAPE[1], dtype=torch.bfloat16), weight),
    "row": lambda weight: weight[3],
    "slice": lambda weight: weight[:, 5:9],
    "transpose": lambda weight: weight.t(),
    "flatten": lambda weight: weight.flatten(),
    "data": lambda weight: weight.data.float(),
    "pseudo-inverse": lambda weight: torch.linalg.pinv(weight.data.float()),
    "numpy": lambda weight: torch.from_numpy(weight.data.half().numpy()),
    "deepcopy": lambda weight: copy.deepcopy(weight),
    "saved": lambda weight: saved(weight),
    "norm": lambda weight: torch.linalg.vector_norm(weight, dim=1),
    "concatenation": lambda weight: torch.cat([weight, weight]),
    "as a source": lambda weight: torch.zeros(SHAPE).copy_(weight),
    "added in place to another": lambda weight: torch.ones(SHAPE).add_(weight),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_using_the_weight_is_using_the_dequantised_one(linear, use):
    found, expected = use(linear.weight), use(linear.dequantise(torch.bfloat16))
    assert type(found) is torch.Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_a_fresh_tensor_from_the_weight_may_be_changed(linear):
    before = linear.dequantise(torch.bfloat16)
    linear.weight.detach().zero_()
    linear.weight.float().zero_()
    assert torch.equal(linear.dequantise(torch.bfloat16), before)


def set_item(weight):
    weight[0] = 0


WRITES = {
    "copy_": lambda weight: weight.copy_(torch.zeros(SHAPE)),
    "add_": lambda weight: weight.add_(1),
    "mul_ by itself": lambda weight: weight.mul_(weight),
    "zero_": lambda weight: weight.zero_(),
    "[] =": set_item,
    "out=": lambda weight: torch.add(torch.ones(SHAPE), 1, out=weight),
    "foreach": lambda weight: torch._foreach_add_([torch.ones(2), weight], 1),
    "init": lambda weight: nn.init.zeros_(weight),
    "data.zero_": lambda weight: weight.data.zero_(),
    "data =": lambda weight: setattr(weight, "data", torch.zeros(SHAPE)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_the_weight_is_refused(linear, write):
    before = linear.dequantise(torch.bfloat16)
    with pytest.raises(RuntimeError, match="a 4-bit weight cannot be written to"):
        write(linear.weight)
    assert torch.equal(linear.dequantise(torch.bfloat16), before)


@pytest.mark.parametrize("value", [torch.zeros(SHAPE), nn.Parameter(torch.zeros(SHAPE))], ids=["tensor", "parameter"])
def test_putting_another_weight_in_its_place_is_refused(linear, value):
    with pytest.raises(RuntimeError, match="a 4-bit weight cannot be written to"):
        linear.weight = value
    assert linear.weight.linear is linear


# As a module among others


def test_it_is_a_linear_to_whoever_asks(linear):
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (SHAPE[1], SHAPE[0])


@pytest.mark.usefixtures("unread")
def test_the_state_dict_has_the_weight_in_its_logical_shape(linear):
    state = nn.ModuleDict({"img_in": linear}).state_dict()
    assert state.keys() == {"img_in.weight", "img_in.bias"}
    assert (state["img_in.weight"].shape, state["img_in.weight"].dtype) == (SHAPE, torch.bfloat16)


def test_a_linear_without_bias_has_none(make_linear):
    linear = make_linear(bias=False)
    assert linear.bias is None
    assert linear.state_dict().keys() == {"weight"}
    assert list(linear.parameters()) == []


def test_a_nested_one_is_a_twelfth_smaller(make_linear):
    def nbytes(linear):
        return sum(buffer.nbytes for name, buffer in linear.named_buffers() if name != "nested_map_0")

    linear = make_linear(nested=True)
    assert linear.state_dict().keys() == {"weight", "bias"}
    assert linear.nested_map_0.shape == (1, 256)
    assert nbytes(linear) / nbytes(make_linear()) == pytest.approx(11 / 12, rel=0.01)


def test_a_dense_layer_takes_its_state_and_it_takes_none_but_its_own(linear):
    dense = nn.Linear(SHAPE[1], SHAPE[0], dtype=torch.bfloat16)
    dense.load_state_dict(linear.state_dict())
    assert torch.equal(dense.weight, linear.dequantise(torch.bfloat16))
    assert torch.equal(dense.bias, linear.bias)
    linear.load_state_dict(linear.state_dict())
    before = linear.bias.clone()
    with pytest.raises(RuntimeError, match="weight: a 4-bit weight cannot be written to"):
        linear.load_state_dict({"weight": torch.zeros(SHAPE), "bias": torch.zeros(SHAPE[0])}, strict=False)
    assert torch.equal(linear.bias, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_it_computes_on_its_own(linear, input, copied):
    expected, other = linear(input), copied(nn.Sequential(linear))[0]
    linear.packed_0.zero_()
    assert torch.equal(other(input), expected)
    assert torch.equal(other.weight + 0, other.dequantise(torch.bfloat16))


def test_saving_it_without_dense_values_is_refused(linear):
    with pytest.raises(RuntimeError, match=r"no memory of dense values; take a dense copy first, with \.clone\(\)"):
        safetensors.torch.save(linear.state_dict())


def test_nothing_of_it_is_trained(linear):
    assert not any(parameter.requires_grad for parameter in linear.parameters())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_change_of_dtype_leaves_packed_and_absmax_alone(make_linear, nested, source, dtype):
    linear = make_linear(nested=nested, dtype=source)
    before = {name: buffer.clone() for name, buffer in linear.named_buffers()}
    assert nn.Sequential(linear).to(dtype)[0] is linear
    assert linear.get_buffer("absmax_0").dtype == (torch.uint8 if nested else torch.float32)
    for name, buffer in linear.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert linear.bias.dtype == dtype
    assert linear.weight.dtype == dtype


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
def test_half_and_the_like_leave_the_values_alone(linear, move):
    before = linear.dequantise(torch.float32)
    move(linear)
    assert torch.equal(linear.dequantise(torch.float32), before)


def test_device_and_dtype_may_change_at_once(linear):
    linear.to("meta", torch.float16)
    assert linear.packed_0.is_meta
    assert linear.absmax_0.is_meta
    assert linear.absmax_0.dtype == torch.float32
    assert (linear.weight.is_meta, linear.weight.dtype) == (True, torch.float16)


def test_memory_may_be_rebound(linear, make_linear, input):
    other = make_linear(bias=False)
    linear.packed_0, linear.absmax_0 = other.packed_0 * 0, other.absmax_0 * 0 + 1
    assert torch.equal(linear(input), nn.functional.linear(input, -torch.ones(SHAPE).bfloat16(), linear.bias))


def test_its_printed_form_says_what_it_holds(linear, make_linear):
    assert repr(linear) == "Linear4bit((48, 128), nf4/64, bias=True)"
    assert repr(make_linear(nested=True)) == "Linear4bit((48, 128), nf4/64 nested, bias=True)"
    parts = [QuantState("nf4", 64, (32, 128)), DensePart((16, 128))]
    mixed = Linear4bit(parts, bias=False, dtype=torch.float16)
    assert repr(mixed) == "Linear4bit((48, 128), nf4/64 + dense, bias=False)"
