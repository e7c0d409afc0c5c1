"""Tensors that layers of the blocks get in addition to their own, for instance the factors of a LoRA.

Large ones travel with their layer's tile, small ones stay on the device.
"""

import weakref
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from .arena import HostArena
from .block import Block, Extras, HostRecord
from .record import RecordLayout

ByModule = Mapping[nn.Module, Mapping[str, torch.Tensor]]
"""Host tensors by module, then by name."""


class Places:
    """Where in its block each module is, except for the modules ``without``."""

    def __init__(self, blocks: Sequence[nn.Module], without: Collection[nn.Module] = ()) -> None:
        self._count = len(blocks)
        self._places = {
            module: (index, path)
            for index, block in enumerate(blocks)
            for path, module in block.named_modules()
            if module not in without
        }

    def of(self, module: nn.Module) -> tuple[int, str] | None:
        """Index of the block and path in it; None for a module of no block."""
        return self._places.get(module)

    def by_block(self, given: ByModule) -> list[Extras]:
        """``given`` by block, then by path.

        Raises:
            ValueError: a module is in none of the blocks.
        """
        by_block: list[dict[str, Mapping[str, torch.Tensor]]] = [{} for _ in range(self._count)]
        for module, tensors in given.items():
            if module not in self._places:
                raise ValueError(f"a {type(module).__name__} that gets tensors is not in a streamed block")
            index, path = self._places[module]
            by_block[index][path] = tensors
        return list(by_block)


class Travelling:
    """The large extras of all blocks, in host records of their own."""

    def __init__(self) -> None:
        self.arena: HostArena | None = None
        self._known: dict[tuple[int, str, str], weakref.ref[torch.Tensor]] = {}

    def are(self, extras: Sequence[Extras]) -> bool:
        """Whether the blocks have exactly these tensors: the same objects, not equal values."""
        tensors, known = _flat(extras), self._known
        return tensors.keys() == known.keys() and all(known[key]() is tensor for key, tensor in tensors.items())

    def replace(
        self, blocks: Sequence[Block], layouts: Sequence[RecordLayout], extras: Sequence[Extras], *, whole: bool
    ) -> None:
        """Copy ``extras`` into new records of these ``layouts``, in tiles of layers or of ``whole`` blocks."""
        self.remove(blocks)
        tensors = _flat(extras)
        if tensors:
            self.arena = HostArena([layout.nbytes for layout in layouts], what="LoRA memory")
            for block, layout, host, given in zip(blocks, layouts, self.arena.records, extras, strict=True):
                if layout.nbytes:
                    block.travelling = HostRecord(block.module, layout, host, given)
                    block.travelling.cut(whole=whole)
        self._known = {key: weakref.ref(tensor) for key, tensor in tensors.items()}

    def remove(self, blocks: Sequence[Block]) -> None:
        """Take them away from the blocks. Idempotent."""
        self._known = {}
        self.arena = None
        for block in blocks:
            if block.travelling is not None:
                block.travelling.remove()
                block.travelling = None


def remove_staying(block: Block) -> None:
    """Take the small extras away from ``block``. Idempotent."""
    if block.staying is not None:
        block.staying.remove()
        block.staying = None


def _flat(extras: Sequence[Extras]) -> dict[tuple[int, str, str], torch.Tensor]:
    return {
        (index, path, name): tensor
        for index, given in enumerate(extras)
        for path, named in given.items()
        for name, tensor in named.items()
    }
