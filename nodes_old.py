"""Nodes of the package FluxExt-MZ that stream dense models, for graphs that were made with it."""

from pathlib import Path
from typing import Any, ClassVar

import folder_paths
import nodes as comfy_nodes

from .nf4_loader.checkpoint.errors import CheckpointError
from .nf4_loader.checkpoint.header import read_header
from .nf4_loader.checkpoint.quant_state import QUANT_STATE
from .nodes_shared import (
    ALL_IN_ONE,
    ALL_IN_ONE_TOOLTIPS,
    BY_OLD_COUNTS,
    CATEGORY,
    HIDDEN,
    OLD_COUNTED,
    OLD_COUNTS,
    STREAMED_TOOLTIP,
    Loader,
    PlannedNode,
    path_of,
    residency_of,
    stream,
)


class _OldNode:
    """A node of the package FluxExt-MZ that streams dense models."""

    CATEGORY = CATEGORY
    DEPRECATED = True
    PLAN: ClassVar = PlannedNode(**BY_OLD_COUNTS)
    SEARCH_ALIASES: ClassVar = ["fluxext", "mz", "partial load", "low vram"]
    DESCRIPTION = "For graphs made with the package FluxExt-MZ. In new graphs use Stream Model Blocks."


def _refuse_4_bits(path: Path, right: str) -> None:
    """Refuse a file that ComfyUI's own loader would misread: it takes packed shapes for the model's."""
    try:
        names = read_header(path).tensors if path.suffix == ".safetensors" else ()
    except CheckpointError:
        return  # ComfyUI's loader says what is wrong with the file
    if any(QUANT_STATE in name for name in names):
        raise CheckpointError(path, f"its weights are in 4 bits of bitsandbytes. Load it with {right}.")


class OldPartialLoad(_OldNode):
    """The node that old graphs know as ``MZ_Flux1PartialLoad_Patch``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "A Flux model in bf16, fp16, fp8 or 4 bits."}
        return {"required": {"model": ("MODEL", tooltip), **OLD_COUNTS}, "hidden": HIDDEN}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = (STREAMED_TOOLTIP,)
    FUNCTION = "stream"

    def stream(self, model: Any, unique_id: str | None = None, **counts: int) -> tuple[Any]:
        return (stream(model, residency_of(**counts), unique_id),)


class OldCheckpointLoader(_OldNode, Loader):
    """The node that old graphs know as ``MZ_Flux1CheckpointLoader_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "A dense Flux checkpoint (bf16, fp16 or fp8) with text encoders and VAE."}
        names = folder_paths.get_filename_list("checkpoints")
        return {"required": {"ckpt_name": (names, tooltip), **OLD_COUNTS}, "hidden": HIDDEN}

    RETURN_TYPES = ALL_IN_ONE
    OUTPUT_TOOLTIPS: ClassVar = ALL_IN_ONE_TOOLTIPS
    FUNCTION = "load_checkpoint"

    def load_checkpoint(self, ckpt_name: str, unique_id: str | None = None, **counts: int) -> tuple[Any, Any, Any]:
        path = path_of("checkpoints", ckpt_name)
        _refuse_4_bits(path, "'Load Flux NF4 (streamed)'")
        key = ckpt_name, path.stat().st_mtime_ns
        load = comfy_nodes.CheckpointLoaderSimple().load_checkpoint
        model, clip, vae = self.once(key, lambda: load(ckpt_name=ckpt_name))
        return stream(model, residency_of(**counts), unique_id), clip, vae


class OldUNETLoader(_OldNode, Loader):
    """The node that old graphs know as ``MZ_Flux1UnetLoader_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "As in ComfyUI's Load Diffusion Model."}
        inputs = {
            name: (values, tooltip) for name, (values, *_) in comfy_nodes.UNETLoader.INPUT_TYPES()["required"].items()
        }
        return {"required": {**inputs, **OLD_COUNTS}, "hidden": HIDDEN}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = (STREAMED_TOOLTIP,)
    FUNCTION = "load_unet"

    def load_unet(self, unique_id: str | None = None, **inputs: Any) -> tuple[Any]:
        counts = {name: inputs.pop(name) for name in OLD_COUNTED if name in inputs}
        path = path_of("diffusion_models", inputs["unet_name"])
        _refuse_4_bits(path, "'Load Flux NF4 UNet (streamed)'")
        key = inputs, path.stat().st_mtime_ns
        (model,) = self.once(key, lambda: comfy_nodes.UNETLoader().load_unet(**inputs))
        return (stream(model, residency_of(**counts), unique_id),)
