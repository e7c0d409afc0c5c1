"""The plan for a checkpoint from its header alone: what stays, what is streamed, what it costs, what to change.

Nothing is loaded and no model is built, so that the page can ask while a widget is dragged.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..families import BlockTensor, Family
from ..memory import GIB
from ..nf4_loader.checkpoint.catalogue import Catalogue
from ..nf4_loader.checkpoint.header import TensorEntry
from ..nf4_loader.checkpoint.tensors import TransformerTensor
from ..offload.ahead import AHEAD
from ..offload.plan import (
    BlockSize,
    Residency,
    ResidencyPlan,
    keeps_all,
    plan_by_budget,
    plan_for,
    predict_stall_ms,
)
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
    """One thing that the user should know or change. The page has words for ``code``, into which it puts the figures.

    If the advice is to keep more blocks, ``kept`` says how many of each kind.
    """

    code: str
    figures: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)


def block_sizes(catalogue: Catalogue, dtype: torch.dtype) -> tuple[BlockSize, ...]:
    """What `Streamer.sizes` returns once the model is loaded, but with tiles in the file's order.

    ``dtype`` is the model's dtype of dense tensors.
    """
    family = _family(catalogue)
    order = list(family.lists)
    blocks: dict[tuple[int, int], dict[str, list[Field]]] = {}
    for found, tensor in _in_blocks(catalogue):
        if not family.is_modulation(found):
            block = blocks.setdefault((order.index(found.blocks), found.index), {})
            _add(block, found.name, tensor, dtype)
    return tuple(size_of(family.kinds[of], owners) for (of, _), owners in sorted(blocks.items()))


def _in_blocks(catalogue: Catalogue) -> Iterator[tuple[BlockTensor, TransformerTensor]]:
    family = _family(catalogue)
    for name, tensor in catalogue.transformer.items():
        found = family.block_of(name)
        if found is not None:
            yield found, tensor


def _add(owners: dict[str, list[Field]], name: str, tensor: TransformerTensor, dtype: torch.dtype) -> None:
    module, _, end = name.rpartition(".")
    owners.setdefault(module, []).extend(field_of(module, end, nbytes) for nbytes in _tensor_bytes(tensor, dtype))


def _family(catalogue: Catalogue) -> Family:
    assert catalogue.found is not None, "`require_transformer` has checked it"
    return catalogue.found.family


def size_of(kind: str, owners: Mapping[str, Sequence[Field]], *, whole: bool = False) -> BlockSize:
    """The size of a block whose modules have these tensors, in tiles of layers or of the ``whole`` block."""
    layout = layout_from(owners).whole() if whole else layout_from(owners)
    return BlockSize(kind, tuple(tile.nbytes for tile in layout.tiles), layout.small.nbytes)


def field_of(module: str, name: str, nbytes: int) -> Field:
    """A tensor of a block, of which only the size counts."""
    return Field(module, name, False, torch.uint8, (nbytes,), 0, nbytes)


def other_bytes(catalogue: Catalogue, dtype: torch.dtype) -> int:
    """Bytes that the transformer needs on the device beside its blocks: tensors that belong to no block, and what the
    modulation needs where it is computed ahead."""
    family = _family(catalogue)
    others = [tensor for name, tensor in catalogue.transformer.items() if family.block_of(name) is None]
    return sum(sum(_tensor_bytes(tensor, dtype)) for tensor in others) + _ahead_bytes(catalogue, dtype)


def more_bytes(catalogue: Catalogue, dtype: torch.dtype) -> int:
    """How many bytes more than `other_bytes` it takes where the modulation's weights stay on the device."""
    return sum(size.nbytes for size in modulation_sizes(catalogue, dtype)) - _ahead_bytes(catalogue, dtype)


def _ahead_bytes(catalogue: Catalogue, dtype: torch.dtype) -> int:
    """What the modulation needs on the device where it is computed ahead: small parts, ring, and outputs."""
    weights = plan_for(modulation_sizes(catalogue, dtype), (), 0).device_bytes
    kept = AHEAD * dtype.itemsize * sum(tensor.shape[0] for name, tensor in _modulation(catalogue) if _is_weight(name))
    return weights + kept


def bytes_within(plan: ResidencyPlan, other_bytes: int, more_bytes: int, wanted: Residency) -> int:
    """Bytes of the device that the transformer takes with ``plan``.

    Its modulation counts with them where a budget has room for it. Without a budget it takes room that is free when
    the model is loaded, and does without where there is none. The ring of the modulation is counted for two layers;
    where no block is streamed it is half of that.
    """
    needed = other_bytes + plan.device_bytes
    budget = wanted.budget_bytes
    return needed + (more_bytes if budget is not None and keeps_all(plan, more_bytes, budget - other_bytes) else 0)


def modulation_sizes(catalogue: Catalogue, dtype: torch.dtype) -> tuple[BlockSize, ...]:
    """The layers of the blocks that are computed ahead, as their streamer has them, in the file's order."""
    layers: dict[tuple[str, int, str], dict[str, list[Field]]] = {}
    for found, tensor in _modulation(catalogue):
        layer, _, name = found.name.partition(".")
        _add(layers.setdefault((found.blocks, found.index, layer), {}), name, tensor, dtype)
    return tuple(size_of("modulation", owners, whole=True) for owners in layers.values())


def _modulation(catalogue: Catalogue) -> Iterator[tuple[BlockTensor, TransformerTensor]]:
    family = _family(catalogue)
    return ((found, tensor) for found, tensor in _in_blocks(catalogue) if family.is_modulation(found))


def _is_weight(tensor: BlockTensor) -> bool:
    return tensor.name.endswith(".weight")


def _tensor_bytes(tensor: TransformerTensor, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor that the model has for one of the file: packed codes and absmax, or dense values."""
    if not tensor.weights4bit:
        return [math.prod(tensor.shape) * dtype.itemsize]
    dense = [part for part in tensor.parts if isinstance(part, TensorEntry)]
    return tensor.packed_sizes + [math.prod(part.shape) * dtype.itemsize for part in dense]


def make_plan(blocks: tuple[BlockSize, ...], other_bytes: int, wanted: Residency) -> ResidencyPlan | None:
    """The plan for these widgets; None if it depends on the memory that is free when the model is loaded.

    ``other_bytes`` are the transformer's bytes outside the blocks.

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
    """The most useful thing to say about ``plan``."""
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
