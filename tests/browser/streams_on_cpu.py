"""A custom node package that the tests drop in beside ours: makes it stream on the CPU, and run out of memory."""

import sys

import torch
from comfy.patcher_extension import WrappersMP
from server import PromptServer

RING_BYTES = 600_000
"""Of the small model, whose blocks would fit into the real ring: then none is streamed."""


async def stream_on_cpu(app):
    """Before the server answers, when all packages are there, in whatever order they were found."""
    patcher, plans = module("offload.comfyui.patcher").StreamedModelPatcher, module("page.file_plan")
    patcher._computes_from_host, patcher.staging_bytes = False, RING_BYTES
    plan_by_budget = plans.plan_by_budget

    def plan(blocks, *args, **kwargs):
        is_small = sum(block.nbytes for block in blocks) < 100e6
        return plan_by_budget(blocks, *args, **kwargs, **({"staging_bytes": RING_BYTES} if is_small else {}))

    plans.plan_by_budget = plan


def module(name):
    (found,) = [module for full, module in sys.modules.items() if full.endswith(name)]
    return found


PromptServer.instance.app.on_startup.append(stream_on_cpu)


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
