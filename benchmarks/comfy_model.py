"""A model run as ComfyUI runs it: loaded by its memory manager, called through ``apply_model`` or a KSampler."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import torch
from cases import Case
from random_lora import LoRA, kohya, linear_shapes

SEED = 0
SIGMA = 0.7
STEPS = 200
"""Of the schedule that single calls go through: more than a turn has."""
FLUX2_CHANNELS = 128
"""Of a latent of FLUX.2, whose pixels are 16 wide; others have 16 channels and 8."""


class ComfyModel:
    """One patcher at work on one case; loaded by ComfyUI as for a sampling of that picture."""

    def __init__(self, patcher: Any, case: Case) -> None:
        self.patcher = _with_loras(patcher, case)
        self.case = case
        self._at = 0
        self.device: torch.device = self.patcher.load_device
        generator = torch.Generator().manual_seed(SEED)
        channels = patcher.model.latent_format.latent_channels
        side = case.pixels // (16 if channels == FLUX2_CHANNELS else 8)
        self._noise = torch.randn(case.batch, channels, side, side, generator=generator)
        width = patcher.model.model_config.unet_config["context_in_dim"]
        text = torch.randn(2, case.text_tokens, width, generator=generator)
        pooled = torch.randn(2, 768, generator=generator)
        self._positive, self._negative = (_cond(text[i : i + 1], pooled[i : i + 1]) for i in range(2))

    def load(self) -> None:
        conds = {"positive": comfy.sampler_helpers.convert_cond(self._positive)}
        comfy.sampler_helpers.prepare_sampling(self.patcher, self._noise.shape, conds, self.patcher.model_options)

    def forward(self) -> torch.Tensor:
        """One call of the transformer in the middle of the schedule, (batch, channels, height, width)."""
        return self._call(0)

    def step(self) -> torch.Tensor:
        """The next call after those before, as in a sampling of many steps: the timestep is another one each time."""
        self._at = (self._at + 1) % STEPS
        return self._call(self._at)

    def _call(self, index: int) -> torch.Tensor:
        noise, timesteps, conditioning = self._inputs
        return self.patcher.model.apply_model(noise, timesteps[index], **conditioning)

    def sample(self, on_step: Callable[[], None], steps: int | None = None) -> torch.Tensor:
        """A whole sampling; ``on_step`` is called after each step. Latents on the CPU."""
        return comfy.sample.sample(
            self.patcher,
            self._noise,
            steps or self.case.steps,
            self.case.cfg,
            "euler",
            "simple",
            self._positive,
            self._negative,
            torch.zeros_like(self._noise),
            callback=lambda *_: on_step(),
            disable_pbar=True,
            seed=SEED,
        )

    def stays(self) -> dict[str, int]:
        """How many blocks of each kind are on the device; nothing where this package streams none."""
        streaming: Any = getattr(self.patcher.model, "streaming", None)
        plan = streaming.streamer.plan if streaming is not None else None  # None on a CPU, too
        if plan is None:
            return {}
        kinds = [size.kind for size in streaming.streamer.sizes()]
        return {kind: sum(kinds[index] == kind for index in plan.resident) for kind in dict.fromkeys(kinds)}

    @functools.cached_property
    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        model, batch = self.patcher.model, self.case.batch
        dtype = model.manual_cast_dtype or model.get_dtype()
        ((text, pooled),) = self._positive
        conditioning = {
            "c_crossattn": text.repeat(batch, 1, 1).to(self.device, dtype),
            "y": pooled["pooled_output"].repeat(batch, 1).to(self.device, dtype),
            "guidance": torch.full((batch,), 3.5, device=self.device),
            "transformer_options": self._transformer_options(),
        }
        timesteps = self._sigmas[:-1, None].repeat(1, batch).to(self.device)
        return self._noise.to(self.device), timesteps, conditioning

    @property
    def _sigmas(self) -> torch.Tensor:
        return torch.cat((torch.linspace(SIGMA, SIGMA / STEPS, STEPS), torch.zeros(1)))

    def _transformer_options(self) -> dict[str, Any]:
        """With the wrappers of the patcher in it and the sigmas of all steps, as a sampling puts them there.

        So what is computed ahead in a sampling is computed ahead here.
        """
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        options.setdefault("transformer_options", {})
        comfy.sampler_helpers.prepare_model_patcher(self.patcher, {}, options)
        return options["transformer_options"] | {"sample_sigmas": self._sigmas}


def _cond(text: torch.Tensor, pooled: torch.Tensor) -> list[Any]:
    """A prompt as ComfyUI's nodes hand it on."""
    return [[text, {"pooled_output": pooled}]]


@contextmanager
def at_work(patcher: Any, case: Case) -> Iterator[ComfyModel]:
    """Afterwards nothing of any model is on the device."""
    try:
        yield ComfyModel(patcher, case)
    finally:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache(True)


def with_lora(patcher: Any, file: LoRA, strength: float) -> Any:
    """What ComfyUI's LoRA nodes give.

    Raises:
        ValueError: some of it would be left out, so that the cost of a whole LoRA would not be measured.
    """
    patched = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0.0)[0]
    there, taken = sum(name.endswith(_UP) for name in file), _patches_of(patched) - _patches_of(patcher)
    if taken != there:
        raise ValueError(f"{taken} of the LoRA's {there} patches fit the model")
    return patched


_UP = (".lora_up.weight", ".lora_B.weight")
"""In the names of kohya and of diffusers: one of each patch's two factors."""


def _patches_of(patcher: Any) -> int:
    return sum(map(len, patcher.patches.values()))


def _with_loras(patcher: Any, case: Case) -> Any:
    shapes = linear_shapes(patcher.model) if case.loras else {}
    for index in range(case.loras):
        patcher = with_lora(patcher, _lora(tuple(shapes.items()), case.rank, index), 1.0)
    return patcher.clone()


@functools.cache
def _lora(shapes: tuple[tuple[str, tuple[int, int]], ...], rank: int, index: int) -> LoRA:
    return in_bf16(kohya(dict(shapes), rank, rank, str(index)))


def in_bf16(file: LoRA) -> LoRA:
    """As trainers save it."""
    return {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in file.items()}
