"""What Flux.1's text encoders give for a prompt, with random values."""

from typing import Any

import torch


def prompt(seed: int = 0, tokens: int = 8) -> list[list[Any]]:
    """A conditioning of ComfyUI's: text (1, tokens, 4096) and pooled (1, 768)."""
    generator = torch.Generator().manual_seed(seed)
    pooled, text = torch.randn(1, 768, generator=generator), torch.randn(1, tokens, 4096, generator=generator)
    return [[text, {"pooled_output": pooled}]]
