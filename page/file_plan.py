"""The plan for a checkpoint from its header alone: what stays, what is streamed, what it costs, what to change.

Nothing is loaded and no model is built, so that the page can ask while a widget is dragged.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..nf4_loader.checkpoint.catalogue import Catalogue, TransformerTensor
from ..nf4_loader.checkpoint.header import TensorEntry
from ..offload.plan import BlockSize, ResidencyPlan, plan_by_budget, predict_stall_ms
from ..offload.record import Field, layout_from

_BLOCK = re.compile(r"(?P<kind>double|single)_blocks\.(?P<index>\d+)\.(?P<module>.+)\.(?P<name>\w+)$")

_GIB = 1 << 30
_STALL_WORTH_ADVICE = 0.1
_SLOW_LINK_GBPS = 10.0


@dataclass(frozen=True)
class Wanted:
    """What the node's widgets say: blocks that stay, by kind, and bytes of VRAM for the transformer.

    A kind that has no count is left to the budget. No budget is what ComfyUI has free when the model is loaded.
    """

    counts: tuple[tuple[str, int], ...]
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Measured:
    """What runs on this machine have shown: bus (1e9 bytes a second), and how long one block computes."""

    link_gbps: float
    compute_ms: float
    is_pinned: bool = True


@dataclass(frozen=True)
class Advice:
    """One thing that the user should know or change: a code that the page has words for, and its figures."""

    code: str
    figures: Mapping[str, float]


def block_sizes(catalogue: Catalogue, dtype: torch.dtype) -> tuple[BlockSize, ...]:
    """What `Streamer.sizes` gives for the loaded model, tiles in the file's order; dense tensors are of ``dtype``."""
    blocks: dict[tuple[str, int], dict[str, list[Field]]] = {}
    for name, tensor in catalogue.transformer.items():
        match = _BLOCK.match(name)
        if match:
            block = blocks.setdefault((match["kind"], int(match["index"])), {})
            fields = block.setdefault(match["module"], [])
            fields += [_field(match["module"], match["name"], nbytes) for nbytes in _tensor_bytes(tensor, dtype)]
    return tuple(_size_of(kind, owners) for (kind, _), owners in sorted(blocks.items()))


def _size_of(kind: str, owners: Mapping[str, Sequence[Field]]) -> BlockSize:
    layout = layout_from(owners)
    return BlockSize(kind, tuple(tile.nbytes for tile in layout.tiles), layout.small.nbytes)


def _field(module: str, name: str, nbytes: int) -> Field:
    return Field(module, name, False, torch.uint8, (nbytes,), 0, nbytes)


def other_bytes(catalogue: Catalogue, dtype: torch.dtype) -> int:
    """Bytes of the transformer that belong to no block, and are always on the device."""
    others = [tensor for name, tensor in catalogue.transformer.items() if not _BLOCK.match(name)]
    return sum(sum(_tensor_bytes(tensor, dtype)) for tensor in others)


def _tensor_bytes(tensor: TransformerTensor, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor that the model has for one of the file: packed codes and absmax, or dense values."""
    if not tensor.weights4bit:
        return [math.prod(tensor.shape) * dtype.itemsize]
    dense = [part for part in tensor.parts if isinstance(part, TensorEntry)]
    return tensor.packed_sizes + [math.prod(part.shape) * dtype.itemsize for part in dense]


def make_plan(blocks: tuple[BlockSize, ...], other_bytes: int, wanted: Wanted) -> ResidencyPlan | None:
    """The plan for these widgets; None where it is ComfyUI's free memory that decides, when the model is loaded.

    ``other_bytes`` of the transformer are in no block.

    Raises:
        ValueError: the budget is too small even for streaming every block.
    """
    counted = dict(wanted.counts)
    if wanted.budget_bytes is None and any(block.kind not in counted for block in blocks):
        return None
    budget = math.inf if wanted.budget_bytes is None else wanted.budget_bytes - other_bytes
    return plan_by_budget(blocks, budget, counts=wanted.counts)


def predict_ms(plan: ResidencyPlan, blocks: Sequence[BlockSize], measured: Measured) -> tuple[float, float]:
    """Compute and stall of one forward, in ms."""
    stall = predict_stall_ms(plan, blocks, measured.link_gbps, measured.compute_ms)
    return measured.compute_ms * len(blocks), stall


def advise(plan: ResidencyPlan, blocks: tuple[BlockSize, ...], measured: Measured | None) -> Advice:
    """The most useful thing to say of ``plan``."""
    if not plan.streamed:
        return Advice("all_resident", {})
    if measured is None:
        return Advice("not_measured", {})
    compute, stall = predict_ms(plan, blocks, measured)
    if stall < _STALL_WORTH_ADVICE * (compute + stall):
        return Advice("keeps_up", {"gbps": measured.link_gbps})
    if not measured.is_pinned:
        return Advice("not_pinned", {"gbps": measured.link_gbps})
    if measured.link_gbps < _SLOW_LINK_GBPS:
        return Advice("slow_link", {"gbps": measured.link_gbps})
    return _advise_more_memory(plan, blocks, measured, compute, stall)


def _advise_more_memory(
    plan: ResidencyPlan, blocks: tuple[BlockSize, ...], measured: Measured, compute: float, stall: float
) -> Advice:
    """How many GiB more take away most of ``stall``, and what they save of a step."""
    extra_gib, better = 0, plan
    while better.streamed:
        extra_gib += 1
        better = plan_by_budget(blocks, plan.device_bytes + extra_gib * _GIB)
        left = predict_ms(better, blocks, measured)[1]
        if left < stall / 5:
            break
    saved = 100 * (stall - left) / (compute + stall)
    kinds = [blocks[index].kind for index in better.resident]
    figures = {"gbps": measured.link_gbps, "gib": extra_gib, "percent": saved}
    return Advice("bus_is_limit", figures | {kind: kinds.count(kind) for kind in ("double", "single")})
