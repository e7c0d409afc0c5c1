"""A block's tensors laid out flat in one record, and the block bound to any copy of those bytes.

A record is the block's tiles, followed by its small part. A tile is the large tensors of one layer (for an NF4 Linear:
packed weight and absmax). They are fetched, waited for and released together. The small part is everything else:
biases, norms and tables. It is a thousandth of a Flux block and stays on the device, so nothing waits for it.

A tensor whose class wraps plain tensors (ComfyUI's quantised weights) is a field made of fields. Torch's protocol for
these classes, ``__tensor_flatten__`` and ``__tensor_unflatten__``, takes it apart and puts it together.
"""

import dataclasses
import functools
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 256
"""Bytes. CUDA kernels need 16; 256 is what the device's own allocator aligns to."""

SMALL_BYTES = 64 << 10
"""Tensors with fewer bytes are in the small part."""


@dataclass(frozen=True)
class Wrapper:
    """How a tensor is made of plain ones: ``inner`` are those, with offsets within its bytes."""

    type: type[Any]
    inner: "tuple[Field, ...]"
    context: Any = dataclasses.field(compare=False)


@dataclass(frozen=True)
class Field:
    """One tensor of a record: where it is in the block, and its first byte within its tile or the small part."""

    module: str
    name: str
    is_parameter: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    wrapper: Wrapper | None = None


@dataclass(frozen=True)
class Tile:
    """Consecutive bytes of a record that one module uses. ``module`` is its path in the block; "" is the block."""

    module: str
    offset: int
    nbytes: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class RecordLayout:
    """The tiles, in the order in which their modules were registered, and the small part.

    Blocks of equal structure have equal layouts.
    """

    tiles: tuple[Tile, ...]
    small: Tile
    nbytes: int

    def whole(self) -> "RecordLayout":
        """The same bytes with all tiles as one, for a compiled block: it needs all of them when it is entered."""
        fields = [replace(field, offset=tile.offset + field.offset) for tile in self.tiles for field in tile.fields]
        tiles = (Tile("", 0, self.small.offset, tuple(fields)),) if self.tiles else ()
        return RecordLayout(tiles, self.small, self.nbytes)


def layout_of(block: nn.Module, without: Collection[nn.Module] = ()) -> RecordLayout:
    """Lay out every parameter and buffer of ``block``, except those of the modules ``without``.

    Raises:
        ValueError: the block has no tensors, or two names share one tensor.
    """
    owners = dict(_owned_fields(block, without))
    _refuse_shared(block)
    return layout_from(owners)


def layout_from(owners: Mapping[str, Sequence[Field]]) -> RecordLayout:
    """Lay out a block from the fields of each of its modules, by path. The ``offset`` of these fields is ignored.

    Each layer with large tensors gets a tile. If it contains another layer with large tensors, the whole block is one
    tile.
    """
    of_modules = tuple((path, tuple(fields)) for path, fields in owners.items())
    if any(field.wrapper is not None for _, fields in of_modules for field in fields):
        return _laid_out(of_modules, SMALL_BYTES)  # equal classes may wrap their tensors with different contexts
    return _kept_layout(of_modules, SMALL_BYTES)


def _laid_out(owners: tuple[tuple[str, tuple[Field, ...]], ...], small_bytes: int) -> RecordLayout:
    large = {path: [field for field in fields if field.nbytes >= small_bytes] for path, fields in owners}
    large = {path: fields for path, fields in large.items() if fields}
    nested = any(inner != outer and _contains(outer, inner) for outer in large for inner in large)
    if nested:
        large = {"": [field for fields in large.values() for field in fields]}
    return _in_a_row(large.items(), [field for _, fields in owners for field in fields if field.nbytes < small_bytes])


_kept_layout = functools.lru_cache(maxsize=16)(_laid_out)
"""The same for all blocks of one structure."""


def set_apart(layout: RecordLayout, names: Collection[tuple[str, str]]) -> tuple[RecordLayout, RecordLayout]:
    """Split the tiles of ``layout`` in two: without the fields ``names`` (module, name), and with these fields alone.

    Both results have as many tiles as ``layout``. The first has its small part.
    """

    def of_tiles(are_apart: bool) -> Iterable[tuple[str, list[Field]]]:
        for tile in layout.tiles:
            yield tile.module, [f for f in tile.fields if ((f.module, f.name) in names) == are_apart]

    return _in_a_row(of_tiles(False), layout.small.fields), _in_a_row(of_tiles(True), ())


