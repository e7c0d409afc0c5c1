"""Flux as diffusers runs it: NF4 or bf16, in VRAM or with group offload."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Case
from contenders import Unavailable
from weights import Files


class DiffusersModel:
    """The transformer alone, called with the shapes of a ComfyUI call of the same picture."""

    def __init__(self, transformer: Any, device: torch.device, case: Case, load: Callable[[], None]) -> None:
        self.device, self.load = device, load
        self._transformer = transformer
        generator = torch.Generator().manual_seed(0)
        side, batch = case.pixels // 16, case.batch
        shapes = {
            "hidden_states": (batch, side * side, 64),
            "encoder_hidden_states": (batch, case.text_tokens, 4096),
            "pooled_projections": (batch, 768),
        }
        self._inputs = {
            name: torch.randn(shape, generator=generator).to(device, torch.bfloat16) for name, shape in shapes.items()
        }
        grid = torch.zeros(side, side, 3)
        grid[..., 1], grid[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        self._inputs |= {
            "img_ids": grid.view(-1, 3).to(device, torch.bfloat16),
            "txt_ids": torch.zeros(case.text_tokens, 3, device=device, dtype=torch.bfloat16),
            "timestep": torch.full((batch,), 0.7, device=device, dtype=torch.bfloat16),
            "guidance": torch.full((batch,), 3.5, device=device),
        }

    def forward(self) -> torch.Tensor:
        return self._transformer(**self._inputs, return_dict=False)[0]

    def sample(self, on_step: Callable[[], None], steps: int | None = None) -> torch.Tensor:
        raise Unavailable("measured in single calls only: its sampling is not ComfyUI's")


class Diffusers:
    """One way to run it, "resident" or "group": group offload stays on a model once it is there."""

    def __init__(self, files: Files, way: str, *, is_nf4: bool) -> None:
        if not torch.cuda.is_available():
            raise Unavailable("needs a GPU")
        try:
            from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
            from diffusers.hooks import apply_group_offloading
        except ImportError as error:
            raise Unavailable(f"needs diffusers ({error})") from None
        quantised: dict[str, Any] = {}
        if is_nf4:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
            quantised = {"quantization_config": config, "device": "cuda"}  # to be quantised there
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._is_resident = way == "resident"
        self._transformer = FluxTransformer2DModel.from_single_file(
            str(files.dense(torch.bfloat16)),
            config=str(files.diffusers_config()),
            torch_dtype=torch.bfloat16,
            local_files_only=True,
            **quantised,
        )
        self._transformer.to("cpu")
        if not self._is_resident:
            apply_group_offloading(
                self._transformer,
                onload_device=self._device,
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,
            )

    @contextmanager
    def at_work(self, setting: str, case: Case) -> Iterator[DiffusersModel]:
        if case.loras or case.steps:
            raise Unavailable("measured in single calls of the plain transformer only")
        try:
            yield DiffusersModel(self._transformer, self._device, case, self._load)
        finally:
            if self._is_resident:
                self._transformer.to("cpu")
            torch.cuda.empty_cache()

    def _load(self) -> None:
        if self._is_resident:
            self._transformer.to(self._device)
