"""A block in host memory, and what of it is on the device.

A block has a record of its own tensors. Extras - tensors that its layers were given later, a LoRA's factors for
instance - have records beside it: what is large travels with the layer's tile, what is small stays on the device.
"""

from collections.abc import Mapping

import torch
from torch import nn

from .plan import BlockSize
from .record import BoundTile, RecordLayout, keep_in_place, views_of

Extras = Mapping[str, Mapping[str, torch.Tensor]]
"""Host tensors by the path of the module in its block ("" is the block), then by the name of the buffer."""


class HostRecord:
    """One record of a block, and the copy of its bytes that is always on the device, if there is one.

    ``host`` are its bytes in host memory (uint8); ``is_pinned``: a copy from there leaves the host free. ``extras``
    become buffers of their modules, until `remove`; without any, ``layout`` is of tensors that the modules have.
    """

    def __init__(
        self, block: nn.Module, layout: RecordLayout, host: torch.Tensor, extras: Extras | None = None
    ) -> None:
        self.layout = layout
        self.host = host
        self.is_pinned = False
        self.buffer: torch.Tensor | None = None
        self.tiles: tuple[BoundTile, ...] = ()
        self._block = block
        self._added = [(block.get_submodule(path), name) for path, names in (extras or {}).items() for name in names]
        for path, tensors in (extras or {}).items():
            for name, tensor in tensors.items():
                block.get_submodule(path).register_buffer(name, tensor, persistent=False)
        self.small = BoundTile(block, layout.small, host)
        self.cut(whole=False)

    def refill(self, host: torch.Tensor, extras: Extras) -> None:
        """Take other ``extras``, of the same layout and all small, in other host memory. A copy on the device has the
        old values until it is written."""
        self.host = host
        self.small.refill(host, [extras[field.module][field.name] for field in self.layout.small.fields])
        if self.buffer is None:
            self.small.bind(self.small.home)

    def cut(self, *, whole: bool) -> None:
        """Into a tile for each layer, or a single one, while none of it is on the device."""
        layout = self.layout.whole() if whole else self.layout
        self.tiles = tuple(BoundTile(self._block, tile, self.host) for tile in layout.tiles)

    def bytes_for(self, resident: bool) -> torch.Tensor:
        """What is always on the device: all of it, or the small part."""
        return self.host if resident else self.host[self.small.tile.offset :]

    def take(self, buffer: torch.Tensor, resident: bool) -> None:
        """Bind to ``buffer``, a copy of `bytes_for`."""
        self.buffer = buffer
        start = 0 if resident else self.small.tile.offset
        for part in (*self.tiles, self.small) if resident else (self.small,):
            part.bind(views_of(part.tile, buffer[part.tile.offset - start :]))

    def drop(self) -> None:
        """Give the device's bytes up: back to host memory."""
        self.buffer = None
        for part in (*self.tiles, self.small):
            part.bind(part.home)

    def remove(self) -> None:
        """Take the extras away from their modules."""
        for module, name in self._added:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)


class Block:
    """A block of a streamed model: ``own`` are its tensors, ``travelling`` and ``staying`` its extras."""

    def __init__(self, module: nn.Module, kind: str, layout: RecordLayout, host: torch.Tensor) -> None:
        self.module = module
        self.kind = kind
        self.own = HostRecord(module, layout, host)
        self.travelling: HostRecord | None = None
        self.staying: HostRecord | None = None
        self.is_resident = False
        keep_in_place(module)

    @property
    def records(self) -> tuple[HostRecord, ...]:
        return tuple(record for record in (self.own, self.travelling, self.staying) if record is not None)

    @property
    def tiles(self) -> tuple[BoundTile, ...]:
        """Of its own tensors."""
        return self.own.tiles

    @property
    def device_bytes(self) -> int:
        return sum(record.buffer.nbytes for record in self.records if record.buffer is not None)

    def parts(self, local: int) -> tuple[tuple[BoundTile, HostRecord], ...]:
        """What travels as tile ``local``: tensors of the layer's own, and its extras; each with its record."""
        travelling = [record for record in (self.own, self.travelling) if record is not None]
        return tuple((record.tiles[local], record) for record in travelling if record.tiles[local].tile.nbytes)

    def size(self, *, whole: bool) -> BlockSize:
        layouts = [record.layout.whole() if whole else record.layout for record in self.records]
        tiles = zip(*([tile.nbytes for tile in layout.tiles] for layout in layouts if layout.tiles), strict=True)
        return BlockSize(self.kind, tuple(map(sum, tiles)), sum(layout.small.nbytes for layout in layouts))

    def cut(self, *, whole: bool) -> None:
        for record in self.records:
            record.cut(whole=whole)

    def drop(self) -> None:
        self.is_resident = False
        for record in self.records:
            record.drop()
