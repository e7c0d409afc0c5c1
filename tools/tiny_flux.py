"""A Flux too small for ComfyUI's detection of some versions: how to have ComfyUI take it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

HIDDEN = 256


def tiny_config(double_blocks: int, single_blocks: int) -> dict[str, Any]:
    """What ComfyUI's detection would say of a dev model with hidden size `HIDDEN`."""
    from comfy.ldm.flux.model import FluxParams

    config: dict[str, Any] = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": HIDDEN,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": double_blocks,
        "depth_single_blocks": single_blocks,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    return config


def detection_of(double_blocks: int, single_blocks: int) -> Callable[..., Any]:
    """What to put in the place of ``comfy.model_detection.model_config_from_unet``."""
    import comfy.supported_models
    import comfy.utils

    find_formats = getattr(comfy.utils, "detect_layer_quantization", None)

    def detect(state: Mapping[str, Any] = MappingProxyType({}), *_: Any, **__: Any) -> Any:
        config = comfy.supported_models.Flux(tiny_config(double_blocks, single_blocks))
        if find_formats is not None:  # else ComfyUI's own formats would be read as plain integers
            config.quant_config = find_formats(state, "")
        return config

    return detect
