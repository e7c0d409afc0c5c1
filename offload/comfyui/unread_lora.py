"""Why ComfyUI has recognised none of a LoRA's keys, for a line in the log.

ComfyUI hands a model only what it has recognised. The names in the LoRA are looked up where they are still known: in
the functions of ComfyUI that are applying it.
"""

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

from ... import families

_FRAMES = 12
"""How far up from here ComfyUI's functions are, at most."""

_MAX_NAME = 200
"""Characters of a name that the log shows. Files hold any names; those of trainers are shorter."""

_FOR_ANOTHER_MODEL = (
    "LoRA: none of its keys belongs to this model, so the model stays as it is. Is the LoRA for a model of another "
    "family, or only for text encoders?"
)


def why_nothing_was_recognised() -> str:
    """The line for the log. Call it from ``add_patches`` of a patcher that got no patches."""
    for names, is_hook in _loras_being_applied(sys._getframe(1)):
        of_blocks = list(filter(_is_of_a_block, names))
        if of_blocks and is_hook and any(name.startswith("img_in.lora_") for name in names):
            return (
                f"LoRA: the hook read none of its keys ('{of_blocks[0]}'), so the model stays as it is. It is a Canny "
                "or Depth LoRA of Black Forest Labs, which only the node Load LoRA reads: use that."
            )
        if of_blocks:
            return (
                "LoRA: its keys are named as in a Flux LoRA, but in a layout that ComfyUI does not read "
                f"('{of_blocks[0]}'), so the model stays as it is. Rename them: 'diffusion_model.' before ComfyUI's "
                "names (double_blocks.0. ...), 'transformer.' before those of diffusers (transformer_blocks.0. ...), "
                "and nothing else there."
            )
    return _FOR_ANOTHER_MODEL


def _loras_being_applied(frame: FrameType | None) -> Iterator[tuple[list[str], bool]]:
    """Names in the LoRA of each function that applies one, and whether that is a hook."""
    for _ in range(_FRAMES):
        if frame is None:
            return
        local = frame.f_locals
        found = local.get("lora")
        weights = getattr(local.get("self"), "weights", None)
        for lora, is_hook in ((found, False), (weights, True)):
            if isinstance(lora, dict) and lora:
                yield _names_to_show(lora), is_hook
        frame = frame.f_back


def _is_of_a_block(name: str) -> bool:
    """Whether the name is of a tensor in a list of blocks, behind any prefix.

    Only the outermost list counts: in SD and SDXL, lists with these names are inside other lists.
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), 0)
    return first > 0 and parts[first - 1] in families.FLUX1.block_lists


def _names_to_show(names: Iterable[object]) -> list[str]:
    """Without those that a terminal would obey, which no trainer writes."""
    strings = [name for name in names if isinstance(name, str)]
    return [name for name in strings if name.isprintable() and len(name) <= _MAX_NAME]
