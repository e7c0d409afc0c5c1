"""The families of models that this package knows, in one table. Nothing else knows the names of their blocks.

To add a family, add a `Family` to `FAMILIES`: what ComfyUI calls it, its lists of blocks, and a `Layout` for each way
in which tools name its tensors. Loader, plan, bar and streaming read it from here. Knows neither torch nor ComfyUI.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .family import BlockTensor, Family, Layers, Layout, Modulation, Place, Shapes
from .flux import CHROMA, FLUX1, FLUX2, HUNYUAN_VIDEO
from .ideogram import IDEOGRAM4
from .krea import KREA2
from .qwen_image import QWEN_IMAGE

__all__ = [
    "CHECKPOINT_PREFIX",
    "FAMILIES",
    "FLUX1",
    "BlockTensor",
    "Family",
    "Found",
    "Layers",
    "Layout",
    "Modulation",
    "Place",
    "Shapes",
    "detect",
    "family_of_model",
    "kind_of",
    "names",
    "prefix_not_read",
]

FAMILIES: tuple[Family, ...] = (CHROMA, FLUX2, HUNYUAN_VIDEO, FLUX1, IDEOGRAM4, KREA2, QWEN_IMAGE)
"""A family comes before those whose marks its files have, too: a Chroma file has all the marks of a Flux.1 file."""

CHECKPOINT_PREFIX = "model.diffusion_model."
"""Prefix of the transformer's names in a file that also holds text encoders and a VAE."""

_PREFIXES = (CHECKPOINT_PREFIX, "diffusion_model.", "model.", "transformer.", "")


@dataclass(frozen=True)
class Found:
    """The transformer in a file: the prefix of its names, its family, and the layout of its names."""

    prefix: str
    family: Family
    layout: Layout

    def place(self, name: str) -> Place:
        """Where the tensor that the file calls ``name`` goes in ComfyUI's model."""
        return self.family.place(self.layout, name.removeprefix(self.prefix))


def detect(tensors: Iterable[str]) -> Found | None:
    """The transformer to which these names of tensors belong; None if it is of no known family."""
    ordered = sorted(tensors)
    for prefix in _PREFIXES:
        for family in FAMILIES:
            for layout in family.layouts:
                if all(_any_begins(ordered, prefix + mark) for mark in layout.marks):
                    return Found(prefix, family, layout)
    return None


def prefix_not_read(tensors: Iterable[str]) -> tuple[str, Family] | None:
    """For a file whose names have a prefix that `detect` does not know: that prefix, and the family of the names."""
    ordered = sorted(tensors)
    for family in FAMILIES:
        for layout in family.layouts:
            first = f".{layout.marks[0]}"
            for prefix in sorted({name[: name.find(first) + 1] for name in ordered} - {""}):
                if all(_any_begins(ordered, prefix + mark) for mark in layout.marks):
                    return prefix, family
    return None


def family_of_model(image_model: object) -> Family | None:
    """The family that ComfyUI's detection calls ``image_model``; None if this package does not load its files."""
    return next((family for family in FAMILIES if family.native.is_read and image_model in family.image_models), None)


def kind_of(blocks: str, image_model: object) -> str:
    """The kind of the blocks in the list ``blocks`` of a model.

    A model of no known family gets it from the first family that has a list of this name. If no family has one, the
    kind is the list's name.
    """
    own = (family for family in FAMILIES if image_model in family.image_models)
    return next((family.lists[blocks] for family in (*own, *FAMILIES) if blocks in family.lists), blocks)


def names() -> str:
    """The names of the families whose files can be loaded, for messages."""
    *others, last = sorted(family.name for family in FAMILIES if family.native.is_read)
    return f"{', '.join(others)} or {last}" if others else last


def _any_begins(ordered: Sequence[str], beginning: str) -> bool:
    index = bisect_left(ordered, beginning)
    return index < len(ordered) and ordered[index].startswith(beginning)
