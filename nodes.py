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


_OLD_NAME = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"

if _OLD_NAME in getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}):
    logger.warning(
        "NF4: another package has registered the node %s already; this one takes its place. To keep the other, "
        "remove or disable one of the two in custom_nodes.",
        _OLD_NAME,
    )

NODE_CLASS_MAPPINGS: dict[str, type] = {_OLD_NAME: FluxNF4CheckpointLoader}
NODE_DISPLAY_NAME_MAPPINGS = {_OLD_NAME: "Load Flux NF4 Checkpoint (streamed)"}
