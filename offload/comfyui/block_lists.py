"""Finds the blocks of a model of ComfyUI's: the lists of modules that a forward runs one after the other."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_VISION = re.compile(r"\.(visual|vision\w*)\.")
_LISTS = (nn.ModuleList, nn.ModuleDict)

_LEAST_PART = 0.5
"""The least share of a transformer's weights in its blocks. With less, streaming them would gain little."""


def lists_of_blocks(model: Any) -> dict[str, list[nn.Module]]:
    """The model's blocks by the name of their list, in order of registration, which is that of use.

    These are the lists that the transformer itself has; where most of its weights are elsewhere, also those of its
    parts (Stable Audio has all blocks in ``transformer.layers``).
    """
    transformer = model.diffusion_model
    for is_deep in (False, True):
        lists = dict(_lists_in(transformer, is_deep))
        in_blocks = sum(_count(block) for blocks in lists.values() for block in blocks)
        if lists and in_blocks >= _count(transformer) * _LEAST_PART:
            return lists
    raise ValueError(
        f"a {type(model).__name__} is not built of blocks one after the other, so its blocks cannot be streamed. "
        "Take this node out: ComfyUI moves such a model's parts by itself where VRAM is short."
    )


def _lists_in(module: nn.Module, is_deep: bool, prefix: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    for name, child in module.named_children():
        if not isinstance(child, _LISTS):
            yield from _lists_in(child, is_deep, f"{prefix}{name}.") if is_deep else ()
        elif blocks := list(_blocks_in(child)):
            yield prefix + name, blocks


def _blocks_in(blocks: nn.Module) -> Iterator[nn.Module]:
    """The blocks with weights, also those in lists of lists (Stable Cascade has one list for each resolution)."""
    for block in blocks.children():
        if isinstance(block, _LISTS):
            yield from _blocks_in(block)
        elif _count(block):
            yield block


def _count(module: nn.Module) -> int:
    """The number of weights, whatever bytes each takes."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def lists_of_encoders(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers of the text encoders ``model`` (``CLIP.cond_stage_model``) by what they are called in a plan.

    They are called ``text``, and ``vision`` if they see pictures; of several encoders each is called by its name
    (``t5xxl``).
    """
    found = list(_lists_in(model, is_deep=True))
    is_one = len({path.split(".")[0] for path, _ in found}) == 1
    lists: dict[str, list[nn.Module]] = {}
    for path, blocks in found:
        own = path.split(".")[0]
        names = ("text", "vision") if is_one else (own, f"{own} vision")
        lists.setdefault(names[bool(_VISION.search(path))], []).extend(blocks)
    if not lists:
        raise ValueError(
            f"a {type(model).__name__} is not built of layers one after the other, so they cannot be streamed. Take "
            "this node out: ComfyUI moves such a text encoder's parts by itself where VRAM is short."
        )
    return lists
