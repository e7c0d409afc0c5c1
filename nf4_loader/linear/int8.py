"""The way to multiply on int8 tensor cores: the 4-bit weight becomes rotated int8 rows, and comfy-kitchen multiplies.

It is not bit-equal to the exact way: it adds an error of 0.013 to a Linear, beside the 0.09 that NF4 has itself. So it
is used only if that was asked for (`use`), and where it is faster (`measured`). What it computes does not depend on
where the weight was before.

LoRA is added to the weight before it is rotated, if its rank is small enough, otherwise beside the matmul.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from . import int8_weight, kitchen
from .measured import int8_is_faster, is_captured

if TYPE_CHECKING:
    from ...low_rank.branch import LowRank
    from .linear4bit import Linear4bit

Compute = Literal["exact", "int8 where faster"]
"""How a model's Linears multiply."""

_LEAST_ROWS = 64
"""Of input. With fewer the matmul takes as long as reading the weight: bitsandbytes has a kernel for that."""


@dataclass(eq=False)
class Int8:
    """What a layer has to multiply in int8.

    ``row_scale``, fp32 (out,) on the device that computes, are the scales of the rotated weight with the LoRA that is
    in it; 0 where they are not known yet. Without it (None) rows are made through a dense weight.
    ``scales_are_known`` says that there is no 0 in it.
    """

    device: torch.device
    dtype: torch.dtype
    row_scale: torch.Tensor | None
    scales_are_known: bool = False

    @property
    def nbytes(self) -> int:
        """On the device."""
        return 0 if self.row_scale is None else self.row_scale.nbytes


def use(layer: "Linear4bit", compute: str | None, device: torch.device, dtype: torch.dtype) -> Int8 | None:
    """What ``layer`` needs to compute as ``compute`` (`Compute`) says, in ``dtype`` on ``device``: what it has, if that
    is right; None if it is to compute exactly, which the log explains if int8 was asked for and cannot be used."""
    if compute != "int8 where faster" or layer.in_features % kitchen.GROUP or not kitchen.works_on(device, dtype):
        return None
    if layer.int8 is not None and (layer.int8.device, layer.int8.dtype) == (device, dtype):
        return layer.int8
    if not layer.is_one_weight or not int8_weight.takes(layer.shape) or not int8_weight.works_on(device, dtype):
        return Int8(device, dtype, None)
    with torch.inference_mode(False):
        return Int8(device, dtype, torch.zeros(layer.out_features, device=device))


def forget_scales(layer: "Linear4bit") -> None:
    """The LoRA in the weight has changed."""
    if layer.int8 is not None and layer.int8.row_scale is not None:
        layer.int8.row_scale.zero_()
        layer.int8.scales_are_known = False


def takes(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    int8 = layer.int8
    if int8 is None or rows < _LEAST_ROWS or (int8.dtype, int8.device) != (dtype, device) or layer.weight_function:
        return False
    return int8_is_faster(layer.shape, rows, dtype, device, int8.row_scale is not None)


def multiply(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, row_scale = _weight(layer, input.dtype, None)
    return kitchen.linear(input, rows, row_scale, bias)


def takes_with_low_rank(layer: "Linear4bit", rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    return takes(layer, rows, dtype, device) and _is_in_the_weight(layer)


def multiply_with_low_rank(layer: "Linear4bit", input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, row_scale = _weight(layer, input.dtype, layer.low_rank)
    return kitchen.linear(input, rows, row_scale, bias)


def _is_in_the_weight(layer: "Linear4bit") -> bool:
    """Whether LoRA is added to the weight. It must not depend on the input: row_scale is with the LoRA or without."""
    assert layer.int8 is not None
    assert layer.low_rank is not None
    return (
        layer.int8.row_scale is not None
        and layer.low_rank.covers(layer.out_features)
        and int8_weight.takes_patches(layer.low_rank.pieces)
    )


def _weight(layer: "Linear4bit", dtype: torch.dtype, low_rank: "LowRank | None") -> tuple[torch.Tensor, torch.Tensor]:
    """As `kitchen.linear` takes it."""
    int8 = layer.int8
    assert int8 is not None
    row_scale = int8.row_scale
    if row_scale is None:
        return kitchen.quantise(layer.dequantise(dtype))
    rows = torch.empty(layer.shape, dtype=torch.int8, device=row_scale.device)
    patches = [] if low_rank is None else list(low_rank.patches(layer._buffers))
    weight = (*layer.packed_weight(), dtype, patches, row_scale, rows)
    if torch.compiler.is_compiling() or is_captured(row_scale.device):  # it runs later, when the LoRA may have changed
        int8_weight.write_int8_rows(*weight)
    else:
        int8_weight.write_int8_rows(*weight, scales_are_known=int8.scales_are_known)
        int8.scales_are_known = True
    return rows, row_scale
