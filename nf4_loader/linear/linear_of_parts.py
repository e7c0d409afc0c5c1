"""The Linear whose weight is made of parts that cannot be read as one 4-bit weight."""

from collections.abc import Sequence

import torch
from torch import nn

from ..checkpoint.quant_state import QuantState
from . import kernels
from .linear4bit import Linear4bit


class LinearOfParts(Linear4bit):
    """A Linear of logical shape (out, in) whose rows are those of its parts, each in 4 bits or dense.

    For q, k and v that are quantised in different ways: to make them alike would cost bits, so each is dequantised
    into its rows of one dense weight. Part i has the buffers ``packed_i`` and ``absmax_i`` (as in `Linear4bit`), or
    ``dense_i`` ((rows, in), in ``dtype``); they belong to this one module, so that they are streamed together.
    """

    def __init__(
        self,
        parts: Sequence[QuantState | int],
        in_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        """Make it of ``parts``: the quant state of each that is in 4 bits, the number of rows of each that is dense."""
        nn.Module.__init__(self)
        self.parts = tuple(parts)
        self.out_features, self.in_features = sum(_rows(part) for part in parts), in_features
        self.shape = (self.out_features, in_features)
        self.nested = ()
        self.dtype = dtype
        self.weight_function = []
        self.bias_function = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                self.register_buffer(f"dense_{i}", torch.empty((part, in_features), dtype=dtype, device=device))
            else:
                packed = torch.empty(part.packed_bytes, dtype=torch.uint8, device=device)
                absmax = torch.empty(part.absmax_count, dtype=torch.float32, device=device)
                self.register_buffer(f"packed_{i}", packed)
                self.register_buffer(f"absmax_{i}", absmax)
        self._register_bias(bias, device)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        weight = torch.empty(self.shape, dtype=dtype, device=self.device)
        rows = weight.split([_rows(part) for part in self.parts])
        for i, part in enumerate(self.parts):
            if isinstance(part, int):
                rows[i].copy_(self.get_buffer(f"dense_{i}"))
            else:
                packed, absmax = self.get_buffer(f"packed_{i}"), self.get_buffer(f"absmax_{i}")
                rows[i].copy_(kernels.dequantise(packed, absmax, part.shape, part.blocksize, part.quant_type, dtype))
        return weight

    def _multiply(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(input, self.dequantise(input.dtype), bias)

    def extra_repr(self) -> str:
        kinds = ["dense" if isinstance(part, int) else f"{part.quant_type}/{part.blocksize}" for part in self.parts]
        return f"{self.shape}, {' + '.join(kinds)}, bias={self.bias is not None}"


def _rows(part: QuantState | int) -> int:
    return part if isinstance(part, int) else part.shape[0]
