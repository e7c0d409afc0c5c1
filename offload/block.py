"""A block in host memory, and what of it is on the device.

A block has a record of its own tensors. Extras are tensors that its layers were given later, such as a LoRA's
factors. They have records beside it: large ones travel with the layer's tile, small ones stay on the device.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from .arena import HostArena
from .plan import BlockSize
from .record import BoundTile, RecordLayout, give, keep_in_place, layout_of, set_apart, tile_of, views_of

Extras = Mapping[str, Mapping[str, torch.Tensor]]
"""Host tensors by the path of the module in its block ("" is the block), then by the name of the buffer."""

Sources = tuple[tuple[int, torch.Tensor], ...]
"""Host bytes that go side by side to one place on the device: for each the bytes it takes there, and the source."""


class HostRecord:
    """One record of a block, and the copy of its bytes that is always on the device, if there is one.

    ``host`` are its bytes in host memory (uint8). ``extras`` become buffers of their modules, until `remove`. Without
    any, ``layout`` is of tensors that the modules have.
    """

    def __init__(
        self, block: nn.Module, layout: RecordLayout, host: torch.Tensor, extras: Extras | None = None
    ) -> None:
        self.layout = layout
        self.host = host
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
        """Take other ``extras``, of the same layout and all small, in other host memory.

        A copy on the device keeps the old values until it is overwritten.
        """
        self.host = host
        self.small.refill(host, [extras[field.module][field.name] for field in self.layout.small.fields])
        if self.buffer is None:
            self.small.bind(self.small.home)

    def cut(self, *, whole: bool) -> None:
        """Cut the record into a tile for each layer, or into a single one. None of it may be on the device."""
        layout = self.layout.whole() if whole else self.layout
        self.tiles = tuple(BoundTile(self._block, tile, self.host) for tile in layout.tiles)

    def sources_for(self, resident: bool) -> Sources:
        """The bytes that are always on the device: all of a resident block, else the small part."""
        source = self.host if resident else self.host[self.small.tile.offset :]
        return ((source.nbytes, source),) if source.nbytes else ()

    def take(self, buffer: torch.Tensor, resident: bool) -> None:
        """Bind the tensors to ``buffer``, a copy of `sources_for`."""
        self.buffer = buffer
        start = 0 if resident else self.small.tile.offset
        for part in self.every_tile if resident else (self.small,):
            part.bind(views_of(part.tile, buffer[part.tile.offset - start :]))

    def drop(self) -> None:
        """Bind the tensors to host memory, and give up the bytes on the device."""
        self.buffer = None
        for part in self.every_tile:
            part.bind(part.home)

    @property
    def every_tile(self) -> tuple[BoundTile, ...]:
        return (*self.tiles, self.small)

    def remove(self) -> None:
        """Take the extras away from their modules."""
        for module, name in self._added:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)


class MappedRecord:
    """Tensors of a block that are streamed from where they are in host memory: mapped bytes of a file.

    ``tensors`` are these bytes (uint8, flat) by module and name. ``pieces`` has the tensors of each tile of ``layout``,
    each as a tile of its own, because their bytes lie apart.
    """

    def __init__(self, block: nn.Module, layout: RecordLayout, tensors: Mapping[tuple[str, str], torch.Tensor]) -> None:
        self.layout = layout
        self.buffer: torch.Tensor | None = None
        self._of_layers = tuple(
            tuple(
                BoundTile(block, tile_of(field.module, 0, (field,)), tensors[field.module, field.name], has_values=True)
                for field in tile.fields
            )
            for tile in layout.tiles
        )
        self.every_tile = tuple(itertools.chain.from_iterable(self._of_layers))
        self.pieces = self._of_layers

    def cut(self, *, whole: bool) -> None:
        self.pieces = (self.every_tile,) if whole else self._of_layers

    def sources_for(self, resident: bool) -> Sources:
        return tuple((piece.tile.nbytes, piece.source) for piece in self.every_tile) if resident else ()

    def take(self, buffer: torch.Tensor, resident: bool) -> None:
        self.buffer = buffer
        for piece in self.every_tile:
            piece.bind(views_of(piece.tile, buffer))
            buffer = buffer[piece.tile.nbytes :]

    def drop(self) -> None:
        self.buffer = None
        for piece in self.every_tile:
            piece.bind(piece.home)


class Block:
    """A block of a streamed model.

    ``mapped`` has its tensors that are mapped from a file, ``own`` has its others, ``travelling`` its large extras,
    ``staying`` its small ones.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: str,
        layout: RecordLayout,
        host: torch.Tensor,
        mapped: MappedRecord | None = None,
    ) -> None:
        self.module = module
        self.kind = kind
        self.own = HostRecord(module, layout, host)
        self.mapped = mapped
        self.travelling: HostRecord | None = None
        self.staying: HostRecord | None = None
        self.is_resident = False
        keep_in_place(module)

    @property
    def records(self) -> tuple[HostRecord | MappedRecord, ...]:
        every = (self.own, self.mapped, self.travelling, self.staying)
        return tuple(record for record in every if record is not None)

    @property
    def tiles(self) -> tuple[BoundTile, ...]:
        """Its tiles, by its own tensors: one for each layer, or one for the block."""
        return self.own.tiles

    @property
    def replaced(self) -> str | None:
        """The path of a layer with a tensor that was replaced from outside. Ask only while no tile is in use."""
        every = (tile for record in self.records for tile in record.every_tile if not tile.is_bound)
        return next((tile.tile.module or "a layer" for tile in every), None)

    def modules_of(self, local: int) -> set[nn.Module]:
        """The modules that have tensors in tile ``local``."""
        paths = {field.module for tile in self.parts(local) for field in tile.tile.fields}
        return {self.module.get_submodule(path) for path in paths}

    def in_host_memory(self, path: str, name: str) -> torch.Tensor | None:
        """Tensor ``name`` of the module at ``path``, wherever that is bound now."""
        tiles = (part for record in self.records for part in record.every_tile)
        fields = ((field, home) for part in tiles for field, home in zip(part.tile.fields, part.home, strict=True))
        return next((home for field, home in fields if (field.module, field.name) == (path, name)), None)

    @property
    def device_bytes(self) -> int:
        return sum(record.buffer.nbytes for record in self.records if record.buffer is not None)

    def parts(self, local: int) -> tuple[BoundTile, ...]:
        """The parts of tile ``local``: the layer's own tensors and its extras."""
        in_records = (record.tiles[local] for record in (self.own, self.travelling) if record is not None)
        mapped = () if self.mapped is None else self.mapped.pieces[local]
        return (*(tile for tile in in_records if tile.tile.nbytes), *mapped)

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


