"""A low-rank branch beside a weight: ``output[:, rows] += (input @ down.T * scale) @ up.T``.

The weight does not change, and the cost of a LoRA grows with its rank alone. It costs less where a weight is expanded
for many rows of input: the LoRA can then be added to the expanded weight (`LowRank.patches`). The formula is from
ComfyUI's ``LoRAAdapter.calculate_weight`` (comfy/weight_adapter/lora.py):
``weight += strength * alpha / rank * up @ down``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import beside
from .factors import Factors


class Patch(NamedTuple):
    """Adds ``(up * scale) @ down`` to the rows from ``start`` on: up (rows, R), down (R, in), scale fp32 (R,)."""

    start: int
    up: torch.Tensor
    down: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class _Piece:
    """The patches of some rows: the name of their ``up``, and which of the joint ranks are theirs."""

    name: str
    rows: slice
    ranks: slice


class LowRank:
    """Any number of low-rank patches of one Linear; patches of the same rows are concatenated.

    ``tensors`` are host tensors: ``lora_down`` (R, in) and ``lora_up_0``, ``lora_up_1``, ... (rows, R of these rows) in
    compute dtype, and ``lora_scale`` (R,) in fp32. A change of strength changes only the last one. Whoever owns the
    layer's memory brings them to the device, and hands them by the same names to the methods that compute.
    """

    def __init__(self, factors: Sequence[Factors], dtype: torch.dtype) -> None:
        groups: dict[tuple[int, int], list[Factors]] = {}
        for item in factors:
            groups.setdefault((item.start, item.up.shape[0]), []).append(item)
        ordered_groups = sorted(groups.items())
        ordered = [item for _, group in ordered_groups for item in group]
        self.tensors = {"lora_down": _concatenated([item.down.flatten(1) for item in ordered], 0, dtype)}
        self._pieces: list[_Piece] = []
        column = 0
        for (start, rows), group in ordered_groups:
            name = f"lora_up_{len(self._pieces)}"
            self.tensors[name] = _concatenated([item.up.flatten(1) for item in group], 1, dtype)
            rank = self.tensors[name].shape[1]
            self._pieces.append(_Piece(name, slice(start, start + rows), slice(column, column + rank)))
            column += rank
        self._dtype = dtype
        self._factors = factors
        self._only_scale: float | None = None
        self._order = [factors.index(item) for item in ordered]
        self.tensors["lora_scale"] = self._scales(factors)

    @classmethod
    def of(cls, factors: Sequence[Factors], dtype: torch.dtype, previous: "LowRank | None") -> "LowRank | None":
        """The branch for ``factors``; None if there are none. It is ``previous``, rescaled, if only scales differ."""
        if previous is not None and previous.rescaled(factors, dtype):
            return previous
        return cls(factors, dtype) if factors else None

    def rescaled(self, factors: Sequence[Factors], dtype: torch.dtype) -> bool:
        """Take other scales of the same factors. Returns False, and does nothing, if they are other factors."""
        if dtype != self._dtype or len(factors) != len(self._factors):
            return False
        if not all(new.differ_only_in_scale(old) for new, old in zip(factors, self._factors, strict=True)):
            return False
        if [factor.scale for factor in factors] != [factor.scale for factor in self._factors]:
            self._factors = factors
            self.tensors["lora_scale"] = self._scales(factors)
        return True

    def _scales(self, factors: Sequence[Factors]) -> torch.Tensor:
        scales = [factors[index].scale for index in self._order for _ in range(factors[index].down.shape[0])]
        self._only_scale = scales[0] if len(set(scales)) == 1 else None
        return torch.tensor(scales, dtype=torch.float32)

    def covers(self, rows: int) -> bool:
        """Whether each of the weight's ``rows`` rows is patched by exactly one piece."""
        ends = [0, *(piece.rows.stop for piece in self._pieces)]
        return ends[-1] == rows and all(piece.rows.start == end for piece, end in zip(self._pieces, ends, strict=False))

    @property
    def pieces(self) -> Sequence[tuple[int, int]]:
        """Rows and ranks of each piece."""
        sizes = [(piece.rows, piece.ranks) for piece in self._pieces]
        return [(rows.stop - rows.start, ranks.stop - ranks.start) for rows, ranks in sizes]

    def patches(self, tensors: Mapping[str, Any]) -> Iterator[Patch]:
        """What each piece adds to the weight."""
        for piece in self._pieces:
            down, scale = tensors["lora_down"][piece.ranks], tensors["lora_scale"][piece.ranks]
            yield Patch(piece.rows.start, tensors[piece.name], down, scale)

    def product(self, input: torch.Tensor, bias: torch.Tensor | None, tensors: Mapping[str, Any]) -> torch.Tensor:
        """The branch of ``input`` (n, in) plus ``bias`` (out,), as (n, out). All rows of the weight must be covered."""
        hidden, scale = self._hidden(input, tensors)
        if bias is None:
            bias = input.new_zeros(self._pieces[-1].rows.stop)

        def up_of(piece: _Piece) -> torch.Tensor:
            return _in_dtype(tensors[piece.name], input.dtype).t()

        def product_of(piece: _Piece, out: torch.Tensor | None = None) -> torch.Tensor:
            return torch.addmm(bias[piece.rows], hidden[:, piece.ranks], up_of(piece), alpha=scale, out=out)

        if len(self._pieces) == 1:  # a slice takes the host 3 us
            return torch.addmm(bias, hidden, up_of(self._pieces[0]), alpha=scale)
        # Autograd and the compiler refuse to write into columns.
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and input.requires_grad):
            return torch.cat([product_of(piece) for piece in self._pieces], 1)
        output = input.new_empty(len(input), len(bias))
        for piece in self._pieces:
            product_of(piece, output[:, piece.rows])
        return output

    def add_to(self, output: torch.Tensor, input: torch.Tensor, tensors: Mapping[str, Any]) -> None:
        """Add the branch of ``input`` (n, in) to ``output`` (n, out)."""
        down = tensors["lora_down"]
        if len(self._pieces) == 1 and not torch.compiler.is_compiling() and beside.takes(output, input, down):
            (piece,) = self._pieces
            beside.add(output[:, piece.rows], input, down, tensors[piece.name], tensors["lora_scale"])
            return
        hidden, scale = self._hidden(input, tensors)
        for piece in self._pieces:
            up = _in_dtype(tensors[piece.name], input.dtype).t()
            if piece.rows == slice(0, output.shape[1]) and len(self._pieces) == 1:
                output.addmm_(hidden, up, alpha=scale)
            else:
                output[:, piece.rows].addmm_(hidden[:, piece.ranks], up, alpha=scale)

    def _hidden(self, input: torch.Tensor, tensors: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
        """``input @ down.T``, and a number by which it has yet to be multiplied."""
        hidden = torch.nn.functional.linear(input, _in_dtype(tensors["lora_down"], input.dtype))
        # A Python number costs no kernel launch. In compiled code, each new number would cost a compilation.
        if torch.compiler.is_compiling() or self._only_scale is None:
            return hidden.mul_(tensors["lora_scale"]), 1.0
        return hidden, self._only_scale


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As ``tensor.to(dtype)``, which takes the host five times as long where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _concatenated(tensors: Sequence[torch.Tensor], dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([tensor.to("cpu", dtype) for tensor in tensors], dim).contiguous()
