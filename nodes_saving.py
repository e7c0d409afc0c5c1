"""The nodes that quantise a model or text encoders and save them."""

import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from .families import CHECKPOINT_PREFIX, FLUX1, family_of_model, names
from .memory import GIB
from .nf4_loader.checkpoint.catalogue import Catalogue
from .nf4_loader.checkpoint.errors import CheckpointError, reason
from .nf4_loader.checkpoint.quant_state import QuantType
from .nf4_loader.saving.encoder_sources import sources_of_clip
from .nf4_loader.saving.model_sources import sources_of_encoders, sources_of_model
from .nf4_loader.saving.quantise import QuantSettings
from .nf4_loader.saving.save import layer_patterns, save_quantised
from .nodes_shared import Input

logger = logging.getLogger(__name__)


def _quantisation(layers: str) -> dict[str, Input]:
    return {
        "quant_type": (["nf4", "fp4"], {"tooltip": "NF4 is more exact for a model's weights."}),
        "absmax": (
            ["fp32", "nested"],
            {"tooltip": "fp32: as in v2 files, more exact. nested: as in v1 files, 8 % smaller."},
        ),
        "keep_dense": (
            "STRING",
            {
                "default": "",
                "tooltip": f"Layers whose weights stay dense, with commas between them, such as: {layers}",
            },
        ),
    }


class FluxNF4QuantiseSave:
    """Makes an NF4 or FP4 file of any MODEL whose files can be loaded."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "A model of Flux.1, FLUX.2, Chroma, Qwen-Image, Ideogram 4 or Krea 2: dense, fp8, "
                        "GGUF or 4-bit. LoRAs on it are merged."
                    },
                ),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "diffusion_models/flux1-nf4",
                        "tooltip": "The name of the file. A number is added to it, and it may begin with folders. "
                        "ComfyUI finds models in output/diffusion_models and output/checkpoints.",
                    },
                ),
                "folder": (
                    ["output", "diffusion_models", "checkpoints"],
                    {"tooltip": "ComfyUI's output folder, or its models folder of this name."},
                ),
                **_quantisation("img_in, final_layer.*, double_blocks.0.*"),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "Connect it together with VAE to save an all-in-one file (Flux.1 only)."}),
                "vae": ("VAE", {"tooltip": "Connect it together with CLIP to save an all-in-one file (Flux.1 only)."}),
            },
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    CATEGORY = "advanced/model_merging/flux nf4"
    SEARCH_ALIASES: ClassVar = [
        *("quantize", "nf4", "fp4", "bitsandbytes", "convert", "merge lora", "flux 2", "klein", "chroma"),
        *("qwen image", "ideogram 4", "krea 2"),
    ]
    DESCRIPTION = (
        "Quantises a model of Flux.1, FLUX.2, Chroma, Qwen-Image, Ideogram 4 or Krea 2 to NF4 or FP4, layer by layer, "
        "and saves it: the transformer alone, or of Flux.1 an all-in-one file with CLIP and VAE. 4-bit weights without "
        "a LoRA keep their values if they are saved in their own type (nesting an fp32 absmax changes them a little). "
        "Weights of the other type are quantised again, and the log says so."
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
        path = _new_path(filename_prefix, folder)
        family = family_of_model(model.model.model_config.unet_config.get("image_model"))
        if family is None:
            raise CheckpointError(
                path, f"the model is a {type(model.model).__name__}, and this node saves only {names()}."
            )
        if (clip is None) != (vae is None):
            raise CheckpointError(path, "connect both CLIP and VAE for an all-in-one file, or neither.")
        if clip is not None and family is not FLUX1:
            raise CheckpointError(
                path,
                f"all-in-one files are made of {FLUX1.name} only, and this is a {family.name} model. Disconnect CLIP "
                "and VAE: its transformer is saved alone, and text encoder and VAE stay in files of their own.",
            )
        if clip is not None:
            _require_clip(path, clip)
            _require_vae(path, vae, model.model.latent_format)
        device = comfy.model_management.get_torch_device()
        comfy.model_management.free_memory(GIB, device)  # first: tensors that sources hold cannot be moved any more
        sources = sources_of_model(model) + (sources_of_encoders(clip, vae) if clip is not None else [])
        progress = comfy.utils.ProgressBar(sum(torch.Size(source.shape).numel() for source in sources))
        save_quantised(
            path,
            sources,
            QuantSettings(quant_type, nested=absmax == "nested"),
            prefix=CHECKPOINT_PREFIX if clip is not None else "",
            keep_dense=layer_patterns(keep_dense),
            metadata=_origin(model),
            device=device,
            progress=progress.update,
        )
        logger.info("NF4: saved %s (%.2f GiB)", path, path.stat().st_size / GIB)
        return {"ui": {"text": [str(path)]}}


class QuantiseSaveTextEncoder:
    """Makes an NF4 or FP4 file of each text encoder of a CLIP."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "A CLIP, dense, fp8 or 4-bit. LoRAs on it are merged."}),
                "filename_prefix": (
                    "STRING",
                    {
                        "default": "text_encoders/encoder-nf4",
                        "tooltip": "The name of the file. The name of the text encoder and a number are added to it, "
                        "and it may begin with folders.",
                    },
                ),
                "folder": (
                    ["output", "text_encoders"],
                    {"tooltip": "ComfyUI's output folder, or its models folder of this name."},
                ),
                **_quantisation("model.layers.0.*, visual.*"),
            }
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    CATEGORY = "advanced/model_merging/flux nf4"
    SEARCH_ALIASES: ClassVar = ["quantize", "nf4", "fp4", "bitsandbytes", "convert", "text encoder", "clip"]
    DESCRIPTION = (
        "Quantises the text encoders of a CLIP (Mistral 3, Qwen3, Qwen2.5-VL, Qwen3-VL, T5-XXL, CLIP-L) to NF4 or FP4 "
        "and saves each in a file for Load 4-bit Text Encoder (streamed). Embeddings and norms stay dense."
    )

    def save(
        self, clip: Any, filename_prefix: str, folder: str, quant_type: QuantType, absmax: str, keep_dense: str
    ) -> dict[str, Any]:
        device = comfy.model_management.get_torch_device()
        comfy.model_management.free_memory(GIB, device)
        every = sources_of_clip(clip)
        progress = comfy.utils.ProgressBar(
            sum(torch.Size(source.shape).numel() for sources in every.values() for source in sources)
        )
        paths = []
        for name, sources in every.items():
            path = _new_path(f"{filename_prefix}-{name}", folder)
            save_quantised(
                path,
                sources,
                QuantSettings(quant_type, nested=absmax == "nested"),
                keep_dense=layer_patterns(keep_dense),
                metadata={
                    "flux_nf4.source": type(clip.cond_stage_model).__name__,
                    "flux_nf4.patched_weights": str(len(clip.patcher.patches)),
                },
                device=device,
                progress=progress.update,
            )
            logger.info("NF4: saved %s (%.2f GiB)", path, path.stat().st_size / GIB)
            paths.append(str(path))
        return {"ui": {"text": paths}}


