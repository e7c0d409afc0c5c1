"""The vectors that a model's modulation will see in the coming steps of a sampling, computed before they come.

ComfyUI tells the sigmas of all steps to each forward. The vector is a sum of embeddings: of the timestep, which follows
from the sigma, and of what stays as it is in a sampling. Nothing here has to be right: no output is kept that was
computed for other bits than those of its step (`Ahead`).
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...families import Modulation
from ..ahead import bits_of


@dataclass(frozen=True, eq=False)
class _Noted:
    """The sigmas of a forward: ``sigma`` (rows,) of its step, ``sigmas`` (steps + 1,) of all steps."""

    sampling: Any
    sigma: torch.Tensor
    sigmas: torch.Tensor


class ComingSteps:
    """Watches the embedders of ``transformer`` in its forwards, and foretells the sums of what they give.

    ``begin`` is called when a forward begins; what has this method is held weakly.
    """

    begin: weakref.WeakMethod[Callable[[], None]] | None = None

    def __init__(self, transformer: nn.Module, names: Modulation) -> None:
        self._timestep: Any = transformer.get_submodule(names.timestep)
        self._embed: Callable[..., torch.Tensor] | None = getattr(
            sys.modules[type(transformer).__module__], names.embedding, None
        )
        self._noted: _Noted | None = None
        self._input: torch.Tensor | None = None
        self._embeddings: list[torch.Tensor] = []
        steps = weakref.proxy(self)  # the model has the hooks: a cycle would keep its memory until a collection

        def begun(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            steps._forward_begins(inputs[0])

        def embedded(_: nn.Module, __: object, output: torch.Tensor) -> None:
            steps._embeddings.append(output)

        self._timestep.register_forward_pre_hook(torch.compiler.disable(begun))
        for name in (names.timestep, *names.others):
            embedder = getattr(transformer, name, None)
            if embedder is not None:
                embedder.register_forward_hook(torch.compiler.disable(embedded))

    def note(self, sampling: Any, sigma: torch.Tensor, options: Mapping[str, Any]) -> None:
        """A forward is called for ``sigma`` (rows,), with ComfyUI's transformer ``options``."""
        sigmas = options.get("sample_sigmas")
        self._noted = None if sigmas is None else _Noted(sampling, sigma, sigmas)

    def forget(self) -> None:
        """Hold nothing of a sampling. Idempotent."""
        self._noted = self._input = None
        self._embeddings = []

    def foretell(self, vector: torch.Tensor, most: int) -> Sequence[torch.Tensor] | None:
        """The vectors of up to ``most`` steps after the one whose ``vector`` this is; None if it is no step's."""
        noted, embedded = self._noted, self._input
        if noted is None or embedded is None or self._embed is None or len(embedded) != len(noted.sigma):
            return None
        now, *sigmas = torch.cat((noted.sigma[:1], noted.sigmas.to(noted.sigma))).tolist()
        if now not in sigmas:
            return None
        index = sigmas.index(now)
        here = self._vector_at(noted, index, embedded)
        if here.shape != vector.shape or here.dtype != vector.dtype or not torch.equal(bits_of(here), bits_of(vector)):
            return None
        following = [step for step in range(index + 1, len(sigmas)) if sigmas[step] > 0]
        return [self._vector_at(noted, step, embedded) for step in following[:most]]

    def _forward_begins(self, embedded: torch.Tensor) -> None:
        begin = self.begin() if self.begin is not None else None
        if begin is not None:
            begin()
        self._input = embedded
        self._embeddings = []

    def _vector_at(self, noted: _Noted, step: int, like: torch.Tensor) -> torch.Tensor:
        """The vector of a step, computed as the model does it."""
        assert self._embed is not None
        sigma = noted.sigmas[step].to(noted.sigma) * torch.ones_like(noted.sigma)
        embedding = self._embed(noted.sampling.timestep(sigma).float(), like.shape[-1]).to(like.dtype)
        vector: torch.Tensor = self._timestep.forward(embedding)
        for other in self._embeddings[1:]:
            vector = vector + other
        return vector


def note_step(model: Any, sigma: torch.Tensor, options: Mapping[str, Any]) -> None:
    """A forward of a streamed model is called, with these arguments of ComfyUI's ``BaseModel.apply_model``."""
    modulation = model.streaming.modulation
    if modulation is not None:
        modulation.steps.note(model.model_sampling, sigma, options)
