"""ComfyUI's model classes, each made small: a configuration, and the inputs of one forward.

`CASES` has one case for each class of diffusion model, and more where a family has inputs of its own (reference
latents, masks, control). Sizes are the least that the class takes.
"""

import model_cases_image
import model_cases_video

CASES = {**model_cases_image.CASES, **model_cases_video.CASES}

UNTRIED = {
    "Anima": "its blocks are those of Cosmos Predict 2, and its text adapter alone has 135 million weights",
    "MiniMaxMusic3": "its size is fixed, at 2 billion weights",
    "MiniMaxH3": "one forward of it needs a prompt's tokens and both latents, packed by its own nodes",
    "HiDreamO1": "its size is that of the language model which it is made of",
    "SeedVR2": "it needs windows of a whole video",
    "TripoSplat": "its sequence has 8192 tokens",
    "Trellis2": "it computes on sparse voxels",
    "RT_DETR_v4": "it finds objects, and is not sampled",
    "SAM3": "it finds objects, and is not sampled",
    "SAM31": "it finds objects, and is not sampled",
    "DepthAnything3": "it finds depths, and is not sampled",
}
"""Classes of ``comfy.supported_models`` that have no case, and why."""
