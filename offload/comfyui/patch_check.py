"""Which patches of a LoRA can be applied. ComfyUI finds out in the middle of patching, and then only logs it."""

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .unread_lora import why_nothing_was_recognised

logger = logging.getLogger(__name__)

Patch = Sequence[Any]

_SHOWN = 4
_finite = WeakTensorKeyDictionary()
"""Whether the tensors seen so far are finite: after a change of strength the same ones come again."""


def accepted(
    patches: Mapping[Any, Any],
    earlier: Mapping[str, Sequence[Patch]],
    weights: Mapping[str, torch.Tensor],
    strength: float,
    strength_model: float,
) -> dict[Any, Any]:
    """What of ``patches`` fits the model; the log says how many that are, and which do not fit and why.

    Args:
        patches: As ``ModelPatcher.add_patches`` takes them: by name, or by (name, offset[, function]).
        earlier: The patches that the model has already, which come before these.
        weights: The model's tensors by name. Only shapes are looked at, and have to be the logical ones.
        strength: What the patches count.
        strength_model: What the weights count.

    Returns:
        Those that fit, and only those of this model: a LoRA file can have others, for the text encoders.
    """
    fitting: dict[str, list[Patch]] = {}
    taken: dict[Any, Any] = {}
    skipped: list[str] = []
    for name, value in patches.items():
        key, offset, function = (name, None, None) if isinstance(name, str) else (*name, None)[:3]
        if key not in weights:
            continue
        so_far = fitting.setdefault(key, list(earlier.get(key, ())))
        patch = (strength, value, strength_model, offset, function)
        problem = refusal([*so_far, patch], weights[key], key)
        if problem is None:
            so_far.append(patch)
            taken[name] = value
        else:
            skipped.append(f"{key} ({problem})")
    _report(len(taken), skipped, strength)
    return taken


def _report(taken: int, skipped: Sequence[str], strength: float) -> None:
    if skipped:
        shown = "; ".join(skipped[:_SHOWN])
        more = f"; and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        logger.warning(
            "LoRA: %d patches applied at strength %g, %d skipped: %s%s", taken, strength, len(skipped), shown, more
        )
    elif taken:
        logger.info(
            "LoRA: %d patches applied at strength %g, all that ComfyUI recognised for this model", taken, strength
        )
    else:
        logger.warning("%s", why_nothing_was_recognised())


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
    """Whether this is a plain LoRA of the right shapes; to try it as `_complaint` does takes milliseconds."""
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
    """What ComfyUI logs or raises when it applies the patches to a weight that has a shape and no values."""
    shaped = torch.empty(weight.shape, device="meta")
    with trial() as messages:
        try:
            comfy.lora.calculate_weight(patches, shaped, key, original_weights={key: [(shaped, None)]})
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return " ".join(messages[-1].replace(key, "").split()) if messages else None


@contextmanager
def trial() -> Iterator[list[str]]:
    """For patching a meta tensor. Gives the warnings and errors of this thread, and keeps them from the log."""
    with _Log() as log, _NoValues():
        yield log.messages


class _NoValues(TorchDispatchMode):
    """Takes a value that is asked of a meta tensor for 0: OFT compares the size of its rotation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return func(*args, **(kwargs or {}))


class _Log(logging.Filter):
    """Keeps from the log what this thread says meanwhile; ``messages`` has its warnings and errors."""

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
