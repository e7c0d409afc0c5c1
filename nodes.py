"""The ComfyUI nodes of today, and the table of all nodes."""

from typing import Any, ClassVar

import folder_paths

from .checkpoints import key_of, load_transformer, streamed
from .nf4_loader.checkpoint.catalogue import read_catalogue
from .nf4_loader.checkpoint.require import require_transformer
from .nf4_loader.models.text_encoders import load_dual_clip
from .nodes_compute import COMPUTE, EXACT, choose
from .nodes_old import OldCheckpointLoader, OldPartialLoad, OldUNETLoader
from .nodes_saving import FluxNF4QuantiseSave, QuantiseSaveTextEncoder
from .nodes_shared import (
    ALL_IN_ONE,
    ALL_IN_ONE_TOOLTIPS,
    BY_BUDGET,
    BY_OLD_COUNTS,
    CATEGORY,
    HIDDEN,
    OLD_COUNTS,
    RESIDENCY,
    STREAMED_TOOLTIP,
    Loader,
    PlannedNode,
    path_of,
    residency_of,
    say_what_is_too_many,
    stream,
)
from .nodes_text_encoders import Load4BitTextEncoderStreamed, StreamTextEncoder
from .offload.comfyui.encoders import leave_unpinned, leave_without_copies

_SETTINGS = RESIDENCY | COMPUTE


def _checkpoint_input() -> tuple[list[str], dict[str, str]]:
    tooltip = (
        "An all-in-one Flux checkpoint in NF4 or FP4, such as flux1-dev-bnb-nf4-v2.safetensors, in the folder "
        "models/checkpoints."
    )
    return (folder_paths.get_filename_list("checkpoints"), {"tooltip": tooltip})


class FluxNF4CheckpointLoader(Loader):
    """The node that old graphs know as ``MZ_Flux1CheckpointLoaderNF4_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": _checkpoint_input(), **OLD_COUNTS}, "hidden": HIDDEN}

    PLAN: ClassVar = PlannedNode("checkpoints", "ckpt_name", **BY_OLD_COUNTS)
    RETURN_TYPES = ALL_IN_ONE
    OUTPUT_TOOLTIPS: ClassVar = ALL_IN_ONE_TOOLTIPS
    FUNCTION = "load_checkpoint"
    CATEGORY = CATEGORY
    DEPRECATED = True
    SEARCH_ALIASES: ClassVar = ["nf4", "fp4", "bitsandbytes", "bnb", "low vram", "block swap", "offload"]
    DESCRIPTION = (
        "For graphs that have it already. In new ones use Load Flux NF4 (streamed), where there is nothing to set. "
        "Loads a Flux checkpoint in NF4 or FP4 and runs it on a GPU that cannot hold it. Some blocks stay in VRAM; the "
        "others are streamed from RAM while the block before them computes. 0 and 0 needs the least VRAM. More is "
        "faster only if the bus is slower than the GPU (small pictures, slow slots)."
    )

    def load_checkpoint(self, ckpt_name: str, unique_id: str | None = None, **counts: int) -> tuple[Any, Any, Any]:
        return self.all_in_one(ckpt_name, residency_of(**counts), unique_id)


class FluxNF4CheckpointLoaderStreamed(Loader):
    """An all-in-one file, with a budget in place of block counts."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": _checkpoint_input()}, "optional": _SETTINGS, "hidden": HIDDEN}

    PLAN: ClassVar = PlannedNode("checkpoints", "ckpt_name", **BY_BUDGET)
    RETURN_TYPES = ALL_IN_ONE
    OUTPUT_TOOLTIPS: ClassVar = ALL_IN_ONE_TOOLTIPS
    FUNCTION = "load_checkpoint"
    CATEGORY = CATEGORY
    SEARCH_ALIASES: ClassVar = FluxNF4CheckpointLoader.SEARCH_ALIASES
    DESCRIPTION = (
        "Loads a Flux checkpoint in NF4 or FP4 and runs it in the VRAM that is free, or within the budget. Blocks that "
        "do not fit are streamed from RAM while the block before them computes. The picture is the same."
    )

    def load_checkpoint(
        self,
        ckpt_name: str,
        vram_budget_gb: float = 0.0,
        compute: str = EXACT,
        unique_id: str | None = None,
        **counts: int,
    ) -> tuple[Any, Any, Any]:
        return self.all_in_one(ckpt_name, residency_of(vram_budget_gb, **counts), unique_id, compute)


