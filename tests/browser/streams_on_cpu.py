"""A custom node package that the tests drop in beside ours: makes it stream on the CPU, where it would not."""

import sys

from server import PromptServer


def stream_on_cpu(prompt):
    """Before the first prompt, when all packages are there, in whatever order they were found."""
    (patcher,) = [module for name, module in sys.modules.items() if name.endswith("offload.comfyui.patcher")]
    patcher.StreamedModelPatcher._computes_from_host = False
    return prompt


PromptServer.instance.add_on_prompt_handler(stream_on_cpu)
NODE_CLASS_MAPPINGS = {}
