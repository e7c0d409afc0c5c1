"""Models for the tests on a GPU, and what to do with one."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from make_checkpoint import Recipe
from prompts import prompt
from tiny_blocks import DOUBLES, SINGLES
from tiny_flux import HIDDEN

from flux_nf4.checkpoints import Residency, streamed

DEVICE = comfy.model_management.get_torch_device()

TINY = Recipe(double_blocks=DOUBLES, single_blocks=SINGLES, hidden=HIDDEN, unet_only=True, device=DEVICE.type)
WIDE = Recipe(double_blocks=2, single_blocks=4, unet_only=True, device=DEVICE.type)
"""Layers of Flux's real size, 0.7 GB in six blocks: more than the staging ring holds."""


@dataclass(frozen=True)
class Model:
    """A model of ``recipe`` in host memory, and the picture that tests make with it."""

    loaded: Any
    recipe: Recipe
    latent_side: int
    staging_bytes: int
    """Of a ring that holds less than the streamed blocks."""

    def with_counts(self, double, single, **settings):
        """A MODEL that keeps so many blocks of each kind on the device."""
        return self.with_residency(Residency((("double", double), ("single", single))), **settings)

    def with_residency(self, residency, **settings):
        patcher = streamed(self.loaded, residency, node_id=None)
        patcher.staging_bytes = self.staging_bytes
        for name, value in settings.items():
            setattr(patcher, name, value)
        return patcher

    def resident(self):
        return self.with_counts(self.recipe.double_blocks, self.recipe.single_blocks)

    def half(self):
        return self.with_counts(self.recipe.double_blocks // 2, self.recipe.single_blocks // 2)

    def sample(self, patcher, seed=1, steps=2, sampler="euler", cfg=1.0, batch=1):
        """Latents of a small picture, on the CPU."""
        positive, negative = (prompt(seed, tokens=32) for seed in (seed, seed + 1))
        latent = torch.zeros(batch, 16, self.latent_side, self.latent_side)
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            sampled = comfy.sample.sample(
                patcher, noise, steps, cfg, sampler, "simple", positive, negative, latent, disable_pbar=True, seed=seed
            ).clone()
        assert sampled.isfinite().all()
        assert sampled.std() > 0.1
        return sampled

    def forward(self, patcher, seed=2):
        """What one call of the transformer gives, on the device; nothing waits for it. ``patcher`` is loaded."""
        with torch.inference_mode():
            inputs = self._inputs(seed, patcher.model.get_dtype())
            return patcher.model.apply_model(*inputs[:2], **inputs[2])

    def _inputs(self, seed, dtype):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        latent, text, pooled = randn(1, 16, self.latent_side, self.latent_side), randn(1, 32, 4096), randn(1, 768)
        timestep, guidance = torch.full((1,), 0.7, device=DEVICE), torch.full((1,), 3.5, device=DEVICE)
        return latent, timestep, {"c_crossattn": text, "y": pooled, "guidance": guidance}


def requested_bytes():
    """What is in use on the device. Not ``memory_allocated``: the allocator leaves up to 1 MiB of a block unsplit."""
    torch.cuda.empty_cache()  # what went while a copy to it was under way counts until the allocator looks again
    return torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
