"""The nodes that stream text encoders: of 4-bit files, and of any CLIP."""

from typing import Any, ClassVar

import folder_paths

from .encoders import key_of_encoders, load_encoders, streamed_clip
from .families.encoders import encoders_by_type
from .nf4_loader.checkpoint.encoder_file import read_encoder_file
from .nf4_loader.checkpoint.require import require_4bit
from .nf4_loader.models.streamed_encoders import supported_types
from .nodes_shared import CATEGORY, HIDDEN, Loader, PlannedNode, budget_input, path_of, residency_of
from .offload.comfyui.clip import stream_clip

_NONE = "none"
_ALIASES = ["low vram", "offload", "block swap", "clip", "text encoder", "qwen", "mistral", "t5"]
_BUDGET = budget_input(
    "The most VRAM for the text encoder, in GiB. 0: what is free while a prompt is encoded. As much of the "
    "diffusion model as possible stays on the card. The result is the same with any budget."
)


class Load4BitTextEncoderStreamed(Loader):
    """The text encoder of a file, or the two of two files."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = folder_paths.get_filename_list("text_encoders")
        return {
            "required": {
                "clip_name": (
                    files,
                    {
                        "tooltip": "A text encoder in NF4 or FP4, as transformers and bitsandbytes save it, in the "
                        "folder models/text_encoders. If it is in shards, pick any one of them."
                    },
                ),
                "type": (
                    supported_types(),
                    {
                        "tooltip": f"The model that the prompt is for, and its text encoders. {encoders_by_type()} "
                        "Z-Image takes lumina2."
                    },
                ),
            },
            "optional": {
                "clip_name2": (
                    [_NONE, *files],
                    {
                        "default": _NONE,
                        "tooltip": "The second text encoder, if the model has two (flux: T5-XXL and CLIP-L, in "
                        "either order). It need not be in 4 bits.",
                    },
                ),
                **_BUDGET,
            },
            "hidden": HIDDEN,
        }

    PLAN: ClassVar = PlannedNode("text_encoders", "clip_name", budget="vram_budget_gb")
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS: ClassVar = ("The text encoder, for the prompt.",)
    FUNCTION = "load_clip"
    CATEGORY = CATEGORY
    SEARCH_ALIASES: ClassVar = [*_ALIASES, "nf4", "fp4", "bitsandbytes", "bnb", "flux2", "klein", "clip loader"]
    DESCRIPTION = (
        "Loads a text encoder in NF4 or FP4 (Mistral 3, Qwen3, Qwen2.5-VL, Qwen3-VL, T5-XXL, CLIP-L) and streams its "
        "layers from RAM, so that a new prompt does not push the diffusion model off the card. The weights stay in 4 "
        "bits."
    )

    def load_clip(
        self,
        clip_name: str,
        type: str,
        clip_name2: str = _NONE,
        vram_budget_gb: float = 0.0,
        unique_id: str | None = None,
    ) -> tuple[Any]:
        names = [name for name in (clip_name, clip_name2) if name != _NONE]
        files = [read_encoder_file(path_of("text_encoders", name)) for name in names]
        require_4bit(files)
        clip = self.once(key_of_encoders(files, type), lambda: load_encoders(files, type))
        return (streamed_clip(clip, residency_of(vram_budget_gb), unique_id),)


class StreamTextEncoder:
    """Streams the text encoders of any CLIP."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "A CLIP of any loader, in bf16, fp16, fp8 or 4 bits. LoRAs and CLIP Set Last Layer may come before or "
            "after this node."
        )
        return {"required": {"clip": ("CLIP", {"tooltip": tooltip})}, "optional": dict(_BUDGET), "hidden": HIDDEN}

    PLAN: ClassVar = PlannedNode(budget="vram_budget_gb")
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS: ClassVar = ("The same CLIP, streamed.",)
    FUNCTION = "stream"
    CATEGORY = CATEGORY
    SEARCH_ALIASES: ClassVar = [*_ALIASES, "fp8"]
    DESCRIPTION = (
        "Streams the layers of a text encoder from RAM while those before them compute, so that a new prompt does not "
        "push the diffusion model off the card. On a CLIP that is already streamed it changes the budget."
    )

    def stream(self, clip: Any, vram_budget_gb: float = 0.0, unique_id: str | None = None) -> tuple[Any]:
        return (stream_clip(clip, residency_of(vram_budget_gb), unique_id),)
