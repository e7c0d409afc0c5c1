"""Flux NF4 checkpoints on a GPU that cannot hold them: the door for ComfyUI."""

from server import PromptServer

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from .routes import register

WEB_DIRECTORY = "./web"

if getattr(PromptServer, "instance", None) is not None:  # there is none where a tool only wants the node classes
    register(PromptServer.instance)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
