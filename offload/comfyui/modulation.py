"""The modulation in a model's blocks, where its family names it: computed ahead, by a streamer of its own.

The blocks' records, plan and ring are without it. Where all blocks are resident and there is room for its weights as
well, they stay on the device. Elsewhere they pass through a ring of two layers in a forward whose outputs are missing;
in all other forwards they stay in RAM:

- Where blocks are streamed, each layer arrives while the block before it computes. The ring is kept in between: the
  forward that needs it computes all blocks, so without it the peak would be no lower.
- Where all blocks are resident, so that little memory is left, all layers pass when the first one is called. The ring
  is gone before the blocks compute: 60 MiB less at the peak. That forward waits for the bus (33 ms for Flux.1's 1.8 GB
  at 55 GB/s) and for the host, which sets the ring up anew (some 10 ms).
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ... import families
from ...memory import is_out_of_memory
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
        """Bytes that its weights have on the device between forwards: all of them where they stay, none where they pass
        all at once, else small parts and the ring."""
        return 0 if self.ahead.bring_all is not None else (self.streamer.plan or self._passing).device_bytes

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

    def start(self, copies: Copies, *, stays: bool, at_once: bool) -> None:
        """Have the weights stay on the device of ``copies``, or pass: all ``at_once``, or each with its block.

        Where the device has no room for them after all, they pass. See `Streamer.start` for errors.
        """
        self.ahead.weights_stay = False
        self.ahead.bring_all = None
        if stays or not at_once:
            try:
                self.streamer.start(self._staying if stays else self._passing, copies, whole_blocks=True)
            except BaseException as error:
                if not (at_once and is_out_of_memory(error)):
                    raise
            self.ahead.weights_stay = self.stays
        if at_once and not self.ahead.weights_stay:
            if self.streamer.plan is not None:
                self.streamer.stop()
            self.ahead.bring_all = partial(self._brought, copies)

    @contextmanager
    def _brought(self, copies: Copies) -> Iterator[None]:
        """The ring is there, and the weights pass."""
        self.streamer.start(self._passing, copies, whole_blocks=True)
        try:
            yield
        finally:
            self.streamer.stop()

    def stop(self) -> None:
        """Take the weights off the device. Idempotent."""
        self.ahead.weights_stay = False
        self.ahead.bring_all = None
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