def extras_layouts(
    own: RecordLayout, extras: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[RecordLayout, RecordLayout]:
    """Layouts of tensors that are to be added to the modules of a block that is laid out as ``own``.

    The first has as many tiles as ``own``, with the large tensors of modules that have a tile. The second has all other
    tensors, in its small part. ``extras`` maps a module's path, then a name, to the tensor.
    """
    fields = [_field(path, name, False, tensor) for path, tensors in extras.items() for name, tensor in tensors.items()]
    return _extras_layouts(tuple(tile.module for tile in own.tiles), tuple(fields), SMALL_BYTES)


@functools.lru_cache(maxsize=64)
def _extras_layouts(
    paths: tuple[str, ...], extras: tuple[Field, ...], small_bytes: int
) -> tuple[RecordLayout, RecordLayout]:
    # Cached: blocks of equal structure get extras of the same shapes, and get them again when a strength changes.
    tiles: dict[str, list[Field]] = {path: [] for path in paths}
    staying: list[Field] = []
    for extra in extras:
        travels = tiles.get(extra.module if extra.module in tiles else "") if extra.nbytes >= small_bytes else None
        (staying if travels is None else travels).append(extra)
    return _in_a_row(tiles.items(), ()), _in_a_row((), staying)


def _owned_fields(block: nn.Module, without: Collection[nn.Module]) -> Iterable[tuple[str, list[Field]]]:
    found = False
    for path, module in block.named_modules():
        if module in without:
            continue
        fields = []
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fields.append(_field(path, name, is_parameter, tensor))
        found = found or bool(fields)
        yield path, fields
    if not found:
        raise ValueError(f"a {type(block).__name__} without parameters or buffers cannot be streamed")


def _field(module: str, name: str, is_parameter: bool, tensor: torch.Tensor) -> Field:
    if not is_traceable_wrapper_subclass(tensor):
        nbytes = tensor.numel() * tensor.element_size()
        return Field(module, name, is_parameter, tensor.dtype, tuple(tensor.shape), 0, nbytes)
    names, context = tensor.__tensor_flatten__()
    fields = [_field(module, inner, False, getattr(tensor, inner)) for inner in names]
    inside = tile_of(module, 0, fields)
    wrapper = Wrapper(type(tensor), inside.fields, context)
    return Field(module, name, is_parameter, tensor.dtype, tuple(tensor.shape), 0, inside.nbytes, wrapper)


def _plain(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The plain tensors that ``tensor`` is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return (tensor,)
    names, _ = tensor.__tensor_flatten__()
    return (plain for name in names for plain in _plain(getattr(tensor, name)))


def _refuse_shared(block: nn.Module) -> None:
    names: dict[int, str] = {}
    for path, module in block.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{name}".lstrip(".")
            other = names.setdefault(id(tensor), full)
            if other != full:
                raise ValueError(
                    f"{other} and {full} of a {type(block).__name__} share one tensor, so the block cannot be streamed"
                )


def _contains(outer: str, inner: str) -> bool:
    return not outer or inner.startswith(outer + ".")


def _in_a_row(tiles: Iterable[tuple[str, Sequence[Field]]], small: Sequence[Field]) -> RecordLayout:
    placed: list[Tile] = []
    offset = 0
    for path, fields in tiles:
        placed.append(tile_of(path, offset, fields))
        offset += placed[-1].nbytes
    last = tile_of("", offset, small)
    return RecordLayout(tuple(placed), last, offset + last.nbytes)


def tile_of(module: str, offset: int, fields: Sequence[Field]) -> Tile:
    """Lay out the fields one after the other. ``offset`` is the tile's first byte in its record."""
    placed, end = [], 0
    for field in fields:
        placed.append(field if field.offset == end else replace(field, offset=end))
        end += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
    return Tile(module, offset, end, tuple(placed))


Views = tuple[torch.Tensor, ...]


def views_of(tile: Tile, memory: torch.Tensor) -> Views:
    """The fields of ``tile`` as views into ``memory`` (uint8), which starts at the tile's first byte."""
    # Ordinary tensors: a thread outside inference mode could not write to inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        return tuple(_view(field, memory) for field in tile.fields)


def _view(field: Field, memory: torch.Tensor) -> torch.Tensor:
    memory = memory[field.offset : field.offset + field.nbytes]
    if field.wrapper is None:
        view = memory.view(field.dtype).view(field.shape)
        return nn.Parameter(view, requires_grad=False) if field.is_parameter else view
    inner = {part.name: _view(part, memory) for part in field.wrapper.inner}
    view = field.wrapper.type.__tensor_unflatten__(inner, field.wrapper.context, field.shape, None)
    if field.is_parameter:
        view._is_param = True  # nn.Parameter would detach the view, which may copy parts of it
    return view


def give(block: nn.Module, layout: RecordLayout, tensors: Mapping[tuple[str, str], torch.Tensor]) -> None:
    """Make modules of ``block`` use these bytes (uint8, flat; by module and name) for their small tensors."""
    for field in layout.small.fields:
        if (field.module, field.name) in tensors:
            piece = tile_of(field.module, 0, (field,))
            (view,) = views_of(piece, tensors[field.module, field.name])
            module = block.get_submodule(field.module)
            tensors_of: dict[str, Any] = module._parameters if field.is_parameter else module._buffers
            tensors_of[field.name] = view


class BoundTile:
    """The tensors of one tile in their modules, which are switched between copies of the same bytes.

    ``home`` are views of the host record. The modules have these whenever the tile is not on the device.
    """

    def __init__(self, block: nn.Module, tile: Tile, record: torch.Tensor, *, has_values: bool = False) -> None:
        """Bind ``tile`` of ``block`` to its bytes in ``record``. Copy the tensors' values there, unless it has them."""
        self.tile = tile
        self.module = block.get_submodule(tile.module)
        modules = {path: block.get_submodule(path) for path in {field.module for field in tile.fields}}
        self._targets: tuple[tuple[dict[str, Any], str], ...] = tuple(
            (modules[field.module]._parameters if field.is_parameter else modules[field.module]._buffers, field.name)
            for field in tile.fields
        )
        if has_values:
            self._use(record)
        else:
            self.refill(record, [tensors[name] for tensors, name in self._targets])
        self.bind(self.home)

    def refill(self, record: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
        """Make ``record`` the host record, and copy ``values`` into it, except those on the meta device."""
        self._use(record)
        pairs = [
            (value, view)
            for tensor, home in zip(values, self.home, strict=True)
            for value, view in zip(_plain(tensor), _plain(home), strict=True)
            if not value.is_meta and value.data_ptr() != view.data_ptr()
        ]
        if pairs:
            with torch.inference_mode(False), torch.no_grad():
                for value, view in pairs:
                    view.copy_(value)

    def _use(self, record: torch.Tensor) -> None:
        self.source = record[self.tile.offset : self.tile.offset + self.tile.nbytes]
        self.home = views_of(self.tile, self.source)

    def bind(self, views: Views) -> None:
        """Make the modules use ``views``."""
        self._bound = views
        for (tensors, name), view in zip(self._targets, views, strict=True):
            tensors[name] = view

    @property
    def is_bound(self) -> bool:
        """Whether the modules still have the tensors that `bind` was last given."""
        return all(tensors.get(name) is view for (tensors, name), view in zip(self._targets, self._bound, strict=True))

    def swaps(self, views: Views) -> Iterable[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]:
        """For each tensor: the module's dict that holds it, its name there, its view in `home` and in ``views``."""
        for (tensors, name), home, view in zip(self._targets, self.home, views, strict=True):
            yield tensors, name, home, view


def keep_in_place(block: nn.Module) -> None:
    """Make ``block.to()`` and similar calls do nothing: the streamer decides where the block is."""
    for module in block.modules():
        stay_in_place(module)


def stay_in_place(module: nn.Module) -> None:
    """`keep_in_place` for one module, without those in it."""
    reference = weakref.ref(module)

    def stay(*_: Any, **__: Any) -> Any:
        return reference()

    vars(module).update(_apply=stay, __deepcopy__=refuse_copies)  # nn.Module looks at each attribute that is set


def refuse_copies(memo: object) -> NoReturn:
    """Raises TypeError: a copy would have the hooks that move the original."""
    raise TypeError(
        "a streamed model, its blocks and its layers cannot be copied with copy.deepcopy: the copy would move the "
        "blocks of the original. Use ModelPatcher.clone, or copy the model before it is streamed."
    )
