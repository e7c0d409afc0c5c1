"""This package: some blocks stay, the others are streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import Case
from comfy_model import ComfyModel, at_work
from family import Unavailable


def load(path: Path) -> Any:
    """The transformer of ``path`` as the nodes load it."""
    from flux_nf4.checkpoints import load_transformer, streamed
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.offload.plan import Residency

    return streamed(load_transformer(read_catalogue(path)), Residency(), node_id=None)


@contextmanager
def read_into_an_arena() -> Iterator[None]:
    """What is loaded meanwhile does not stay in its file."""
    import flux_nf4.checkpoints

    checkpoints: Any = flux_nf4.checkpoints
    before, checkpoints.why_not_pinned = checkpoints.why_not_pinned, lambda *_: "the benchmark wants an arena"
    try:
        yield
    finally:
        checkpoints.why_not_pinned = before


def host_bytes_of_first_block(patcher: Any) -> torch.Tensor:
    """The largest piece of host memory that is copied for it."""
    streamer = patcher.model.streaming.streamer
    return max((streamer.arena.records[0], *streamer.file.tensors[0]), key=lambda tensor: tensor.nbytes)


def with_residency(
    patcher: Any, double: int | None = None, single: int | None = None, budget_gib: float | None = None
) -> Any:
    """A clone that keeps so many blocks of each kind on the device; None: as many as there is budget or room for."""
    from flux_nf4.offload.plan import Residency

    clone = patcher.clone()
    wanted = (("double", double), ("single", single))
    counts = tuple((kind, count) for kind, count in wanted if count is not None)
    clone.residency = Residency(counts, None if budget_gib is None else int(budget_gib * 2**30))
    return clone


class Streamed:
    """One model in host memory; a setting is "double/single" blocks that stay, or "auto", and may end in "compiled", or
    in "int8": then Linears compute in int8 where that is faster."""

    def __init__(self, path: Path) -> None:
        self._patcher = load(path)

    @contextmanager
    def at_work(self, setting: str, case: Case) -> Iterator[ComfyModel]:
        residency, *rest = setting.split()
        counts = [] if residency == "auto" else [int(count) for count in residency.split("/")]
        patcher = with_residency(self._patcher, *counts)
        if "int8" in rest:
            from flux_nf4.nodes_compute import choose

            choose(patcher, "int8 where faster")
        if "compiled" in rest:
            if case.bus_gbps:
                raise Unavailable("blocks cannot be compiled while copies are padded")
            compile_blocks(patcher)
        with at_work(patcher, case) as model:
            yield model


def compile_blocks(patcher: Any) -> None:
    """Compile each block by itself, as ComfyUI's own helper does it for node packs."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    transformer = patcher.model.diffusion_model
    kinds = {"double_blocks": transformer.double_blocks, "single_blocks": transformer.single_blocks}
    keys = [f"diffusion_model.{kind}.{i}" for kind, blocks in kinds.items() for i in range(len(blocks))]
    backend = "inductor" if patcher.load_device.type == "cuda" else "eager"
    set_torch_compile_wrapper(model=patcher, backend=backend, keys=keys)
