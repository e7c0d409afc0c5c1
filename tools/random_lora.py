"""LoRAs with random factors for a Flux model of ComfyUI: the same values for the same names, whoever makes them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

LoRA = dict[str, torch.Tensor]
"""What a LoRA file holds."""

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of Linears by their name in the model."""


def linear_shapes(model: Any, part: str = "blocks") -> Shapes:
    """Of every Linear of ``model`` (ComfyUI's, with its transformer in it) whose name contains ``part``.

    A state dict has the shapes of what is stored, which is packed in some formats: those of the layers count.
    """
    import comfy.utils

    names = [name for name in model.state_dict() if name.endswith(".weight") and part in name]
    shapes = {name: tuple(comfy.utils.get_attr(model, name).shape) for name in names}
    return {
        name.removeprefix("diffusion_model.").removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2
    }


def random(name: str, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """fp32 values of standard deviation ``scale``, the same for the same name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1009 + sum(shape))
    return torch.randn(shape, generator=generator) * scale


def low_rank(name: str, shape: tuple[int, int], rank: int = 4, seed: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, rank) and down (rank, in), which move a layer's output by about a tenth of what its input is."""
    up = random(f"{seed}{name}.up", shape[0], rank, scale=0.1)
    return up, random(f"{seed}{name}.down", rank, shape[1], scale=(rank * shape[1]) ** -0.5)


def kohya(shapes: Shapes, rank: int = 4, alpha: float = 2.0, seed: str = "") -> LoRA:
    """In the names of kohya's trainer."""
    file: LoRA = {}
    for name, shape in shapes.items():
        up, down = low_rank(name, shape, rank, seed)
        key = f"lora_unet_{name.replace('.', '_')}"
        file |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(alpha)}
    return file


def diffusers(config: Mapping[str, Any], shapes: Shapes, rank: int = 4, seed: str = "") -> LoRA:
    """In the names of diffusers: q, k, v and the MLP each have factors of their own. ``config`` is ComfyUI's."""
    return {
        f"transformer.{name}.lora_{half}.weight": factor
        for name, shape in of_diffusers(config, shapes)
        for half, factor in zip("BA", low_rank(name, shape, rank, seed), strict=True)
    }


def of_diffusers(config: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name in diffusers and (out, in) of every Linear, and of every part of one that diffusers splits.

    Newer ComfyUIs know the names of FLUX.2 beside those of Flux.1: what has a name already is not named again.
    """
    import comfy.utils

    named: dict[str, set[int]] = {}
    for name, target in comfy.utils.flux_to_diffusers(config).items():
        target, offset, *_ = (target, None) if isinstance(target, str) else target
        shape = shapes.get(target.removesuffix(".weight"))
        if shape is None or not name.endswith(".weight"):
            continue
        start, rows = offset[1:] if offset else (0, shape[0])
        own = named.setdefault(target, set())
        if own.isdisjoint((start, start + rows - 1)):
            own.update((start, start + rows - 1))
            yield name.removesuffix(".weight"), (rows, shape[1])
