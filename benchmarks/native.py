"""ComfyUI's native quantised formats, by its own loader: as ComfyUI moves them, and streamed by this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cases import Case
from comfy_model import ComfyModel, at_work
from family import Unavailable
from native_files import has_formats
from weights import Files


class Native:
    """One file, loaded by ComfyUI; a setting is "automatic" (ComfyUI moves it) or "streamed"."""

    def __init__(self, files: Files, kind: str) -> None:
        import comfy.sd

        if not has_formats():
            raise Unavailable("needs a ComfyUI with comfy-kitchen (0.33 or later)")
        self._patcher = comfy.sd.load_diffusion_model(str(files.native(kind)))
        self._streamed: Any = None

    @contextmanager
    def at_work(self, setting: str, case: Case) -> Iterator[ComfyModel]:
        with at_work(self._streamed_once() if setting == "streamed" else self._patcher, case) as model:
            yield model

    def _streamed_once(self) -> Any:
        from flux_nf4.offload.comfyui.adopt import stream_model
        from flux_nf4.offload.plan import Residency

        if self._streamed is None:
            self._streamed = stream_model(self._patcher, Residency(), None)
        return self._streamed
