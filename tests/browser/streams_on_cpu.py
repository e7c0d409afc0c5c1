"""A custom node package that the tests drop in beside ours: makes it stream on the CPU, and run out of memory."""

import sys

import torch
from comfy.patcher_extension import WrappersMP
from server import PromptServer


def stream_on_cpu(prompt):
    """Before the first prompt, when all packages are there, in whatever order they were found."""
    (patcher,) = [module for name, module in sys.modules.items() if name.endswith("offload.comfyui.patcher")]
    patcher.StreamedModelPatcher._computes_from_host = False
    return prompt


PromptServer.instance.add_on_prompt_handler(stream_on_cpu)


class OutOfMemoryTwice:
    """Makes the first forward of a MODEL run out of memory, and what runs in its place with less on the device, too."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL", {})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "run"
    CATEGORY = "tests"

    def run(self, model):
        left = [torch.OutOfMemoryError("a test's") for _ in range(2)]

        def forward(executor, *args, **kwargs):
            if left:
                raise left.pop()
            return executor(*args, **kwargs)

        model = model.clone()
        model.add_wrapper(WrappersMP.DIFFUSION_MODEL, forward)
        return (model,)


NODE_CLASS_MAPPINGS = {"TestOutOfMemoryTwice": OutOfMemoryTwice}
