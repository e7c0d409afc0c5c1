"""How to recognise a model that a node for torch.compile has compiled."""

from collections.abc import Iterable
from typing import Any

from ..block import Block


def is_compiled(patcher: Any, blocks: Iterable[Block]) -> bool:
    """Whether a node has the model of ``patcher`` or some of its ``blocks`` run through torch.compile."""
    return (
        any("torch.compile" in keyed for keyed in patcher.wrappers.values())
        or any(type(patch).__name__ == "OptimizedModule" for patch in patcher.object_patches.values())
        or any(block.module._compiled_call_impl is not None for block in blocks)
    )
