"""The ComfyUI nodes."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import comfy.cli_args
import comfy.model_management
import comfy.utils
import folder_paths
import nodes as comfy_nodes
import torch

from .checkpoints import key_of, load_all_in_one, load_transformer, streamed
from .nf4_loader.checkpoint.catalogue import Catalogue, read_catalogue, require_all_in_one, require_transformer
from .nf4_loader.checkpoint.errors import CheckpointError
from .nf4_loader.checkpoint.header import read_header
from .nf4_loader.checkpoint.quant_state import QuantType
from .nf4_loader.models.text_encoders import load_dual_clip
from .nf4_loader.saving.model_sources import sources_of_encoders, sources_of_model
from .nf4_loader.saving.quantise import QuantSettings
from .nf4_loader.saving.save import layer_patterns, save_quantised
from .offload.comfyui.adopt import stream_model
from .offload.comfyui.encoders import leave_unpinned, leave_without_copies
from .offload.comfyui.patcher import StreamedModelPatcher
from .offload.comfyui.streaming import Residency

logger = logging.getLogger(__name__)

_GIB = 1024**3

_HIDDEN = {"unique_id": "UNIQUE_ID"}


def _count_input(kind: str, most: int, mib: int, default: int = 7, least: int = 0) -> tuple[str, dict[str, Any]]:
    tooltip = (
        f"How many of the {kind} blocks stay in VRAM (about {mib} MiB each in NF4). The others are streamed from RAM "
        "while the block before them computes. The picture is the same."
    )
    if least < 0:
        tooltip += " -1: as the budget allows."
    return ("INT", {"default": default, "min": least, "max": most, "tooltip": tooltip})


_OLD_COUNTS = {
    "double_blocks_cuda_size": _count_input("double", 16, 182),
    "single_blocks_cuda_size": _count_input("single", 37, 76),
}

_RESIDENCY = {
    "vram_budget_gb": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 256.0,
            "step": 0.1,
            "tooltip": "VRAM for the model, in GiB. 0: as much as fits beside ComfyUI's reserve. The picture is the "
            "same with any budget; less is slower only where the bus is slower than the GPU.",
        },
    ),
    "double_blocks": _count_input("double", 19, 182, default=-1, least=-1),
    "single_blocks": _count_input("single", 38, 76, default=-1, least=-1),
}


def _residency(budget_gb: float = 0.0, double: int = -1, single: int = -1) -> Residency:
    counts = tuple((kind, count) for kind, count in (("double", double), ("single", single)) if count >= 0)
    return Residency(counts, int(budget_gb * _GIB) or None)


def _path(folder: str, name: str) -> Path:
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        folders = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"{name}: there is no such file in the {folder} folder ({folders}). Put it there, refresh the page (key R) "
            "and pick it in this node."
        )
    return Path(found)


def _say_what_is_too_many(patcher: Any, residency: Residency) -> None:
    kinds = patcher.report().kinds
    for kind, count in residency.counts:
        depth = kinds.count(kind)
        if count and not depth:
            others = ", ".join(sorted(set(kinds)))
            logger.warning("NF4: the model has no %s blocks, but %s: only the budget is for these", kind, others)
        elif count > depth:
            logger.info("NF4: %d %s blocks shall stay; the model has %d: all of them do", count, kind, depth)


def _stream(model: Any, residency: Residency, node_id: str | None) -> Any:
    streaming = stream_model(model, residency, node_id)
    if isinstance(streaming, StreamedModelPatcher):
        _say_what_is_too_many(streaming, residency)
    return streaming


class _Loader:
    """Keeps what it has loaded until it loads something else, so that changed settings read nothing again.

    ComfyUI keeps a node as long as it is in the graph, but lets go of its outputs before it runs with changed inputs.
    """

    _kept: tuple[Any, Any] | None = None

    def _once(self, key: Any, load: Callable[[], Any]) -> Any:
        """What ``load`` gives, or gave when it was last called if that was for an equal ``key``."""
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # first: there may be no room for both
        loaded = load()
        self._kept = None if _gives_outputs_up() else (key, loaded)
        return loaded

    def _all_in_one(self, name: str, residency: Residency, node_id: str | None) -> tuple[Any, Any, Any]:
        catalogue = read_catalogue(_path("checkpoints", name))
        require_all_in_one(catalogue)
        loaded = self._once(key_of(catalogue), lambda: load_all_in_one(catalogue))
        _say_what_is_too_many(loaded.model, residency)
        return streamed(loaded.model, residency, node_id), loaded.clip, loaded.vae


def _gives_outputs_up() -> bool:
    """Whether ComfyUI caches outputs until RAM is short: then nothing here may keep them as well."""
    memory_management: Any = sys.modules.get("comfy.memory_management")
    if hasattr(memory_management, "extra_ram_release_callback"):
        return memory_management.extra_ram_release_callback is not None
    return bool(getattr(comfy.cli_args.args, "cache_ram", None))


class FluxNF4CheckpointLoader(_Loader):
    """The node that old graphs know as ``MZ_Flux1CheckpointLoaderNF4_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": _checkpoint_input(), **_OLD_COUNTS}, "hidden": _HIDDEN}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS: ClassVar = (
        "The Flux model, for a sampler.",
        "CLIP-L and T5-XXL of the file, for the prompt.",
        "The VAE of the file, to decode the picture.",
    )
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders/flux nf4"
    SEARCH_ALIASES: ClassVar = ["nf4", "fp4", "bitsandbytes", "bnb", "low vram", "block swap", "offload"]
    DESCRIPTION = (
        "Loads a Flux checkpoint in NF4 or FP4 and runs it on a GPU that cannot hold it: some blocks stay in VRAM, the "
        "others are streamed from RAM while the one before them computes. 0 and 0 needs the least VRAM; more only "
        "matters where the bus is slower than the GPU (small pictures, slow slots)."
    )

    def load_checkpoint(
        self,
        ckpt_name: str,
        double_blocks_cuda_size: int = 7,
        single_blocks_cuda_size: int = 7,
        unique_id: str | None = None,
    ) -> tuple[Any, Any, Any]:
        residency = _residency(double=double_blocks_cuda_size, single=single_blocks_cuda_size)
        return self._all_in_one(ckpt_name, residency, unique_id)


