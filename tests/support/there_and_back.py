"""Moving modules between the CPU and "meta", as if that were a device whose memory nobody may copy back."""

import torch
from torch import nn


class Copied(Exception):  # noqa: N818  what a test looks for, not a fault
    """Values would have come back by a copy."""


def move(module: nn.Module, device: str | torch.device) -> nn.Module:
    """What ``module.to(device)`` does."""
    target = torch.device(device)

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta and target.type == "cpu":
            if tensor.numel():
                raise Copied
            return torch.empty_like(tensor, device="cpu")
        return tensor.to(target)

    return module._apply(convert)
