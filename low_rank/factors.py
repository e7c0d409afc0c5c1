"""The low-rank factors in a patch of ComfyUI's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Factors:
    """Adds ``scale * up @ down`` to the rows of a weight from ``start`` on: up (rows, rank), down (rank, in)."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    start: int

    def differ_only_in_scale(self, other: "Factors") -> bool:
        return self.up is other.up and self.down is other.down and self.start == other.start


def factors_of(patches: Sequence[Sequence[Any]], shape: tuple[int, int]) -> list[Factors] | None:
    """The factors of all ``patches`` of a weight of ``shape`` (out, in), if all of them are plain LoRA; else None.

    A patch is ComfyUI's: (strength, adapter or tuple, strength_model, offset, function). If its strength is None, it
    stands by: its factors have a scale of 0, so that a later strength changes only the scale. If it is no LoRA either,
    it is left out.
    """
    factors = [_factors_of(patch, shape) for patch in patches]
    if any(made is None and patch[0] is not None for patch, made in zip(patches, factors, strict=True)):
        return None
    return [made for made in factors if made is not None]


def _factors_of(patch: Sequence[Any], shape: tuple[int, int]) -> Factors | None:
    strength, adapter, strength_model, offset, function = patch
    # ComfyUI's adapters are told apart by name: https://github.com/comfyanonymous/ComfyUI, comfy/weight_adapter/base.py
    if getattr(adapter, "name", None) != "lora" or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    axis, start, rows = (0, 0, shape[0]) if offset is None else offset
    rank = down.shape[0]
    if rank == 0 or axis != 0 or up.shape[0] != rows or start + rows > shape[0]:
        return None
    if up.numel() != rows * rank or down.numel() != rank * shape[1]:
        return None
    scale = 0.0 if strength is None else strength * (1.0 if alpha is None else alpha / rank)
    return Factors(up, down, scale, start)
