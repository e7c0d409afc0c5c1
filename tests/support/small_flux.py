"""A custom node package that the tests drop in beside ours: it has ComfyUI take the small Flux.1 of `small_recipe`.

Newer ComfyUIs read the transformer's width from the file; with this all do. None reads a text encoder's width.
"""

import comfy.model_detection
import comfy.sd1_clip

_ENCODERS = {
    "t5xxl_model_config": {"d_model": 256, "d_ff": 640, "num_heads": 4},
    "clip_l_model_config": {"hidden_size": 96, "intermediate_size": 384},
}

_detect_unet_config = comfy.model_detection.detect_unet_config
_make_encoder = comfy.sd1_clip.SDClipModel.__init__


def detect_unet_config(state_dict, key_prefix, *args, **kwargs):
    found = _detect_unet_config(state_dict, key_prefix, *args, **kwargs)
    if found is not None and found.get("image_model") == "flux":
        found["hidden_size"], found["context_in_dim"] = state_dict[f"{key_prefix}txt_in.weight"].shape
        found["num_heads"] = found["hidden_size"] // sum(found["axes_dim"])
    return found


def make_encoder(self, *args, model_options=None, **kwargs):
    options = model_options or {}
    sizes = {name: of_one | options.get(name, {}) for name, of_one in _ENCODERS.items()}
    _make_encoder(self, *args, model_options=options | sizes, **kwargs)


comfy.model_detection.detect_unet_config = detect_unet_config
comfy.sd1_clip.SDClipModel.__init__ = make_encoder

NODE_CLASS_MAPPINGS = {}
