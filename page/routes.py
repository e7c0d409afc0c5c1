"""What the page asks the server, and what running models tell the page.

- ``GET /flux_nf4/nodes``: our nodes, the words that find them, and which of their widgets a plan depends on.
- ``GET /flux_nf4/plan``: the plan for a file of a models folder, from the file's header alone.
- ``GET /flux_nf4/reports``: the last report of each node; the event ``flux_nf4.report`` pushes them while models run.
"""

import asyncio
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web

from ..memory import GIB
from ..nf4_loader.checkpoint.catalogue import read_catalogue
from ..nf4_loader.checkpoint.errors import CheckpointError
from ..nf4_loader.checkpoint.require import require_all_in_one, require_transformer
from ..nf4_loader.models.transformers import model_dtype
from ..nodes import NODE_CLASS_MAPPINGS
from ..nodes_shared import PlannedNode
from ..offload.comfyui.patcher import StreamedModelPatcher
from ..offload.comfyui.streaming import StreamingReport, observers
from ..offload.plan import BlockSize, BudgetTooSmallError, Residency, least_device_bytes
from .file_plan import Advice, Measured, advise, block_sizes, make_plan, other_bytes, predict_ms

EVENT = "flux_nf4.report"

_MAX_BUDGET_GIB = 1024.0


PLANNED_NODES: Mapping[str, PlannedNode] = {
    name: node.PLAN for name, node in NODE_CLASS_MAPPINGS.items() if hasattr(node, "PLAN")
}
_FOLDERS = {node.folder for node in PLANNED_NODES.values() if node.folder}
_KINDS = tuple(dict.fromkeys(kind for node in PLANNED_NODES.values() for kind in node.counts))


@dataclass(frozen=True)
class BarBlock:
    """A block of the bar. ``is_resident`` is None where that is decided when the model is loaded."""

    kind: str
    nbytes: int
    is_resident: bool | None


@dataclass(frozen=True)
class Answer:
    """The plan for a file: bytes, and ms of one forward where this machine's speed has been measured."""

    blocks: tuple[BarBlock, ...]
    device_bytes: int | None
    least_device_bytes: int
    most_device_bytes: int
    host_bytes: int
    bytes_per_forward: int | None
    compute_ms: float | None
    stall_ms: float | None
    advice: Advice


@dataclass(frozen=True)
class Problem:
    """Why the node cannot load the file, and what to do, in words for the user."""

    problem: str


@dataclass
class Reports:
    """The last report of each node since the server started."""

    by_node: dict[str, StreamingReport] = field(default_factory=dict)
    measured: Measured | None = None

    def add(self, report: StreamingReport) -> None:
        if report.node_id is not None:
            self.by_node[report.node_id] = report
        cost = report.cost
        if cost is not None and cost.total_ms and cost.stall_ms is not None and report.link_gbps:
            compute_ms = (cost.total_ms - cost.stall_ms) / len(report.kinds)
            self.measured = Measured(report.link_gbps, compute_ms, report.pinned_bytes >= report.host_bytes)


def register(server: Any) -> None:
    """Serve the routes from ``server`` (a PromptServer), and push what models report through it."""
    reports = Reports()

    async def get_nodes(request: web.Request) -> web.Response:
        return web.json_response({name: _describe(name, node) for name, node in NODE_CLASS_MAPPINGS.items()})

    async def get_plan(request: web.Request) -> web.Response:
        return await _answer_plan(request, reports.measured)

    async def get_reports(request: web.Request) -> web.Response:
        return web.json_response({name: _jsonable(report) for name, report in reports.by_node.items()})

    def push(patcher: StreamedModelPatcher) -> None:
        report = patcher.report()
        reports.add(report)
        if report.node_id is not None:
            server.send_sync(EVENT, _jsonable(report), server.client_id)

    for path, handler in (("nodes", get_nodes), ("plan", get_plan), ("reports", get_reports)):
        server.routes.get(f"/flux_nf4/{path}")(handler)
    observers.append(push)


def _describe(name: str, node: type) -> dict[str, Any]:
    plan = PLANNED_NODES.get(name)
    return {"aliases": getattr(node, "SEARCH_ALIASES", []), "plan": plan and dataclasses.asdict(plan)}


def _jsonable(report: StreamingReport) -> dict[str, Any]:
    return dataclasses.asdict(report) | {"is_lowered": report.is_lowered}


