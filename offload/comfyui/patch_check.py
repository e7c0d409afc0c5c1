"""Which patches of a LoRA can be applied. ComfyUI finds out in the middle of patching, and then only logs it."""

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Patch = Sequence[Any]
"""A patch of ComfyUI's: (strength, adapter or tuple, strength_model, offset, function)."""

_finite = WeakTensorKeyDictionary()
"""Whether each tensor seen so far is finite. A change of strength brings the same tensors again."""


@dataclass(frozen=True)
class Accepted:
    """Patches of a model. ``taken`` are those that fit, by their names; ``skipped`` names the others and says why."""

    taken: dict[Any, Any]
    skipped: tuple[str, ...]


def accepted(
    patches: Mapping[Any, Any],
    earlier: Mapping[str, Sequence[Patch]],
    weight_of: Callable[[str], torch.Tensor | None],
    strength: float,
    strength_model: float,
) -> Accepted:
    """Find the ``patches`` that fit the model.

    Patches of other models are neither taken nor skipped: a LoRA file can have patches for the text encoders, too.

    Args:
        patches: As ``ModelPatcher.add_patches`` takes them: by name, or by (name, offset[, function]).
        earlier: The patches that the model has already, which come before these.
        weight_of: Returns the model's tensor of a name, or None. Only its shape is used; it must be the logical one.
        strength: The factor of the patches.
        strength_model: The factor of the weights.
    """
    fitting: dict[str, list[Patch]] = {}
    taken: dict[Any, Any] = {}
    skipped: list[str] = []
    for name, value in patches.items():
        key, offset, function = name_and_place(name)
        weight = weight_of(key)
        if weight is None:
            continue
        so_far = fitting.setdefault(key, list(earlier.get(key, ())))
        patch = (strength, value, strength_model, offset, function)
        problem = refusal([*so_far, patch], weight, key)
        if problem is None:
            so_far.append(patch)
            taken[name] = value
        else:
            skipped.append(f"{key} ({problem})")
    return Accepted(taken, tuple(skipped))


def name_and_place(name: Any) -> tuple[str, Any, Any]:
    """The tensor's name, the offset and the function in what ``ModelPatcher.add_patches`` takes as a name."""
    return (name, None, None) if isinstance(name, str) else (*name, None)[:3]


def refusal(patches: Sequence[Patch], weight: torch.Tensor, key: str) -> str | None:
    """Why the last of ``patches`` cannot be applied to ``weight`` after the others; None if it can."""
    value = patches[-1][1]
    if isinstance(value, list):
        return None  # the weight of another model, as ComfyUI's merge nodes give it
    for tensor in tree_leaves(getattr(value, "weights", value)):
        if isinstance(tensor, torch.Tensor):
            if tensor.numel() == 0:
                return f"an empty tensor of shape {tuple(tensor.shape)}"
            if not _is_finite(tensor):
                return "values that are not finite"
        elif isinstance(tensor, float) and not math.isfinite(tensor):
            return f"an alpha of {tensor}"
    if all(_fits(patch, weight.shape) for patch in patches):
        return None
    return _complaint(patches, weight, key)


def _fits(patch: Patch, shape: Sequence[int]) -> bool:
    """Whether this is a plain LoRA of the right shapes. Then `_complaint`, which takes milliseconds, is not needed."""
    _, adapter, _, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or len(shape) != 2 or function is not None:
        return False
    up, down, _, mid, dora_scale, reshape = adapter.weights
    axis, start, rows = offset or (0, 0, shape[0])
    return (
        mid is None
        and dora_scale is None
        and reshape is None
        and axis == 0
        and start + rows <= shape[0]
        and up.dim() == down.dim() == 2
        and tuple(up.shape) == (rows, down.shape[0])
        and down.shape[1] == shape[1]
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor not in _finite:
        # float8 has no minimum and maximum of its own.
        low, high = torch.aminmax(tensor.half() if tensor.dtype.itemsize == 1 else tensor)
        _finite[tensor] = bool(torch.isfinite(low) and torch.isfinite(high))
    return bool(_finite[tensor])


def _complaint(patches: Sequence[Patch], weight: torch.Tensor, key: str) -> str | None:
    """The last warning or error of ComfyUI when it patches this weight on the meta device; None if there is none."""
    shaped = torch.empty(weight.shape, device="meta")
    with trial() as messages:
        try:
            comfy.lora.calculate_weight(patches, shaped, key, original_weights={key: [(shaped, None)]})
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return " ".join(messages[-1].replace(key, "").split()) if messages else None


@contextmanager
def trial() -> Iterator[list[str]]:
    """A context for patching a meta tensor. It yields the thread's warnings and errors, which stay out of the log."""
    with _Log() as log, _NoValues():
        yield log.messages


class _NoValues(TorchDispatchMode):
    """Answers 0 where code asks a meta tensor for its value: OFT compares the size of its rotation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **(kwargs or {}))


class _Log(logging.Filter):
    """Keeps this thread's messages out of the log. ``messages`` has its warnings and errors."""

    def __enter__(self) -> "_Log":
        self.messages: list[str] = []
        self._thread = threading.get_ident()
        logging.getLogger().addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        if record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())
        return False
