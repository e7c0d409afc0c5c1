"""The ways in which a 4-bit Linear multiplies. A new way is one entry in one of the two tables at the end.

Each entry says which layers, how many rows of input, which dtype and which device it takes; the first entry that takes
a forward runs it. `WAYS` multiply with the weight. `WAYS_WITH_LOW_RANK` are for layers with low-rank patches; the last
of them adds the patches to what one of `WAYS` computes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from ..checkpoint.quant_state import QuantState
from . import int8, kernels, patched_weight

if TYPE_CHECKING:
    from .linear4bit import Linear4bit

_MANY_ROWS = 256
"""At this many rows or more, compute the low-rank product first and let the base matmul accumulate into it (addmm);
adding it afterwards would read and write the output once more. For fewer rows there is a fused kernel (`gemm_4bit`)."""

_LARGE_BYTES, _SLICE_BYTES = 400 << 20, 192 << 20
"""A weight that takes more than the first when it is dense is expanded in slices of rows, of at most the second.

Of Flux's layers these are two of FLUX.2-dev, linear1 (648 MiB) and the first of an MLP in its double blocks (432 MiB).
Whole they are the highest peaks of a forward at 1024x1024, and linear1 takes 5 % longer in slices (on an H200). On
smaller weights slices cost more time and save nothing. An H200 gives the bits that it gives for the whole weight. It
does not where cuBLAS adds a bias, so layers with one are never cut.
"""

_ROWS_OF_SLICES = 512
"""Of the input; with fewer it was not tried whether slices have the bits of the whole."""


class Way(NamedTuple):
    """One way to compute ``input @ weight.T + bias``.

    ``takes(layer, rows, dtype, device)`` says whether it can, for that many rows of an input of ``dtype`` on
    ``device``. ``run(layer, input, bias)`` does it: input (..., in), bias (out,) or None, both in ``dtype``; it returns
    a fresh tensor (..., out) in ``dtype``.
    """

    takes: "Callable[[Linear4bit, int, torch.dtype, torch.device], bool]"
    run: "Callable[[Linear4bit, torch.Tensor, torch.Tensor | None], torch.Tensor]"


def multiply(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``input @ weight.T + bias`` with all patches of the weight, by the first way that takes it."""
    return _by_first(WAYS if layer.low_rank is None else WAYS_WITH_LOW_RANK, layer, input, bias)


def _by_first(ways: Sequence[Way], layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, dtype, device = input.numel() // layer.in_features, input.dtype, input.device
    for way in ways:
        if way.takes(layer, rows, dtype, device):
            return way.run(layer, input, bias)
    raise AssertionError("the last way takes everything")


def _always(*_: object) -> bool:
    return True


def _is_elsewhere(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    return layer.device != device


def _bring_the_layer(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """ComfyUI may leave a part of a text encoder on the CPU: its bytes go to the input's device for this forward."""
    device = input.device
    return multiply(layer.on(device), input, None if bias is None else bias.to(device))


# With the weight


def _has_functions(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    return bool(layer.weight_function)


def _patch_a_dense_copy(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = layer.dequantise(input.dtype)
    for function in layer.weight_function:
        weight = function(weight)
    return functional.linear(input, weight, bias)


def _has_a_kernel(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    return layer.is_one_weight and kernels.has_gemm_4bit(device)


def _fused(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed, absmax, state, tables = layer.stored_weight()
    return kernels.gemm_4bit(input, packed, absmax, state, bias, tables)


def _expanded(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(input, layer.dequantise(input.dtype), bias)


def _is_large(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    state = layer.parts[0]
    return (
        layer.out_features * layer.in_features * dtype.itemsize > _LARGE_BYTES
        and rows > _ROWS_OF_SLICES
        and layer.is_one_weight
        and layer.bias is None
        and isinstance(state, QuantState)
        and layer.in_features % state.blocksize == 0
        and not torch.is_grad_enabled()  # what is written to ``out`` has no gradient
        and not torch.compiler.is_compiling()
    )


def _expanded_in_slices(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = input.reshape(-1, layer.in_features)
    output = rows.new_empty(len(rows), layer.out_features)
    weight = layer.packed_weight()
    for start, end in _slices(layer, input.dtype):
        dense = kernels.dequantise_rows(*weight, input.dtype, start, end)
        torch.mm(rows, dense.t(), out=output[:, start:end])
        del dense  # before the next one takes memory
    return output.view(*input.shape[:-1], layer.out_features)


def _slices(layer: "Linear4bit", dtype: torch.dtype) -> Iterable[tuple[int, int]]:
    """First row and end of each slice. All but the last are equal, and whole tiles of a matmul."""
    count = -(-layer.out_features * layer.in_features * dtype.itemsize // _SLICE_BYTES)
    step = -(-layer.out_features // count // 256) * 256
    return ((start, min(start + step, layer.out_features)) for start in range(0, layer.out_features, step))


WAYS = (
    Way(_is_elsewhere, _bring_the_layer),
    Way(_has_functions, _patch_a_dense_copy),
    Way(int8.takes, int8.multiply),
    Way(_is_large, _expanded_in_slices),
    Way(_has_a_kernel, _fused),
    Way(_always, _expanded),
)


# With the weight and low-rank patches


def _patches_every_row(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    low_rank = layer.low_rank
    assert low_rank is not None
    return rows >= _MANY_ROWS and low_rank.covers(layer.out_features) and not layer.weight_function


def _is_worth_expanding(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to add the patches to the weight while it is expanded.

    Patching the weight costs time per weight element. The separate product costs time per element moved (input once,
    output twice), about two thirds as much each (measured on an H100).
    """
    # Not compiled: it would guard on all that is looked at here.
    if torch.compiler.is_compiling() or not _patches_every_row(layer, rows, dtype, device) or not layer.is_one_weight:
        return False
    assert layer.low_rank is not None
    moved = rows * (layer.in_features + 2 * layer.out_features)
    return (
        3 * layer.out_features * layer.in_features < 2 * moved
        and patched_weight.takes(layer.shape, dtype, *zip(*layer.low_rank.pieces, strict=True))
        and patched_weight.works_on(device, dtype)
    )


def _patched_while_expanding(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert layer.low_rank is not None
    patches = layer.low_rank.patches(layer._buffers)
    return functional.linear(input, patched_weight.expand(*layer.packed_weight(), input.dtype, patches), bias)


def _onto_the_product(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert layer.low_rank is not None
    rows = input.reshape(-1, layer.in_features)
    output = layer.low_rank.product(rows, bias, layer._buffers)
    output.addmm_(rows, layer.dequantise(input.dtype).t())
    return output.view(*input.shape[:-1], layer.out_features)


def _beside(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    assert layer.low_rank is not None
    output = _by_first(WAYS, layer, input, bias)
    rows = input.reshape(-1, layer.in_features)
    layer.low_rank.add_to(output.view(-1, layer.out_features), rows, layer._buffers)
    return output


WAYS_WITH_LOW_RANK = (
    Way(_is_elsewhere, _bring_the_layer),
    Way(int8.takes_with_low_rank, int8.multiply_with_low_rank),
    Way(int8.takes, _beside),
    Way(_is_large, _beside),
    Way(_is_worth_expanding, _patched_while_expanding),
    Way(_patches_every_row, _onto_the_product),
    Way(_always, _beside),
)