Names = Mapping[tuple[str, str], torch.Tensor]
"""Host bytes (uint8, flat) of tensors, by module and name."""

Split = tuple[RecordLayout, RecordLayout]
"""The two layouts of a block: of its own record, and of its mapped tensors."""


def layouts_of(modules: Sequence[nn.Module], without: Collection[nn.Module] = ()) -> list[RecordLayout]:
    """The layout of each block, except for the tensors of the modules ``without``.

    Raises:
        ValueError: a block has no tensors, or shares one with itself or another.
    """
    _refuse_shared(modules)
    return [layout_of(module, without) for module in modules]


def split(layouts: Sequence[RecordLayout], mapped: Sequence[Names]) -> list[Split]:
    """Split each block's layout into its own record and its ``mapped`` tensors."""
    found: dict[tuple[int, frozenset[tuple[str, str]]], Split] = {}  # blocks of one structure share their layout
    splits = []
    for layout, names in zip(layouts, mapped, strict=True):
        key = id(layout), frozenset(names)
        if key not in found:
            found[key] = set_apart(layout, names)
        splits.append(found[key])
    return splits


def blocks_in(
    arena: HostArena,
    modules: Sequence[nn.Module],
    kinds: Sequence[str],
    splits: Sequence[Split],
    mapped: Sequence[Names],
    each: Callable[[int], None],
) -> tuple[Block, ...]:
    """Move the tensors of ``modules`` into the records of ``arena``; ``mapped`` tensors stay where they are.

    ``each`` is called with the index of each block that has moved.

    Raises:
        ValueError: the records are of other sizes.
    """
    needed = [own.nbytes for own, _ in splits]
    found = [record.nbytes for record in arena.records]
    if needed != found:
        raise ValueError(
            f"the host memory has {len(found)} records of {sum(found):,} bytes, and the model has {len(needed)} blocks "
            f"of {sum(needed):,} bytes: it is another model's"
        )
    for module, (own, _), names in zip(modules, splits, mapped, strict=True):
        give(module, own, names)  # small ones are copied from there
    blocks = []
    for index, (module, kind, (own, in_file), names) in enumerate(zip(modules, kinds, splits, mapped, strict=True)):
        blocks.append(
            Block(module, kind, own, arena.records[index], MappedRecord(module, in_file, names) if names else None)
        )
        each(index)
    return tuple(blocks)


def names_in(tensors: Extras) -> Names:
    """The tensors of one block by module and name."""
    return {(path, name): tensor for path, named in tensors.items() for name, tensor in named.items()}


def extras_in(extras: Extras, layout: RecordLayout) -> Extras:
    """The ``extras`` that ``layout`` has a field for."""
    fields = {(field.module, field.name) for tile in (*layout.tiles, layout.small) for field in tile.fields}
    chosen = {path: {n: t for n, t in named.items() if (path, n) in fields} for path, named in extras.items()}
    return {path: named for path, named in chosen.items() if named}


def _refuse_shared(blocks: Sequence[nn.Module]) -> None:
    """Raises ValueError where a block has a tensor of another one."""
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        own = ((*module._parameters.values(), *module._buffers.values()) for module in block.modules())
        for tensor in (tensor for tensors in own for tensor in tensors if tensor is not None):
            other = owner.setdefault(id(tensor), index)
            if other != index:
                raise ValueError(
                    f"blocks {other} and {index} ({type(block).__name__}) share a tensor of shape "
                    f"{tuple(tensor.shape)}, so they cannot be streamed"
                )
