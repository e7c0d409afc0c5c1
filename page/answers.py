"""The answer to the page's question: the plan for a file, as JSON. A file's header is read once for all questions."""

import asyncio
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..memory import GIB
from ..nf4_loader.checkpoint.catalogue import Catalogue, read_catalogue
from ..nf4_loader.checkpoint.encoder_file import read_encoder_file
from ..nf4_loader.checkpoint.errors import CheckpointError, reason
from ..nf4_loader.checkpoint.require import require_4bit, require_all_in_one, require_transformer
from ..nf4_loader.models.streamed_encoders import encoder_dtype
from ..nf4_loader.models.transformers import model_dtype
from ..offload.plan import BlockSize, BudgetTooSmallError, Residency, least_device_bytes
from .encoder_plan import encoder_other_bytes, encoder_sizes
from .file_plan import (
    Advice,
    Measured,
    advise,
    block_sizes,
    bytes_within,
    make_plan,
    modulation_sizes,
    more_bytes,
    other_bytes,
    predict_ms,
)

Version = tuple[int, int]
"""Time of change in ns and size in bytes of a file."""


@dataclass(frozen=True)
class BarBlock:
    """A block of the bar. ``is_resident`` is None if it is decided only when the model is loaded."""

    kind: str
    nbytes: int
    is_resident: bool | None


@dataclass(frozen=True)
class Answer:
    """The plan for a file: bytes, and ms of one forward where this machine's speed has been measured, with a picture of
    this width and height in pixels.

    ``host_bytes`` are of the blocks and of their layers that are computed ahead; ``all_host_bytes`` of the whole file,
    None where the node loads only a part of it.
    """

    blocks: tuple[BarBlock, ...]
    device_bytes: int | None
    least_device_bytes: int
    most_device_bytes: int
    host_bytes: int
    all_host_bytes: int | None
    bytes_per_forward: int | None
    compute_ms: float | None
    stall_ms: float | None
    picture: tuple[int, int] | None
    advice: Advice


@dataclass(frozen=True)
class Problem:
    """Why the node cannot load the file, and what to do, in words for the user."""

    problem: str


async def answer_for(
    path: Path, folder: str, wanted: Residency, measured: Measured | None, version: Version | None = None
) -> str:
    """JSON of the `Answer` for a file, or of a `Problem` where the node cannot load it.

    Args:
        path: The file.
        folder: The models folder of the node's files, which decides what must be in the file.
        wanted: What the node's widgets say.
        measured: What runs of the file have shown.
        version: Its `version_of` now; None reads it again.
    """
    file = await _file_at(path, folder, version)
    # Not in a thread: starting one costs more than the answer, and would take Python's lock from a running prompt.
    return json.dumps(file, default=vars) if isinstance(file, Problem) else _answer(file, wanted, measured)


@dataclass(frozen=True, eq=False)
class _File:
    """What a plan depends on."""

    blocks: tuple[BlockSize, ...]
    other_bytes: int
    all_host_bytes: int | None
    ahead_host_bytes: int = 0
    """Of the layers in the blocks that are computed ahead; ``blocks`` are without them."""
    more_bytes: int = 0
    """How many more than ``other_bytes`` these take on the device where they stay."""


_Key = tuple[Path, str]
"""A file, and the models folder that it is wanted from."""

_files: dict[_Key, tuple[Version, _File]] = {}
"""Each file that was asked about and can be loaded, with the version that was looked at."""

_under_way: dict[_Key, "asyncio.Future[_File | Problem]"] = {}
"""Files that are being looked at. Further questions about them wait for the same result."""


async def _file_at(path: Path, folder: str, version: Version | None) -> _File | Problem:
    key = (path, folder)
    known = _files.get(key)
    if known is not None and known[0] == version:
        return known[1]
    if key not in _under_way:  # in a thread, for the file may be on a disk that sleeps or a server that is gone
        _under_way[key] = asyncio.ensure_future(asyncio.to_thread(_look_at, key))
        _under_way[key].add_done_callback(lambda _: _under_way.pop(key))
    return await asyncio.shield(_under_way[key])


def version_of(path: Path) -> Version:
    """Changes when the file does.

    Raises:
        OSError: the file cannot be looked at.
    """
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _look_at(key: _Key) -> _File | Problem:
    path = key[0]
    try:
        version = version_of(path)
    except OSError as error:
        return Problem(f"{path.name}: it cannot be read ({reason(error)}). Refresh the page (key R) and pick another.")
    found = _read_file(*key)
    if isinstance(found, _File):  # problems are not kept: they may lie in another file, such as a missing shard
        _files[key] = (version, found)
    return found


def _read_file(path: Path, folder: str) -> _File | Problem:
    try:
        return _READ[folder](path)
    except CheckpointError as error:
        return Problem(str(error))


def _read_all_in_one(path: Path) -> _File:
    catalogue = read_catalogue(path)
    require_all_in_one(catalogue)
    return _of_transformer(catalogue, catalogue.ram_bytes)


def _read_transformer(path: Path) -> _File:
    catalogue = read_catalogue(path)
    require_transformer(catalogue)
    return _of_transformer(catalogue, None)


def _of_transformer(catalogue: Catalogue, all_host_bytes: int | None) -> _File:
    dtype = model_dtype(catalogue)
    return _File(
        block_sizes(catalogue, dtype),
        other_bytes(catalogue, dtype),
        all_host_bytes,
        ahead_host_bytes=sum(size.nbytes for size in modulation_sizes(catalogue, dtype)),
        more_bytes=more_bytes(catalogue, dtype),
    )


def _read_encoder(path: Path) -> _File:
    file = read_encoder_file(path)
    require_4bit([file])
    dtype = encoder_dtype(file)
    return _File(encoder_sizes(file, dtype), encoder_other_bytes(file, dtype), None)


_READ: Mapping[str, Callable[[Path], _File]] = {
    "checkpoints": _read_all_in_one,
    "diffusion_models": _read_transformer,
    "text_encoders": _read_encoder,
}


@functools.lru_cache(maxsize=1024)
def _answer(file: _File, wanted: Residency, measured: Measured | None) -> str:
    blocks, other = file.blocks, file.other_bytes
    least = other + least_device_bytes(blocks)
    try:
        plan = make_plan(blocks, other, wanted)
        advice = Advice("automatic") if plan is None else advise(plan, blocks, measured)
    except BudgetTooSmallError:
        plan, advice = None, Advice("budget_too_small", {"gib": least / GIB})
    resident = None if plan is None else set(plan.resident)
    compute_ms, stall_ms = predict_ms(plan, blocks, measured) if plan and measured else (None, None)
    answer = Answer(
        tuple(BarBlock(b.kind, b.nbytes, None if resident is None else i in resident) for i, b in enumerate(blocks)),
        device_bytes=None if plan is None else bytes_within(plan, other, file.more_bytes, wanted),
        least_device_bytes=least,
        most_device_bytes=other + sum(block.nbytes for block in blocks) + file.more_bytes,
        host_bytes=sum(block.nbytes for block in blocks) + file.ahead_host_bytes,
        all_host_bytes=file.all_host_bytes,
        bytes_per_forward=None if plan is None else plan.bytes_per_forward,
        compute_ms=compute_ms,
        stall_ms=stall_ms,
        picture=measured.picture if measured else None,
        advice=advice,
    )
    return json.dumps(answer, default=vars)
