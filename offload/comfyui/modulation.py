"""The modulation in a model's blocks, where its family names it: computed ahead, by a streamer of its own.

The blocks' records, plan and ring are without it. Where all blocks are resident and there is room for its weights as
well, they stay on the device. Elsewhere they pass through a ring in a forward whose outputs are missing, each while the
block before it computes; in all other forwards they stay in RAM. The ring has room for two layers, or one where no
block is streamed. It is kept in between: the forward that needs it computes all blocks, so without it the peak would
be no lower.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ... import families
from ..ahead import AHEAD, Ahead
from ..copies import Copies
from ..plan import BlockSize, ResidencyPlan, plan_for
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
    """Of the device, for the outputs of as many steps as are computed at once, for one prompt in a batch of one.

    More prompts or a larger batch keep up to `MOST_ROWS` / `AHEAD` times as many: 76 MB more for Flux.1. No plan counts
    what grows with a batch; ComfyUI sets memory aside for that, as for the rest of a larger forward.
    """
    _plans: dict[int, tuple[tuple[BlockSize, ...], ResidencyPlan]] = field(default_factory=dict, init=False)

    @property
    def device_bytes(self) -> int:
        """Bytes that its weights have on the device: all of them where they stay, else small parts and the ring."""
        return (self.streamer.plan or self._passing).device_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes of the device that it cannot do without: small parts, ring, and outputs."""
        return self._passing.device_bytes + self.kept_bytes

    @property
    def more_bytes(self) -> int:
        """How many more it takes where its weights stay."""
        return self._staying.device_bytes - self.needed_bytes

    @property
    def stays(self) -> bool:
        """Whether its weights are all on the device."""
        plan = self.streamer.plan
        return plan is not None and not plan.streamed

    @property
    def is_there(self) -> bool:
        """Whether its weights are all on the device: after a change of patches they are before a plan is in effect."""
        return all(block.is_resident for block in self.streamer.blocks)

    def start(self, copies: Copies, *, stays: bool, is_alone: bool) -> None:
        """Have the weights stay on the device of ``copies``, or pass. See `Streamer.start` for errors.

        Where the device has no room for them after all, they pass. ``is_alone``: no block shall be streamed, so they
        have the bus for themselves, and a ring of one layer is enough.
        """
        self.ahead.weights_stay = False
        passing = self._passing_alone if is_alone else self._passing
        self.streamer.start(self._staying if stays else passing, copies, whole_blocks=True)
        self.ahead.weights_stay = self.stays

    def stop(self) -> None:
        """Take the weights off the device. Idempotent."""
        self.ahead.weights_stay = False
        self.streamer.stop()

    def give_up(self) -> None:
        """Have weights that stay pass from now on. No layer is copied for that."""
        self.ahead.weights_stay = False
        self.streamer.change(self._passing)

    def forget(self) -> None:
        """Keep no outputs, and nothing of a sampling. Idempotent."""
        self.ahead.forget()
        self.steps.forget()

    @property
    def _passing(self) -> ResidencyPlan:
        return self._plan_of(0)

    @property
    def _passing_alone(self) -> ResidencyPlan:
        """`_passing` in half the ring: 30 MiB less for Flux.1, and its double blocks wait for the second of two layers.

        That is 19 waits of 0.6 ms (at 55 GB/s) in the forward that computes ahead.
        """
        largest = max(size.streamed for size in self.streamer.sizes(whole_blocks=True))
        return replace(self._passing, staging_bytes=largest)

    @property
    def _staying(self) -> ResidencyPlan:
        return self._plan_of(len(self.streamer.blocks))

    def _plan_of(self, stay: int) -> ResidencyPlan:
        """The plan that keeps so many layers. It is asked for ten times in each sampling, so it is kept."""
        sizes = self.streamer.sizes(whole_blocks=True)
        if stay not in self._plans or self._plans[stay][0] is not sizes:
            self._plans[stay] = sizes, plan_for(sizes, range(stay), 0)
        return self._plans[stay][1]


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
        may_be_compiled=False,
        what="layers of the modulation",
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