def _require_clip(path: Path, clip: Any) -> None:
    """Check that ``clip`` is the text encoders that an all-in-one file of Flux.1 holds.

    Raises:
        CheckpointError: it is not; it says what to connect.
    """
    encoders = {"clip_l": "CLIP-L", "t5xxl": "T5-XXL"}
    parts = [part for part, _ in clip.cond_stage_model.named_children()]
    missing = [name for part, name in encoders.items() if part not in parts]
    others = [part for part in parts if part not in encoders]
    if missing or others:
        found = f"has no {' and no '.join(missing)}" if missing else f"has {' and '.join(others)}, too"
        raise CheckpointError(
            path,
            f"the CLIP {found}. An all-in-one file of {FLUX1.name} has both text encoders: "
            "connect the CLIP of 'DualCLIPLoader' (type flux), or of a node that loads an all-in-one file.",
        )


def _require_vae(path: Path, vae: Any, latents: Any) -> None:
    """Check that ``vae`` is for ``latents``, ComfyUI's description of what the model computes with.

    Raises:
        CheckpointError: it is not; it says what to connect.
    """
    expected = (latents.latent_channels, latents.latent_dimensions)
    found = (getattr(vae, "latent_channels", expected[0]), getattr(vae, "latent_dim", expected[1]))
    if found != expected:
        raise CheckpointError(
            path,
            f"the VAE makes latents of {found[0]} channels and {found[1]} dimensions; {FLUX1.name}'s have "
            f"{expected[0]} and {expected[1]}. Connect 'Load VAE' with ae.safetensors.",
        )


def _new_path(prefix: str, folder: str) -> Path:
    """A file that is not there yet: ``prefix`` and a number, in the output folder or in the ``folder`` of models.

    Raises:
        CheckpointError: ``prefix`` leads out of the folder, or its folders cannot be read or made.
    """
    if folder == "output":
        root = folder_paths.get_output_directory()
    else:
        roots = folder_paths.get_folder_paths(folder)  # the first one may have an older name, such as "unet"
        root = next((path for path in roots if Path(path).name == folder), roots[0])
        prefix = prefix.removeprefix(f"{folder}/")  # the default has it, for the output folder
    if not Path(os.path.normpath(Path(root, prefix))).is_relative_to(os.path.normpath(root)):
        raise CheckpointError(Path(root), f"filename_prefix {prefix} leads out of this folder. Take a name within it.")
    try:
        place, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    except OSError as error:
        raise CheckpointError(
            Path(root),
            f"filename_prefix {prefix} cannot be used there ({reason(error)}). Take another name or folder, or let "
            "ComfyUI write there.",
        ) from error
    return Path(place, f"{name}_{counter:05}_.safetensors")


def _origin(model: Any) -> dict[str, str]:
    catalogue: Catalogue | None = getattr(model.model, "nf4_catalogue", None)
    source = catalogue.path.name if catalogue else type(model.model).__name__
    return {"flux_nf4.source": source, "flux_nf4.patched_weights": str(len(model.patches))}
