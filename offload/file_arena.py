"""Files as the host arena: mapped, and pinned in place as far as there is room in RAM."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import pinning_ahead
from .arena import PAGE, whole_pages
from .file_map import BringingIn, FileMapError, FilePart, map_parts, range_of
from .pinnable import THE_LIMIT, PinnableMemory, Shortfall
from .pinning import Piece, Registrar, pinned_by_all, registrar_for
from .ram import free_ram_bytes, ram_bytes

_NO_ROOM = Shortfall(
    "the RAM has no room for more",
    "What is not pinned is read from the file again where the system needs the memory. Close other programs, or keep "
    "more blocks in VRAM.",
)


def map_blocks(
    blocks: Iterable[nn.Module], parts: Mapping[nn.Module, Mapping[str, FilePart]]
) -> dict[nn.Module, dict[str, torch.Tensor]]:
    """Map the ``parts`` of files (by module, then by the tensor's name). Those of a block are mapped together.

    What a block shares with an earlier one, which may be a layer of it, is mapped with that.

    Raises:
        FileMapError: a file cannot be opened or mapped, or is shorter than a part says.
    """
    mapped: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for block in blocks:
        modules = [module for module in block.modules() if module not in mapped]
        of_block = [(module, name) for module in modules for name in parts.get(module, ())]
        tensors = map_parts([parts[module][name] for module, name in of_block])
        for (module, name), tensor in zip(of_block, tensors, strict=True):
            mapped.setdefault(module, {})[name] = tensor
    return mapped


class FileArena(PinnableMemory):
    """The mapped tensors (`map_parts`) of each block. Two models of one file, on two devices, share what is pinned."""

    def __init__(
        self,
        tensors: Sequence[Collection[torch.Tensor]],
        registrar_for: Callable[[torch.device], Registrar | None] = registrar_for,
    ) -> None:
        self.tensors = tuple(map(tuple, tensors))
        ranges = [dict.fromkeys(map(range_of, of_block)) for of_block in self.tensors]
        self._ranges = tuple(dict.fromkeys(item for of_block in ranges for item in of_block))
        pieces = [[Piece(item.pins, item.address, whole_pages(item.nbytes)) for item in block] for block in ranges]
        super().__init__(pieces, registrar_for, "the file")

    def bringing_in(self) -> BringingIn:
        """What brings it in; a context. Its byte counts add up to `bytes_to_bring_in`."""
        return BringingIn(self._ranges)

    @property
    def bytes_to_bring_in(self) -> int:
        return sum(item.nbytes for item in self._ranges)

    def require_unchanged(self) -> None:
        """Raises `FileMapError` if somebody has written to a file."""
        for file in dict.fromkeys(item.file for item in self._ranges):
            file.require_unchanged()

    def pin(
        self,
        limit_bytes: int,
        device: torch.device,
        limited_by: Shortfall = THE_LIMIT,
        first: Iterable[int] = (),
    ) -> None:
        """As `PinnableMemory.pin`, but only as far as RAM is free: the system cannot drop pinned pages of a file."""
        for item in self._ranges:
            item.users.add(self)
        room = pinned_by_all() + _room_for_pins()
        limit_bytes, limited_by = min((limit_bytes, limited_by), (room, _NO_ROOM), key=lambda limit: limit[0])
        super().pin(limit_bytes, device, limited_by, first)

    def pin_ahead(self, limit_bytes: int, device: torch.device, needed_bytes: int = 0) -> None:
        """Begin to pin on another thread (`pinning_ahead`), in order, if all may be pinned.

        If not all may be, `pin` has to choose what matters most. ``limit_bytes`` is as for `pin`; ``needed_bytes`` of
        the RAM that is free now are for what is still to be read.
        """
        registrar = self._registrar_for(device)
        pieces = [piece for piece in self._every if not piece.is_pinned]
        room = min(limit_bytes - pinned_by_all(), _room_for_pins() - needed_bytes)
        if registrar is None or sum(piece.nbytes for piece in pieces) > room:
            return
        for item in self._ranges:
            item.users.add(self)
            item.pins.registrars.setdefault(device, registrar)
        pinning_ahead.start(self, pieces, registrar)

    def _release(self) -> None:
        """Unpin what no other arena uses."""
        self._used_by.clear()
        for item in self._ranges:
            item.users.discard(self)
            if not item.users:
                item.pins.release()


def _room_for_pins() -> int:
    """Bytes. A sixteenth of the RAM is left for others. The system counts pinned pages of files as free, wrongly."""
    return max(0, free_ram_bytes() - pinned_by_all(read_only=True) - ram_bytes() // 16)


@dataclass(frozen=True)
class _FirstPage:
    path: Path
    offset = 0
    nbytes = 1


def why_not_pinned(
    path: Path,
    device: torch.device,
    registrar_for: Callable[[torch.device], Registrar | None] = registrar_for,
) -> str:
    """Why a device cannot copy from the file's own memory, as a clause; "" if it can. One page is tried."""
    if sys.platform != "linux":
        return "only Linux pins the memory of a file"
    registrar = registrar_for(device)
    if registrar is None:
        return f"{device.type} has no way to pin memory that is there already"
    try:
        (page,) = map_parts([_FirstPage(path)])
    except FileMapError as error:
        return str(error)
    pins = range_of(page).pins  # given back with the page
    pins.registrars[device] = registrar
    code = Piece(pins, page.data_ptr(), PAGE).register(registrar)
    return f"the driver refused a page of the file (error {code})" if code else ""
