"""The plan for a checkpoint from its header alone: what stays, what is streamed, what it costs, what to change.

Nothing is loaded and no model is built, so that the page can ask while a widget is dragged.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..families import Family
from ..memory import GIB
from ..nf4_loader.checkpoint.catalogue import Catalogue
from ..nf4_loader.checkpoint.header import TensorEntry
from ..nf4_loader.checkpoint.tensors import TransformerTensor
from ..offload.plan import BlockSize, Residency, ResidencyPlan, plan_by_budget, predict_stall_ms
from ..offload.record import Field, layout_from
from ..offload.telemetry import limit_of


@dataclass(frozen=True)
class Measured:
    """What runs on this machine have shown: bus (1e9 bytes a second), and how long one block computes, for a picture of
    this width and height in pixels (None: not known)."""

    link_gbps: float
    compute_ms: float
    is_pinned: bool = True
    picture: tuple[int, int] | None = None


@dataclass(frozen=True)
class Advice:
    """One thing that the user should know or change: a code that the page has words for, and its figures.

    ``kept`` is how many blocks of each kind would stay, where the advice is to keep more of them.
    """

    code: str
    figures: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)


def block_sizes(catalogue: Catalogue, dtype: torch.dtype) -> tuple[BlockSize, ...]:
    """What `Streamer.sizes` gives for the loaded model, tiles in the file's order; dense tensors are of ``dtype``."""
    family = _family(catalogue)
    order = list(family.lists)
    blocks: dict[tuple[int, int], dict[str, list[Field]]] = {}
    for name, tensor in catalogue.transformer.items():
        found = family.block_of(name)
        if found is not None:
            block = blocks.setdefault((order.index(found.blocks), found.index), {})
            module, _, end = found.name.rpartition(".")
            fields = block.setdefault(module, [])
            fields += [field_of(module, end, nbytes) for nbytes in _tensor_bytes(tensor, dtype)]
    return tuple(size_of(family.kinds[of], owners) for (of, _), owners in sorted(blocks.items()))


def _family(catalogue: Catalogue) -> Family:
    assert catalogue.found is not None, "`require_transformer` has checked it"
    return catalogue.found.family


def size_of(kind: str, owners: Mapping[str, Sequence[Field]]) -> BlockSize:
    """The size of a block whose modules have these tensors."""
    layout = layout_from(owners)
    return BlockSize(kind, tuple(tile.nbytes for tile in layout.tiles), layout.small.nbytes)


def field_of(module: str, name: str, nbytes: int) -> Field:
    """A tensor of a block, of which only the size counts."""
    return Field(module, name, False, torch.uint8, (nbytes,), 0, nbytes)


def other_bytes(catalogue: Catalogue, dtype: torch.dtype) -> int:
    """Bytes of the transformer that belong to no block, and are always on the device."""
    family = _family(catalogue)
    others = [tensor for name, tensor in catalogue.transformer.items() if family.block_of(name) is None]
    return sum(sum(_tensor_bytes(tensor, dtype)) for tensor in others)


def _tensor_bytes(tensor: TransformerTensor, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor that the model has for one of the file: packed codes and absmax, or dense values."""
    if not tensor.weights4bit:
        return [math.prod(tensor.shape) * dtype.itemsize]
    dense = [part for part in tensor.parts if isinstance(part, TensorEntry)]
    return tensor.packed_sizes + [math.prod(part.shape) * dtype.itemsize for part in dense]


def make_plan(blocks: tuple[BlockSize, ...], other_bytes: int, wanted: Residency) -> ResidencyPlan | None:
    """The plan for these widgets; None where it is ComfyUI's free memory that decides, when the model is loaded.

    ``other_bytes`` of the transformer are in no block.

    Raises:
        BudgetTooSmallError: even with every block streamed the model takes more than the budget.
    """
    counted = dict(wanted.counts)
    if wanted.budget_bytes is None and any(block.kind not in counted for block in blocks):
        return None
    budget = math.inf if wanted.budget_bytes is None else wanted.budget_bytes
    return plan_by_budget(blocks, budget, counts=wanted.counts, other_bytes=other_bytes)


def predict_ms(plan: ResidencyPlan, blocks: Sequence[BlockSize], measured: Measured) -> tuple[float, float]:
    """Compute and stall of one forward, in ms."""
    return measured.compute_ms * len(blocks), _stall_ms(plan, blocks, measured)


def _stall_ms(plan: ResidencyPlan, blocks: Sequence[BlockSize], measured: Measured) -> float:
    return predict_stall_ms(plan, blocks, measured.link_gbps, measured.compute_ms)


def advise(plan: ResidencyPlan, blocks: tuple[BlockSize, ...], measured: Measured | None) -> Advice:
    """The most useful thing to say of ``plan``."""
    if not plan.streamed:
        return Advice("all_resident")
    if measured is None:
        return Advice("not_measured")
    compute, stall = predict_ms(plan, blocks, measured)
    limit = limit_of(stall, compute + stall, measured.link_gbps, is_pinned=measured.is_pinned)
    if limit == "bus_is_limit":
        return _advise_more_memory(plan, blocks, measured, compute, stall)
    return Advice(limit, {"gbps": measured.link_gbps, "percent": 100 * stall / (compute + stall)})


def _advise_more_memory(
    plan: ResidencyPlan, blocks: tuple[BlockSize, ...], measured: Measured, compute: float, stall: float
) -> Advice:
    """How many GiB more take away most of ``stall``, and what they save of a step."""
    larger = ((gib, plan_by_budget(blocks, plan.device_bytes + gib * GIB)) for gib in itertools.count(1))
    gib, better = next(
        (gib, one) for gib, one in larger if not one.streamed or _stall_ms(one, blocks, measured) < stall / 5
    )
    saved = 100 * (stall - _stall_ms(better, blocks, measured)) / (compute + stall)
    figures = {"gbps": measured.link_gbps, "gib": gib, "percent": saved}
    kinds = [block.kind for block in blocks]
    resident = [kinds[index] for index in better.resident]
    return Advice("bus_is_limit", figures, {kind: resident.count(kind) for kind in dict.fromkeys(kinds)})