def _checkpoint_input() -> tuple[list[str], dict[str, str]]:
    tooltip = (
        "An all-in-one Flux checkpoint in NF4 or FP4, such as flux1-dev-bnb-nf4-v2.safetensors, in the folder "
        "models/checkpoints."
    )
    return (folder_paths.get_filename_list("checkpoints"), {"tooltip": tooltip})


class FluxNF4CheckpointLoaderStreamed(_Loader):
    """An all-in-one file, with a budget in place of block counts."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": _checkpoint_input()}, "optional": _RESIDENCY, "hidden": _HIDDEN}

    RETURN_TYPES = FluxNF4CheckpointLoader.RETURN_TYPES
    OUTPUT_TOOLTIPS: ClassVar = FluxNF4CheckpointLoader.OUTPUT_TOOLTIPS
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders/flux nf4"
    SEARCH_ALIASES: ClassVar = FluxNF4CheckpointLoader.SEARCH_ALIASES
    DESCRIPTION = (
        "Loads a Flux checkpoint in NF4 or FP4 and runs it in as much VRAM as there is, or as the budget says: what "
        "does not fit is streamed from RAM while the block before it computes. The picture is the same."
    )

    def load_checkpoint(
        self,
        ckpt_name: str,
        vram_budget_gb: float = 0.0,
        double_blocks: int = -1,
        single_blocks: int = -1,
        unique_id: str | None = None,
    ) -> tuple[Any, Any, Any]:
        return self._all_in_one(ckpt_name, _residency(vram_budget_gb, double_blocks, single_blocks), unique_id)


class FluxNF4UNETLoaderStreamed(_Loader):
    """A file that has the transformer alone, or whose transformer alone is wanted."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A Flux transformer in NF4 or FP4, in the folder models/diffusion_models (or models/unet)."
        names = folder_paths.get_filename_list("diffusion_models")
        return {"required": {"unet_name": (names, {"tooltip": tooltip})}, "optional": _RESIDENCY, "hidden": _HIDDEN}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = ("The Flux model, for a sampler.",)
    FUNCTION = "load_unet"
    CATEGORY = "loaders/flux nf4"
    SEARCH_ALIASES: ClassVar = [*FluxNF4CheckpointLoader.SEARCH_ALIASES, "diffusion model"]
    DESCRIPTION = (
        "Loads a Flux transformer in NF4 or FP4 that comes without text encoders and VAE, in any layout: lllyasviel's, "
        "InvokeAI's, diffusers' (one file, or any of its shards). It runs in as much VRAM as there is, or as the "
        "budget says."
    )

    def load_unet(
        self,
        unet_name: str,
        vram_budget_gb: float = 0.0,
        double_blocks: int = -1,
        single_blocks: int = -1,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        catalogue = read_catalogue(_path("diffusion_models", unet_name))
        require_transformer(catalogue)
        model = self._once(key_of(catalogue), lambda: load_transformer(catalogue))
        residency = _residency(vram_budget_gb, double_blocks, single_blocks)
        _say_what_is_too_many(model, residency)
        return (streamed(model, residency, unique_id),)


class StreamModelBlocks:
    """Streams any model that is built of blocks."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "A model built of blocks (Flux, Chroma and others), in bf16, fp16 or fp8; before LoRAs or after them, "
            "before bypass LoRAs and torch.compile."
        )
        return {"required": {"model": ("MODEL", {"tooltip": tooltip})}, "optional": _RESIDENCY, "hidden": _HIDDEN}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = ("The same model, streamed.",)
    FUNCTION = "stream"
    CATEGORY = "loaders/flux nf4"
    SEARCH_ALIASES: ClassVar = ["low vram", "block swap", "offload", "fp8"]
    DESCRIPTION = (
        "Runs a model in as much VRAM as there is, or as the budget says: blocks that do not fit are streamed from RAM "
        "while the one before them computes. On a model that is streamed already it changes the settings."
    )

    def stream(
        self,
        model: Any,
        vram_budget_gb: float = 0.0,
        double_blocks: int = -1,
        single_blocks: int = -1,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        return (_stream(model, _residency(vram_budget_gb, double_blocks, single_blocks), unique_id),)


class _OldNode:
    """A node of the package FluxExt-MZ that streams dense models."""

    CATEGORY = "loaders/flux nf4"
    SEARCH_ALIASES: ClassVar = ["fluxext", "mz", "partial load", "low vram"]
    DESCRIPTION = "For graphs that were made with the package FluxExt-MZ. In new ones use Stream Model Blocks."


def _refuse_4_bits(path: Path, right: str) -> None:
    """ComfyUI's own loader would take packed shapes for the model's, and fail far from here."""
    try:
        names = read_header(path).tensors if path.suffix == ".safetensors" else ()
    except CheckpointError:
        return  # what ComfyUI reads is its own matter
    if any(".quant_state.bitsandbytes__" in name for name in names):
        raise CheckpointError(path, f"its weights are in 4 bits of bitsandbytes. Load it with {right}.")


class OldPartialLoad(_OldNode):
    """The node that old graphs know as ``MZ_Flux1PartialLoad_Patch``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "A Flux model in bf16, fp16, fp8 or 4 bits."}
        return {"required": {"model": ("MODEL", tooltip), **_OLD_COUNTS}, "hidden": _HIDDEN}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = StreamModelBlocks.OUTPUT_TOOLTIPS
    FUNCTION = "stream"

    def stream(
        self,
        model: Any,
        double_blocks_cuda_size: int = 7,
        single_blocks_cuda_size: int = 7,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        residency = _residency(double=double_blocks_cuda_size, single=single_blocks_cuda_size)
        return (_stream(model, residency, unique_id),)


class OldCheckpointLoader(_OldNode, _Loader):
    """The node that old graphs know as ``MZ_Flux1CheckpointLoader_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "A dense Flux checkpoint (bf16, fp16 or fp8) with text encoders and VAE."}
        names = folder_paths.get_filename_list("checkpoints")
        return {"required": {"ckpt_name": (names, tooltip), **_OLD_COUNTS}, "hidden": _HIDDEN}

    RETURN_TYPES = FluxNF4CheckpointLoader.RETURN_TYPES
    OUTPUT_TOOLTIPS: ClassVar = FluxNF4CheckpointLoader.OUTPUT_TOOLTIPS
    FUNCTION = "load_checkpoint"

    def load_checkpoint(
        self,
        ckpt_name: str,
        double_blocks_cuda_size: int = 7,
        single_blocks_cuda_size: int = 7,
        unique_id: str | None = None,
    ) -> tuple[Any, Any, Any]:
        path = _path("checkpoints", ckpt_name)
        _refuse_4_bits(path, "'Load Flux NF4 (streamed)'")
        key = ckpt_name, path.stat().st_mtime_ns
        load = comfy_nodes.CheckpointLoaderSimple().load_checkpoint
        model, clip, vae = self._once(key, lambda: load(ckpt_name=ckpt_name))
        residency = _residency(double=double_blocks_cuda_size, single=single_blocks_cuda_size)
        return _stream(model, residency, unique_id), clip, vae


class OldUNETLoader(_OldNode, _Loader):
    """The node that old graphs know as ``MZ_Flux1UnetLoader_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = {"tooltip": "As in ComfyUI's Load Diffusion Model."}
        inputs = {
            name: (values, tooltip) for name, (values, *_) in comfy_nodes.UNETLoader.INPUT_TYPES()["required"].items()
        }
        return {"required": {**inputs, **_OLD_COUNTS}, "hidden": _HIDDEN}

    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS: ClassVar = StreamModelBlocks.OUTPUT_TOOLTIPS
    FUNCTION = "load_unet"

    def load_unet(
        self,
        double_blocks_cuda_size: int = 7,
        single_blocks_cuda_size: int = 7,
        unique_id: str | None = None,
        **loader: Any,
    ) -> tuple[Any]:
        path = _path("diffusion_models", loader["unet_name"])
        _refuse_4_bits(path, "'Load Flux NF4 UNet (streamed)'")
        key = loader, path.stat().st_mtime_ns
        (model,) = self._once(key, lambda: comfy_nodes.UNETLoader().load_unet(**loader))
        residency = _residency(double=double_blocks_cuda_size, single=single_blocks_cuda_size)
        return (_stream(model, residency, unique_id),)


class FluxNF4QuantiseSave:
    """Makes an NF4 or FP4 file of any Flux MODEL."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A Flux model, dense, fp8, GGUF or 4-bit. LoRAs on it are merged."}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "diffusion_models/flux1-nf4",
                        "tooltip": "The name of the file, to which a number is added; folders may stand before it. "
                        "ComfyUI finds models in output/diffusion_models and output/checkpoints.",
                    },
                ),
                "folder": (
                    ["output", "diffusion_models", "checkpoints"],
                    {"tooltip": "ComfyUI's output folder, or the first folder of that kind of models."},
                ),
                "quant_type": (["nf4", "fp4"], {"tooltip": "NF4 is the more exact for weights of a model."}),
                "absmax": (
                    ["fp32", "nested"],
                    {"tooltip": "fp32: as in v2 files, more exact. nested: as in v1 files, 8 % smaller."},
                ),
                "keep_dense": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Layers whose weights are dense in the file, with commas between them, such as: "
                        "img_in, final_layer.*, double_blocks.0.*",
                    },
                ),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "With VAE: make an all-in-one file, with these text encoders."}),
                "vae": ("VAE", {"tooltip": "With CLIP: make an all-in-one file, with this VAE."}),
            },
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    CATEGORY = "advanced/model_merging/flux nf4"
    SEARCH_ALIASES: ClassVar = ["quantize", "nf4", "fp4", "bitsandbytes", "convert", "merge lora"]
    DESCRIPTION = (
        "Quantises a Flux model to NF4 or FP4, layer by layer, and saves it: the transformer alone, or with CLIP and "
        "VAE as an all-in-one file. 4-bit weights of a file that have no LoRA keep their values if they are of the "
        "type that is saved (fp32 absmax that is nested changes a little); those of the other type are quantised "
        "again, and the log says so."
    )

    def save(
        self,
        model: Any,
        filename_prefix: str,
        folder: str,
        quant_type: QuantType,
        absmax: str,
        keep_dense: str,
        clip: Any = None,
        vae: Any = None,
    ) -> dict[str, Any]:
        root = folder_paths.get_output_directory() if folder == "output" else folder_paths.get_folder_paths(folder)[0]
        place, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, root)
        path = Path(place, f"{name}_{counter:05}_.safetensors")
        if model.model.model_config.unet_config.get("image_model") != "flux":
            raise CheckpointError(
                path, f"the model is a {type(model.model).__name__}, and only Flux.1 can be saved here."
            )
        if (clip is None) != (vae is None):
            raise CheckpointError(path, "connect both CLIP and VAE for an all-in-one file, or neither.")
        device = comfy.model_management.get_torch_device()
        comfy.model_management.free_memory(_GIB, device)  # first: what a source holds stays where it is
        sources = sources_of_model(model) + (sources_of_encoders(clip, vae) if clip is not None else [])
        progress = comfy.utils.ProgressBar(sum(torch.Size(source.shape).numel() for source in sources))
        save_quantised(
            path,
            sources,
            QuantSettings(quant_type, nested=absmax == "nested"),
            prefix="model.diffusion_model." if clip is not None else "",
            keep_dense=layer_patterns(keep_dense),
            metadata=_origin(model),
            device=device,
            progress=progress.update,
        )
        logger.info("NF4: saved %s (%.2f GiB)", path, path.stat().st_size / _GIB)
        return {"ui": {"text": [str(path)]}}


def _origin(model: Any) -> dict[str, str]:
    catalogue: Catalogue | None = getattr(model.model, "nf4_catalogue", None)
    source = catalogue.path.name if catalogue else type(model.model).__name__
    return {"flux_nf4.source": source, "flux_nf4.patched_weights": str(len(model.patches))}


class FluxNF4DualCLIPLoader:
    """Loads CLIP-L and T5, each of them dense or in 4 bits."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = folder_paths.get_filename_list("text_encoders")
        tooltip = "CLIP-L or T5-XXL, in any order, of the folder models/text_encoders: dense, or in NF4 or FP4."
        return {"required": {f"clip_name{number}": (files, {"tooltip": tooltip}) for number in (1, 2)}}

    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS: ClassVar = ("CLIP-L and T5-XXL, for the prompt.",)
    FUNCTION = "load_clip"
    CATEGORY = "loaders/flux nf4"
    SEARCH_ALIASES: ClassVar = ["t5", "nf4", "text encoder", "bitsandbytes"]
    DESCRIPTION = (
        "Loads the two text encoders of Flux. A T5 in 4 bits, as transformers and bitsandbytes save it, stays so: "
        "3 GB of memory in place of 10. One that is in shards is loaded by any one of them."
    )

    def load_clip(self, clip_name1: str, clip_name2: str) -> tuple[Any]:
        paths = [Path(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in (clip_name1, clip_name2)]
        clip = load_dual_clip(paths, folder_paths.get_folder_paths("embeddings"))
        leave_without_copies(clip.patcher)
        leave_unpinned(clip.patcher)
        return (clip,)


_OLD_NAME = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"

_other = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(_OLD_NAME)
if _other is not None:
    logger.warning(
        "NF4: another package (%s) has registered the node %s already; this one takes its place. To keep the other, "
        "remove or disable one of the two in custom_nodes.",
        getattr(_other, "RELATIVE_PYTHON_MODULE", None) or _other.__module__,
        _OLD_NAME,
    )

NODE_CLASS_MAPPINGS: dict[str, type] = {
    _OLD_NAME: FluxNF4CheckpointLoader,
    "FluxNF4CheckpointLoaderStreamed": FluxNF4CheckpointLoaderStreamed,
    "FluxNF4UNETLoaderStreamed": FluxNF4UNETLoaderStreamed,
    "StreamModelBlocks": StreamModelBlocks,
    "MZ_Flux1PartialLoad_Patch": OldPartialLoad,
    "MZ_Flux1CheckpointLoader_cpuDynOffload": OldCheckpointLoader,
    "MZ_Flux1UnetLoader_cpuDynOffload": OldUNETLoader,
    "FluxNF4QuantiseSave": FluxNF4QuantiseSave,
    "FluxNF4DualCLIPLoader": FluxNF4DualCLIPLoader,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    _OLD_NAME: "Load Flux NF4 Checkpoint (streamed)",
    "FluxNF4CheckpointLoaderStreamed": "Load Flux NF4 (streamed)",
    "FluxNF4UNETLoaderStreamed": "Load Flux NF4 UNet (streamed)",
    "StreamModelBlocks": "Stream Model Blocks",
    "MZ_Flux1PartialLoad_Patch": "Stream Flux Blocks (old)",
    "MZ_Flux1CheckpointLoader_cpuDynOffload": "Load Flux Checkpoint (streamed, old)",
    "MZ_Flux1UnetLoader_cpuDynOffload": "Load Flux UNet (streamed, old)",
    "FluxNF4QuantiseSave": "Quantise Flux to NF4 and Save",
    "FluxNF4DualCLIPLoader": "Load Flux NF4 Dual CLIP",
}
