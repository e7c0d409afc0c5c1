"""How to recognise a model that a node for torch.compile has compiled."""

from typing import Any

from .own_model import blocks_of


def is_compiled(patcher: Any) -> bool:
    """Whether a node has the streamed model of ``patcher``, or blocks of it, run through torch.compile."""
    return (
        any("torch.compile" in keyed for keyed in patcher.wrappers.values())
        or any(type(patch).__name__ == "OptimizedModule" for patch in patcher.object_patches.values())
        or any(block._compiled_call_impl is not None for block in blocks_of(patcher.model))
    )
