"""Flux as diffusers runs it: NF4 or bf16, in VRAM or with group offload."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Case
from family import Unavailable
from torch import nn
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

    def step(self) -> torch.Tensor:
        return self.forward()  # nothing of it depends on the timestep

    def sample(self, on_step: Callable[[], None], steps: int | None = None) -> torch.Tensor:
        raise Unavailable("measured in single calls only: its sampling is not ComfyUI's")

    def stays(self) -> dict[str, int]:
        return {}


class Diffusers:
    """One way to run it, "resident" or "group": group offload stays on a model once it is there.

    With group offload the quant states of NF4 never leave the device, and are in no figure of what a turn takes.
    """

    def __init__(self, files: Files, way: str, *, is_nf4: bool) -> None:
        if not torch.cuda.is_available():
            raise Unavailable("needs a GPU")
        try:
            from diffusers import FluxTransformer2DModel
            from diffusers.hooks import apply_group_offloading
        except ImportError as error:
            raise Unavailable(f"needs diffusers ({error})") from None
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._is_resident = way == "resident"
        self._transformer = FluxTransformer2DModel.from_single_file(
            str(files.dense(torch.bfloat16)),
            config=str(files.diffusers_config()),
            torch_dtype=torch.bfloat16,
            local_files_only=True,
        )
        if is_nf4:
            quantise_blocks(self._transformer, self._device)
        if self._is_resident:
            self._transformer.to("cpu")
        else:
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


def quantise_blocks(transformer: Any, device: torch.device) -> None:
    """Make each Linear of the blocks bitsandbytes' NF4 on ``device``, in place, with fp32 absmax.

    As ``quantization_config`` of ``from_pretrained`` does; ``from_single_file`` takes one for packed weights only. Only
    the blocks: group offload moves the packed bytes of any other module back without its quant state.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for module in list(block.modules()):
            for name, linear in module.named_children():
                if type(linear) is not nn.Linear:
                    continue
                values = linear.weight.data
                packed = Linear4bit(
                    linear.in_features, linear.out_features, compute_dtype=values.dtype, device=torch.device("meta")
                )
                packed.weight = Params4bit(values, requires_grad=False, compress_statistics=False, quant_type="nf4")
                packed.bias = linear.bias
                setattr(module, name, packed.to(device))
