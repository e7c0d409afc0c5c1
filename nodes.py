"""The ComfyUI nodes."""

import gc
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_base
import comfy.model_management
import comfy.utils
import folder_paths
import psutil
import torch

from .nf4_loader.catalogue import Catalogue, read_catalogue, require_all_in_one
from .nf4_loader.errors import CheckpointError
from .nf4_loader.fill import fill
from .nf4_loader.flux import block_groups, build_flux, load_clip_and_vae, materialise
from .nf4_loader.model_sources import sources_of_encoders, sources_of_model
from .nf4_loader.quant_state import QuantType
from .nf4_loader.quantise import QuantSettings
from .nf4_loader.save import save_quantised
from .nf4_loader.text_encoders import load_dual_clip
from .offload.patcher import StreamedModelPatcher, attach_streaming

logger = logging.getLogger(__name__)

_GIB = 1024**3


class FluxNF4CheckpointLoader:
    """The node that old graphs know as ``MZ_Flux1CheckpointLoaderNF4_cpuDynOffload``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ckpt_name": (
                    folder_paths.get_filename_list("checkpoints"),
                    {
                        "tooltip": "An all-in-one Flux checkpoint in NF4 or FP4, such as "
                        "flux1-dev-bnb-nf4-v2.safetensors, in the folder models/checkpoints."
                    },
                ),
                "double_blocks_cuda_size": (
                    "INT",
                    {
                        "default": 7,
                        "min": 0,
                        "max": 16,
                        "tooltip": "How many of the 19 double blocks stay in VRAM (about 182 MiB each). The others are "
                        "streamed from RAM while the block before them computes. The picture is the same.",
                    },
                ),
                "single_blocks_cuda_size": (
                    "INT",
                    {
                        "default": 7,
                        "min": 0,
                        "max": 37,
                        "tooltip": "How many of the 38 single blocks stay in VRAM (about 76 MiB each). The others are "
                        "streamed from RAM while the block before them computes. The picture is the same.",
                    },
                ),
            }
        }

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS: ClassVar = (
        "The Flux model, for a sampler.",
        "CLIP-L and T5-XXL of the file, for the prompt.",
        "The VAE of the file, to decode the picture.",
    )
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders/flux nf4"
    DESCRIPTION = (
        "Loads a Flux checkpoint in NF4 or FP4 and runs it on a GPU that cannot hold it: some blocks stay in VRAM, the "
        "others are streamed from RAM while the one before them computes. 0 and 0 needs the least VRAM; more only "
        "matters where the bus is slower than the GPU (small pictures, slow slots)."
    )

    def load_checkpoint(
        self, ckpt_name: str, double_blocks_cuda_size: int = 7, single_blocks_cuda_size: int = 7
    ) -> tuple[Any, Any, Any]:
        found = folder_paths.get_full_path("checkpoints", ckpt_name)
        if found is None:
            folders = ", ".join(folder_paths.get_folder_paths("checkpoints"))
            raise FileNotFoundError(
                f"{ckpt_name}: there is no such file in the checkpoints folder ({folders}). Put it there, refresh the "
                "page (key R) and pick it in this node."
            )
        catalogue = read_catalogue(Path(found))
        require_all_in_one(catalogue)
        wanted = {"double": double_blocks_cuda_size, "single": single_blocks_cuda_size}
        return _load_all_in_one(catalogue, wanted)


def _load_all_in_one(catalogue: Catalogue, wanted: Mapping[str, int]) -> tuple[Any, Any, Any]:
    gc.collect()  # an earlier model that only cycles keep alive must not count against this one
    model = build_flux(catalogue)
    _require_ram(catalogue)
    clip, vae = load_clip_and_vae(catalogue, folder_paths.get_folder_paths("embeddings"))
    return _load_transformer(model, catalogue, wanted), clip, vae


def _load_transformer(
    model: comfy.model_base.BaseModel, catalogue: Catalogue, wanted: Mapping[str, int]
) -> StreamedModelPatcher:
    groups = block_groups(model)
    attach_streaming(model, groups)
    materialise(model.diffusion_model)
    progress = comfy.utils.ProgressBar(catalogue.transformer_bytes)
    fill(model, catalogue, progress.update)
    patcher = StreamedModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.resident = {kind: _clamped(kind, wanted[kind], len(group)) for kind, group in groups.items()}
    return patcher


def _clamped(kind: str, wanted: int, depth: int) -> int:
    if wanted > depth:
        logger.info("NF4: %s_blocks_cuda_size is %d; the model has %d: all of them stay", kind, wanted, depth)
    return min(wanted, depth)


def _require_ram(catalogue: Catalogue) -> None:
    parts = (catalogue.text_encoders, catalogue.vae)
    needed = catalogue.transformer_ram + sum(entry.nbytes for part in parts for entry in part.values())
    free = comfy.model_management.get_free_memory(torch.device("cpu")) + psutil.swap_memory().free
    if needed > free:
        raise CheckpointError(
            catalogue.path,
            f"loading it takes {needed / _GIB:.2f} GiB of RAM; {free / _GIB:.2f} GiB are free, swap included. Close "
            "other programs, free ComfyUI's models (Manager: Unload Models), or enlarge the swap or page file.",
        )


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
                        "tooltip": "Layers that stay as they are, with commas between them, such as: img_in, "
                        "final_layer.*, double_blocks.0.*",
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
    DESCRIPTION = (
        "Quantises a Flux model to NF4 or FP4, layer by layer, and saves it: the transformer alone, or with CLIP and "
        "VAE as an all-in-one file. What is loaded from a file in 4 bits and has no LoRA is saved as it is."
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
        sources = sources_of_model(model) + (sources_of_encoders(clip, vae) if clip is not None else [])
        device = comfy.model_management.get_torch_device()
        comfy.model_management.free_memory(_GIB, device)
        progress = comfy.utils.ProgressBar(sum(torch.Size(source.shape).numel() for source in sources))
        save_quantised(
            path,
            sources,
            QuantSettings(quant_type, nested=absmax == "nested"),
            prefix="model.diffusion_model." if clip is not None else "",
            keep_dense=[layer.strip() for layer in keep_dense.split(",") if layer.strip()],
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
    DESCRIPTION = (
        "Loads the two text encoders of Flux. A T5 in 4 bits, as transformers and bitsandbytes save it, stays so: "
        "3 GB of memory in place of 10. One that is in shards is loaded by any one of them."
    )

    def load_clip(self, clip_name1: str, clip_name2: str) -> tuple[Any]:
        paths = [Path(folder_paths.get_full_path_or_raise("text_encoders", name)) for name in (clip_name1, clip_name2)]
        return (load_dual_clip(paths, folder_paths.get_folder_paths("embeddings")),)


_OLD_NAME = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"

if _OLD_NAME in getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}):
    logger.warning(
        "NF4: another package has registered the node %s already; this one takes its place. To keep the other, "
        "remove or disable one of the two in custom_nodes.",
        _OLD_NAME,
    )

NODE_CLASS_MAPPINGS: dict[str, type] = {
    _OLD_NAME: FluxNF4CheckpointLoader,
    "FluxNF4QuantiseSave": FluxNF4QuantiseSave,
    "FluxNF4DualCLIPLoader": FluxNF4DualCLIPLoader,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    _OLD_NAME: "Load Flux NF4 Checkpoint (streamed)",
    "FluxNF4QuantiseSave": "Quantise Flux to NF4 and Save",
    "FluxNF4DualCLIPLoader": "Load Flux NF4 Dual CLIP",
}
