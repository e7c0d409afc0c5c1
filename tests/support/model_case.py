"""What a case of `model_families` is, and how to make its model and run it."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.supported_models
import torch


@dataclass(frozen=True)
class Tensor:
    """A random input of this shape; whole numbers below ``below`` if that is given."""

    shape: tuple[int, ...]
    below: int | None = None
    ones: bool = False

    def make(self, generator):
        if self.ones:
            return torch.ones(self.shape)
        if self.below is not None:
            return torch.randint(0, self.below, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator) * 0.5


@dataclass(frozen=True)
class Case:
    """``supported`` is a class of ``comfy.supported_models``; ``stands_for`` are others that run the same model."""

    supported: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    inputs: dict[str, Any] = field(default_factory=dict)
    stands_for: tuple[str, ...] = ()
    state: Callable[[], dict[str, torch.Tensor]] = dict


def t(*shape, **kind):
    return Tensor(shape, **kind)


def made(value, generator):
    """``value`` with each `Tensor` in it made."""
    if isinstance(value, Tensor):
        return value.make(generator)
    if isinstance(value, dict):
        return {key: made(of, generator) for key, of in value.items()}
    return [made(of, generator) for of in value] if isinstance(value, list) else value


def is_there(case):
    return hasattr(comfy.supported_models, case.supported)


def known(parameters, config):
    """What of ``config`` this version's ``parameters`` have: some are newer."""
    names = {*inspect.signature(parameters).parameters, "image_model"}
    return {key: value for key, value in config.items() if key in names}


def known_to(module, name, config):
    """`known` for class ``name`` of ``module``, which may be newer as a whole: then all of ``config``."""
    try:
        parameters = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return config
    return known(parameters, config)


def make_model(case):
    """ComfyUI's model of a case with random weights in fp32."""
    supported = getattr(comfy.supported_models, case.supported)
    config = supported({**supported.unet_config, **case.config})
    config.unet_config |= case.config  # some classes say themselves what their files do not tell
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = config.get_model(case.state(), "")
    # All that a file would have, buffers too: some of them begin as memory that nobody has written to.
    values = [*model.parameters(), *model.diffusion_model.state_dict().values()]
    with torch.no_grad():
        for value in values:
            if value.is_floating_point():
                value.copy_(torch.randn_like(value) * 0.05)
    # As ComfyUI makes models, in inference mode: torch multiplies in another order where a gradient might be wanted.
    return model.eval().requires_grad_(False)


def forward(model, case):
    """What the model says of a fixed latent."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(case.latent, generator=generator)
    inputs = made(case.inputs, generator)
    sigma = torch.full((case.latent[0],), 0.7)
    with torch.no_grad():
        return model.apply_model(latent, sigma, **inputs).clone()


def seconds():
    """What a file of Stable Audio has beside the model: how it tells a length."""
    from comfy.ldm.audio.embedders import NumberConditioner

    names = [f"conditioner.conditioners.seconds_{of}" for of in ("start", "total")]
    return {f"{name}.{key}": value for name in names for key, value in NumberConditioner(768).state_dict().items()}
