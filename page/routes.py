"""The server's routes for the page.

- ``GET /flux_nf4/nodes``: our nodes, the words that find them, and which of their widgets a plan depends on.
- ``GET /flux_nf4/plan``: the plan for a file of a models folder, from the file's header alone.
- ``GET /flux_nf4/reports``: the last report of each node; the event ``flux_nf4.report`` pushes them while models run.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from aiohttp import web

from ..memory import GIB
from ..nodes import NODE_CLASS_MAPPINGS
from ..nodes_compute import figures as int8_figures
from ..nodes_shared import PlannedNode
from ..offload.comfyui.patcher import StreamedModelPatcher
from ..offload.comfyui.streaming import observers
from ..offload.plan import Residency
from .answers import Version, answer_for, version_of
from .registered import replaced, say_what_folder_is_not_served, say_what_is_replaced, say_what_was_taken
from .reports import Reports, report_as_json

EVENT = "flux_nf4.report"

_MAX_BUDGET_GIB = 1024.0

PLANNED_NODES: Mapping[str, PlannedNode] = {
    name: node.PLAN for name, node in NODE_CLASS_MAPPINGS.items() if hasattr(node, "PLAN")
}
_FOLDERS = {node.folder for node in PLANNED_NODES.values() if node.folder}
_KINDS = tuple(dict.fromkeys(kind for node in PLANNED_NODES.values() for kind in node.counts))


@dataclass(frozen=True)
class Question:
    """A question of the page: the plan of which file, for which widgets?

    ``node`` is the node's id, if it has run. ``picture`` is the width and height in pixels that its graph asks for, if
    that is known.
    """

    folder: str
    name: str
    wanted: Residency
    node: str | None
    picture: tuple[int, int] | None = None


def register(server: Any) -> None:
    """Serve the routes from ``server`` (a PromptServer), and push what models report through it."""
    reports = Reports()

    async def get_nodes(request: web.Request) -> web.Response:
        taken = replaced()
        return web.json_response({name: _describe(name, node, taken) for name, node in NODE_CLASS_MAPPINGS.items()})

    async def get_plan(request: web.Request) -> web.Response:
        return await _answer_plan(request, reports)

    async def get_reports(request: web.Request) -> web.Response:
        return web.json_response(reports.as_json())

    def push(patcher: StreamedModelPatcher) -> None:
        report, int8 = patcher.report(), int8_figures(patcher)
        catalogue = getattr(patcher.model, "nf4_catalogue", None)
        reports.add(report, str(patcher.load_device), catalogue and catalogue.path, int8)
        if report.node_id is not None:
            server.send_sync(EVENT, report_as_json(report, int8), server.client_id)

    for path, handler in (("nodes", get_nodes), ("plan", get_plan), ("reports", get_reports)):
        server.routes.get(f"/flux_nf4/{path}")(handler)
    observers.append(push)
    say_what_is_replaced()
    say_what_folder_is_not_served()
    server.add_on_prompt_handler(_look_when_the_first_prompt_comes())


def _look_when_the_first_prompt_comes() -> Callable[[Any], Any]:
    """A handler of prompts, which does not change them. When the first one comes, all packages are loaded."""
    is_first = True

    def look(prompt: Any) -> Any:
        nonlocal is_first
        if is_first:
            is_first = False
            say_what_was_taken()
        return prompt

    return look


def _describe(name: str, node: type, taken: Mapping[str, str]) -> dict[str, Any]:
    """A node for the page. If another package has taken its name: the package's folder, and nothing of our node."""
    plan = None if name in taken else PLANNED_NODES.get(name)
    aliases = [] if name in taken else getattr(node, "SEARCH_ALIASES", [])
    return {"aliases": aliases, "plan": plan and dataclasses.asdict(plan), "taken_by": taken.get(name)}


async def _answer_plan(request: web.Request, reports: Reports) -> web.Response:
    if request.body_exists:
        raise web.HTTPRequestEntityTooLarge(max_size=0, actual_size=request.content_length or 1)
    try:
        question = parse_question(request.query)
    except ValueError as error:
        return web.json_response({"problem": str(error)}, status=400)
    folder, name = question.folder, question.name
    path, version = await asyncio.to_thread(_look_up, folder, name)  # the folder may be on a server that is gone
    if path is None:
        problem = (
            f"{name[:200]}: there is no such file in the {folder} folder. Refresh the page (key R) and pick another."
        )
        return web.json_response({"problem": problem}, status=404)
    device = str(comfy.model_management.get_torch_device())
    measured = reports.measured(device, path, question.node, question.picture)
    return web.json_response(text=await answer_for(path, folder, question.wanted, measured, version))


def parse_question(query: Mapping[str, str]) -> Question:
    """The question in the query of a request.

    Raises:
        ValueError: a value is missing, is no number, or is out of range.
    """
    folder, name = query.get("folder", ""), query.get("file", "")
    if folder not in _FOLDERS or not name:
        raise ValueError("folder and file name the checkpoint that is asked about")
    counts = {kind: int(query.get(kind, "-1")) for kind in _KINDS}
    budget = float(query.get("budget", "0"))
    if not (min(counts.values()) >= -1 and max(counts.values()) < 1000 and 0 <= budget <= _MAX_BUDGET_GIB):
        raise ValueError(f"{' and '.join(_KINDS)} are -1 to 999, budget is 0 to 1024 (GiB)")
    given = tuple((kind, count) for kind, count in counts.items() if count >= 0)
    picture = (int(query["width"]), int(query["height"])) if {"width", "height"} <= query.keys() else None
    return Question(folder, name, Residency(given, round(budget * GIB) or None), query.get("node"), picture)


def _look_up(folder: str, name: str) -> tuple[Path | None, Version | None]:
    path = _listed_path(folder, name)
    with contextlib.suppress(OSError):  # the answer says so
        return path, None if path is None else version_of(path)
    return path, None


def _listed_path(folder: str, name: str) -> Path | None:
    """The file ``name``, if ComfyUI itself lists it for this folder; no other name leads to a file."""
    found = folder_paths.get_full_path(folder, name) if name in folder_paths.get_filename_list(folder) else None
    return None if found is None else Path(found)
