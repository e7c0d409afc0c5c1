"""Shared by the nodes: the inputs for residency, files by name, and models kept between runs."""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.cli_args
import folder_paths

from .checkpoints import key_of, load_all_in_one, streamed
from .families import FLUX1
from .memory import GIB
from .nf4_loader.checkpoint.catalogue import read_catalogue
from .nf4_loader.checkpoint.require import require_all_in_one
from .nodes_compute import choose
from .offload.comfyui.adopt import stream_model
from .offload.comfyui.patcher import StreamedModelPatcher
from .offload.plan import Residency

logger = logging.getLogger(__name__)

CATEGORY = "loaders/flux nf4"
HIDDEN = {"unique_id": "UNIQUE_ID"}
MODEL_TOOLTIP = "The Flux model, for a sampler."
STREAMED_TOOLTIP = "The same model, streamed."
ALL_IN_ONE = ("MODEL", "CLIP", "VAE")
ALL_IN_ONE_TOOLTIPS = (
    MODEL_TOOLTIP,
    "CLIP-L and T5-XXL of the file, for the prompt.",
    "The VAE of the file, to decode the picture.",
)

Input = tuple[Any, dict[str, Any]]
"""A type (or the values to choose from) and the options of an input, as ComfyUI wants them."""


def _count_input(kind: str) -> Input:
    tooltip = (
        f"How many of the model's {kind} blocks stay in VRAM. The others are streamed from RAM while the block before "
        "them computes. The picture is the same. -1: the budget decides. More than the model has: all of them stay. "
        f"Models without {kind} blocks ignore it."
    )
    return ("INT", {"default": -1, "min": -1, "max": _MOST_BLOCKS, "tooltip": tooltip})


def _old_count_input(kind: str, most: int, mib: int) -> Input:
    tooltip = (
        f"How many of Flux.1's {kind} blocks stay in VRAM (about {mib} MiB each in NF4). The others are streamed from "
        "RAM while the block before them computes. The picture is the same."
    )
    return ("INT", {"default": 7, "min": 0, "max": most, "tooltip": tooltip})


_MOST_BLOCKS = 100
"""More than a model has of one kind: HunyuanVideo 1.5 has 54 double blocks, FLUX.2 dev 48 single blocks."""

_OLD = "_cuda_size"
_OLD_FLUX1 = dict(zip(FLUX1.lists.items(), ((16, 122), (37, 61)), strict=True))
"""For each list of Flux.1's blocks: the most that the old nodes let stay, and MiB of a block in NF4."""

COUNTED = dict(FLUX1.lists)
OLD_COUNTED = {f"{blocks}{_OLD}": kind for blocks, kind in FLUX1.lists.items()}
"""Inputs that count blocks, and the kind of block that each counts."""

OLD_COUNTS = {
    f"{blocks}{_OLD}": _old_count_input(kind, most, mib) for (blocks, kind), (most, mib) in _OLD_FLUX1.items()
}


def budget_input(tooltip: str) -> dict[str, Input]:
    """The input ``vram_budget_gb``, in GiB."""
    options = {"default": 0.0, "min": 0.0, "max": 256.0, "step": 0.1, "tooltip": tooltip}
    return {"vram_budget_gb": ("FLOAT", options)}


RESIDENCY = {
    **budget_input(
        "VRAM for the model, in GiB. 0: all that is free, except for what ComfyUI reserves. The picture is the same "
        "with any budget. A smaller one is slower only if the bus is slower than the GPU."
    ),
    **{blocks: _count_input(kind) for blocks, kind in FLUX1.lists.items()},
}


@dataclass(frozen=True)
class PlannedNode:
    """The inputs that a node's plan depends on. A node class has it as ``PLAN``; the page sends them to get the plan.

    Attributes:
        folder: The models folder of ``file``.
        file: The input that names the file; None where the node gets a MODEL.
        counts: By kind of block, the input that says how many stay.
        budget: The input that gives GiB of VRAM; None where there is none.
    """

    folder: str | None = None
    file: str | None = None
    counts: Mapping[str, str] = field(default_factory=dict)
    budget: str | None = None


BY_BUDGET: dict[str, Any] = {
    "counts": {kind: given for given, kind in COUNTED.items()},
    "budget": "vram_budget_gb",
}
BY_OLD_COUNTS: dict[str, Any] = {"counts": {kind: given for given, kind in OLD_COUNTED.items()}}


def residency_of(vram_budget_gb: float = 0.0, **counts: int) -> Residency:
    """The residency that these inputs ask for. 0 GiB and counts of -1 leave it to the free VRAM."""
    kinds = COUNTED | OLD_COUNTED
    wanted = tuple((kinds[given], count) for given, count in counts.items() if count >= 0)
    return Residency(wanted, int(vram_budget_gb * GIB) or None)


def path_of(folder: str, name: str) -> Path:
    """Where the file ``name`` of a models folder is.

    Raises:
        FileNotFoundError: it is in none of the folder's places.
    """
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        folders = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"{name}: there is no such file in the {folder} folder ({folders}). Put it there, refresh the page (key R) "
            "and pick it in this node."
        )
    return Path(found)


def say_what_is_too_many(patcher: StreamedModelPatcher, residency: Residency) -> None:
    """Log the counts that ask for more blocks than the model has."""
    kinds = patcher.report().kinds
    for kind, count in residency.counts:
        depth = kinds.count(kind)
        if count and not depth:
            others = ", ".join(sorted(set(kinds)))
            logger.warning("NF4: this model has no %s blocks (it has: %s), so their count is ignored", kind, others)
        elif count > depth:
            logger.info("NF4: %d %s blocks requested, the model has %d: keeping all %d", count, kind, depth, depth)


def stream(model: Any, residency: Residency, node_id: str | None, compute: str | None = None) -> Any:
    """A clone of the MODEL that is streamed as ``residency`` says."""
    streaming = stream_model(model, residency, node_id)
    if isinstance(streaming, StreamedModelPatcher):
        say_what_is_too_many(streaming, residency)
        choose(streaming, compute)
    return streaming


class Loader:
    """Keeps what it loaded last, so that a run with other settings does not read the file again.

    ComfyUI keeps a node as long as it is in the graph, but drops its outputs before it runs the node with other inputs.
    """

    _kept: tuple[Any, Any] | None = None

    def once(self, key: Any, load: Callable[[], Any]) -> Any:
        """The result of ``load``; or the kept result, if it was loaded for an equal ``key``."""
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # first: there may be no room for both
        loaded = load()
        self._kept = None if _gives_outputs_up() else (key, loaded)
        return loaded

    def all_in_one(
        self, name: str, residency: Residency, node_id: str | None, compute: str | None = None
    ) -> tuple[Any, Any, Any]:
        """MODEL, CLIP and VAE of a 4-bit file in the folder ``checkpoints``."""
        catalogue = read_catalogue(path_of("checkpoints", name))
        require_all_in_one(catalogue)
        loaded = self.once(key_of(catalogue), lambda: load_all_in_one(catalogue))
        say_what_is_too_many(loaded.model, residency)
        return choose(streamed(loaded.model, residency, node_id), compute), loaded.clip, loaded.vae


def _gives_outputs_up() -> bool:
    """Whether ComfyUI drops cached outputs when RAM is short. If a node kept them, too, that would free nothing."""
    memory_management: Any = sys.modules.get("comfy.memory_management")
    if hasattr(memory_management, "extra_ram_release_callback"):
        return memory_management.extra_ram_release_callback is not None
    return bool(getattr(comfy.cli_args.args, "cache_ram", None))
