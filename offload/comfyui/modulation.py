"""The modulation in a model's blocks, where its family names it: computed ahead, by a streamer of its own.

The blocks' records, plan and ring are without it. In a forward whose outputs are missing its weights pass through a
ring of two layers beside the blocks' ring, each while the block before it computes; in all others they stay in RAM.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import families
from ..ahead import AHEAD, Ahead
from ..copies import Copies
from ..plan import ResidencyPlan, plan_for
from ..streamer import Streamer
from .coming_steps import ComingSteps
from .lasting import lasting_allocations


@dataclass(frozen=True, eq=False)
class Modulated:
    """Layers of a model that are computed ahead, what moves their weights, and what foretells their inputs."""

    ahead: Ahead
    streamer: Streamer
    steps: ComingSteps
    kept_bytes: int
    """Of the device, for the outputs of as many steps as are computed at once, in a batch of one."""

    @property
    def device_bytes(self) -> int:
        """Bytes that its weights need on the device: the small parts, and the ring."""
        return self._plan.device_bytes

    def start(self, copies: Copies) -> None:
        """Have the weights streamed by ``copies``. See `Streamer.start` for errors."""
        self.streamer.start(self._plan, copies, whole_blocks=True)

    def forget(self) -> None:
        """Keep no outputs, and nothing of a sampling. Idempotent."""
        self.ahead.forget()
        self.steps.forget()

    @property
    def _plan(self) -> ResidencyPlan:
        return plan_for(self.streamer.sizes(whole_blocks=True), (), 0)


def modulated(
    model: Any,
    blocks: Sequence[nn.Module],
    mapped: Mapping[nn.Module, Mapping[str, torch.Tensor]],
    each: Callable[[int], None],
    twin: Modulated | None,
) -> Modulated | None:
    """Set the modulation in ``blocks`` of ``model`` apart; None where it has none or its family is not known.

    For ``mapped`` and ``twin`` see `attach_streaming`. ``each`` is called with the index of a block for each of its
    layers that has moved.
    """
    layers, names = modulation_in(model, blocks), _names(model)
    if names is None or not layers:
        return None
    steps = ComingSteps(model.diffusion_model, names)
    ahead = Ahead(tuple(layers), steps.foretell, lasting_allocations)
    steps.begin = weakref.WeakMethod(ahead.begin)
    indices = tuple(layers.values())
    of_layers = {module: tensors for module, tensors in mapped.items() if module in ahead.modules}
    streamer = Streamer(
        {"modulation": ahead.blocks},
        of_layers,
        lambda index: each(indices[index]),
        None if twin is None else twin.streamer.arena,
    )
    return Modulated(ahead, streamer, steps, AHEAD * _output_bytes(model, ahead))


def modulation_in(model: Any, blocks: Sequence[nn.Module]) -> dict[nn.Module, int]:
    """The modulation in ``blocks`` of ``model`` in the order in which a forward calls it, and the index of its block;
    none where its family is not known."""
    names = _names(model)
    if names is None:
        return {}
    indices = {block: index for index, block in enumerate(blocks)}
    return {
        layer: indices[block]
        for of_list, layers in names.layers.items()
        for block in getattr(model.diffusion_model, of_list, ())
        if block in indices
        for layer in (getattr(block, name, None) for name in layers)
        if isinstance(layer, nn.Module)
    }


def _names(model: Any) -> families.Modulation | None:
    """What the family of a model of ComfyUI's calls its modulation."""
    config = getattr(model, "model_config", None)
    family = families.family_of_model(config.unet_config.get("image_model")) if config is not None else None
    return family.modulation if family is not None else None


def _output_bytes(model: Any, ahead: Ahead) -> int:
    """Bytes of what the layers give for one row."""
    dtype: torch.dtype = model.manual_cast_dtype or model.get_dtype()
    return dtype.itemsize * sum(module.out_features for module in ahead.modules if isinstance(module, nn.Linear))