class FluxNF4UNETLoaderStreamed(Loader):
    """The transformer of a file, which may hold nothing else."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "A transformer in NF4 or FP4 (Flux.1, FLUX.2, Chroma, Qwen-Image, Ideogram 4, Krea 2), in the folder "
            "models/diffusion_models (or models/unet)."
        )
        names = folder_paths.get_filename_list("diffusion_models")
        return {"required": {"unet_name": (names, {"tooltip": tooltip})}, "optional": _SETTINGS, "hidden": HIDDEN}

    PLAN: ClassVar = PlannedNode("diffusion_models", "unet_name", **BY_BUDGET)
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = ("The model, for a sampler.",)
    FUNCTION = "load_unet"
    CATEGORY = CATEGORY
    SEARCH_ALIASES: ClassVar = [
        *FluxNF4CheckpointLoader.SEARCH_ALIASES,
        *("diffusion model", "flux 2", "flux.2", "klein", "chroma", "qwen image", "ideogram 4", "krea 2"),
    ]
    DESCRIPTION = (
        "Loads a transformer in NF4 or FP4 from a file without text encoders and VAE: Flux.1, FLUX.2 (dev and klein), "
        "Chroma, Qwen-Image, Ideogram 4 or Krea 2. It takes the names of ComfyUI's model and those of diffusers (one "
        "file, or any one of its shards). It runs in the VRAM that is free, or within the budget."
    )

    def load_unet(
        self,
        unet_name: str,
        vram_budget_gb: float = 0.0,
        compute: str = EXACT,
        unique_id: str | None = None,
        **counts: int,
    ) -> tuple[Any]:
        catalogue = read_catalogue(path_of("diffusion_models", unet_name))
        require_transformer(catalogue)
        model = self.once(key_of(catalogue), lambda: load_transformer(catalogue))
        residency = residency_of(vram_budget_gb, **counts)
        say_what_is_too_many(model, residency)
        return (choose(streamed(model, residency, unique_id), compute),)


class StreamModelBlocks:
    """Streams any model that is built of blocks."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "Any model built of blocks (Flux, Qwen-Image, Wan, SD3 and many more) in any format of ComfyUI's own: "
            "bf16, fp16, fp8, INT8 ConvRot, W4A8, W4A4, MXFP8, NVFP4. LoRAs may come before or after this node; bypass "
            "LoRAs and torch.compile come after it."
        )
        return {"required": {"model": ("MODEL", {"tooltip": tooltip})}, "optional": _SETTINGS, "hidden": HIDDEN}

    PLAN: ClassVar = PlannedNode(**BY_BUDGET)
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = (STREAMED_TOOLTIP,)
    FUNCTION = "stream"
    CATEGORY = CATEGORY
    SEARCH_ALIASES: ClassVar = [
        *("low vram", "block swap", "offload", "out of memory"),
        *("fp8", "int8", "convrot", "w4a8", "w4a4", "mxfp8", "nvfp4"),
    ]
    DESCRIPTION = (
        "Runs any model that is built of blocks, in any format of ComfyUI's own, in the VRAM that is free, or within "
        "the budget. Blocks that do not fit are streamed from RAM while the block before them computes. The picture is "
        "the same. On a model that is already streamed it changes the settings."
    )

    def stream(
        self,
        model: Any,
        vram_budget_gb: float = 0.0,
        compute: str = EXACT,
        unique_id: str | None = None,
        **counts: int,
    ) -> tuple[Any]:
        return (stream(model, residency_of(vram_budget_gb, **counts), unique_id, compute),)


class FluxNF4DualCLIPLoader:
    """Loads CLIP-L and T5, each of them dense or in 4 bits."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = folder_paths.get_filename_list("text_encoders")
        tooltip = "CLIP-L or T5-XXL, in either order, from the folder models/text_encoders: dense, or in NF4 or FP4."
        return {"required": {f"clip_name{number}": (files, {"tooltip": tooltip}) for number in (1, 2)}}

    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS: ClassVar = ("CLIP-L and T5-XXL, for the prompt.",)
    FUNCTION = "load_clip"
    CATEGORY = CATEGORY
    SEARCH_ALIASES: ClassVar = ["t5", "nf4", "text encoder", "bitsandbytes"]
    DESCRIPTION = (
        "Loads the two text encoders of Flux. A 4-bit T5, as transformers and bitsandbytes save it, stays in 4 bits: "
        "3 GB of memory instead of 10. If it is in shards, pick any one of them."
    )

    def load_clip(self, clip_name1: str, clip_name2: str) -> tuple[Any]:
        paths = [path_of("text_encoders", name) for name in (clip_name1, clip_name2)]
        clip = load_dual_clip(paths, folder_paths.get_folder_paths("embeddings"))
        leave_without_copies(clip.patcher)
        leave_unpinned(clip.patcher)
        return (clip,)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "FluxNF4CheckpointLoaderStreamed": FluxNF4CheckpointLoaderStreamed,
    "FluxNF4UNETLoaderStreamed": FluxNF4UNETLoaderStreamed,
    "FluxNF4DualCLIPLoader": FluxNF4DualCLIPLoader,
    "StreamModelBlocks": StreamModelBlocks,
    "Load4BitTextEncoderStreamed": Load4BitTextEncoderStreamed,
    "StreamTextEncoder": StreamTextEncoder,
    "FluxNF4QuantiseSave": FluxNF4QuantiseSave,
    "QuantiseSaveTextEncoder": QuantiseSaveTextEncoder,
    "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload": FluxNF4CheckpointLoader,
    "MZ_Flux1PartialLoad_Patch": OldPartialLoad,
    "MZ_Flux1CheckpointLoader_cpuDynOffload": OldCheckpointLoader,
    "MZ_Flux1UnetLoader_cpuDynOffload": OldUNETLoader,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FluxNF4CheckpointLoaderStreamed": "Load Flux NF4 (streamed)",
    "FluxNF4UNETLoaderStreamed": "Load Flux NF4 UNet (streamed)",
    "FluxNF4DualCLIPLoader": "Load Flux NF4 Dual CLIP",
    "StreamModelBlocks": "Stream Model Blocks",
    "Load4BitTextEncoderStreamed": "Load 4-bit Text Encoder (streamed)",
    "StreamTextEncoder": "Stream Text Encoder",
    "FluxNF4QuantiseSave": "Quantise Flux to NF4 and Save",
    "QuantiseSaveTextEncoder": "Quantise Text Encoder to NF4 and Save",
    "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload": "Load Flux NF4 Checkpoint (old)",
    "MZ_Flux1PartialLoad_Patch": "Stream Flux Blocks (old)",
    "MZ_Flux1CheckpointLoader_cpuDynOffload": "Load Flux Checkpoint (old)",
    "MZ_Flux1UnetLoader_cpuDynOffload": "Load Flux UNet (old)",
}
"""Nodes that are only for existing graphs come last."""
