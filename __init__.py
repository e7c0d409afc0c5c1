"""Flux NF4 checkpoints on a GPU that cannot hold them: the door for ComfyUI."""

from server import PromptServer

from .offload.comfyui.requires import require_comfyui

try:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .page.routes import register
except (ImportError, AttributeError):
    require_comfyui()  # says what is missing, where that is why
    raise

WEB_DIRECTORY = "./web"

if getattr(PromptServer, "instance", None) is not None:  # there is none where a tool only wants the node classes
    register(PromptServer.instance)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