async def _answer_plan(request: web.Request, measured: Measured | None) -> web.Response:
    if request.body_exists:
        raise web.HTTPRequestEntityTooLarge(max_size=0, actual_size=request.content_length or 1)
    try:
        folder, name, wanted = parse_question(request.query)
    except ValueError as error:
        return web.json_response({"problem": str(error)}, status=400)
    path = _listed_path(folder, name)
    if path is None:
        problem = (
            f"{name[:200]}: there is no such file in the {folder} folder. Refresh the page (key R) and pick another."
        )
        return web.json_response({"problem": problem}, status=404)
    return web.json_response(text=await answer_for(path, folder == "checkpoints", wanted, measured))


def parse_question(query: Mapping[str, str]) -> tuple[str, str, Residency]:
    """Folder, file and widgets of a request.

    Raises:
        ValueError: one is missing, no number, or out of range.
    """
    folder, name = query.get("folder", ""), query.get("file", "")
    if folder not in _FOLDERS or not name:
        raise ValueError("folder and file name the checkpoint that is asked about")
    counts = {kind: int(query.get(kind, "-1")) for kind in _KINDS}
    budget = float(query.get("budget", "0"))
    if not (min(counts.values()) >= -1 and max(counts.values()) < 1000 and 0 <= budget <= _MAX_BUDGET_GIB):
        raise ValueError(f"{' and '.join(_KINDS)} are -1 to 999, budget is 0 to 1024 (GiB)")
    given = tuple((kind, count) for kind, count in counts.items() if count >= 0)
    return folder, name, Residency(given, round(budget * GIB) or None)


def _listed_path(folder: str, name: str) -> Path | None:
    """Only a name that ComfyUI itself lists in the node leads to a file."""
    found = folder_paths.get_full_path(folder, name) if name in folder_paths.get_filename_list(folder) else None
    return None if found is None else Path(found)


async def answer_for(path: Path, is_all_in_one: bool, wanted: Residency, measured: Measured | None) -> str:
    """JSON of the `Answer` for the file at ``path``, which has to hold CLIP, T5 and VAE too if ``is_all_in_one``; of a
    `Problem` where the node cannot load it."""
    file = await _file_at(path, is_all_in_one)
    # Not in a thread: that costs more than the answer, and a prompt that runs has to share Python's lock with it.
    return json.dumps(file, default=vars) if isinstance(file, Problem) else _answer(file, wanted, measured)


@dataclass(frozen=True, eq=False)
class _File:
    """What of a file a plan depends on."""

    blocks: tuple[BlockSize, ...]
    other_bytes: int


_files: dict[tuple[Path, bool], tuple[tuple[int, int], _File]] = {}
"""Each file that was asked about and can be loaded, as it was when it had this time of change in ns and this size."""


async def _file_at(path: Path, is_all_in_one: bool) -> _File | Problem:
    try:
        status = path.stat()
    except OSError as error:
        return Problem(f"{path.name}: it cannot be read ({error}). Refresh the page (key R) and pick another.")
    key, version = (path, is_all_in_one), (status.st_mtime_ns, status.st_size)
    known = _files.get(key)
    if known is not None and known[0] == version:
        return known[1]
    found = await asyncio.to_thread(_read_file, path, is_all_in_one)
    if isinstance(found, _File):  # a problem may lie in another file than this one, such as a shard that is missing
        _files[key] = (version, found)
    return found


def _read_file(path: Path, is_all_in_one: bool) -> _File | Problem:
    try:
        catalogue = read_catalogue(path)
        (require_all_in_one if is_all_in_one else require_transformer)(catalogue)
        dtype = model_dtype(catalogue)
    except CheckpointError as error:
        return Problem(str(error))
    return _File(block_sizes(catalogue, dtype), other_bytes(catalogue, dtype))


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
        device_bytes=None if plan is None else other + plan.device_bytes,
        least_device_bytes=least,
        most_device_bytes=other + sum(block.nbytes for block in blocks),
        host_bytes=sum(block.nbytes for block in blocks),
        bytes_per_forward=None if plan is None else plan.bytes_per_forward,
        compute_ms=compute_ms,
        stall_ms=stall_ms,
        advice=advice,
    )
    return json.dumps(answer, default=vars)
