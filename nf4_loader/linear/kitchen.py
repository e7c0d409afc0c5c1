"""comfy-kitchen's int8 matmul, on the int8 tensor cores that GPUs have since Turing. ComfyUI requires it since 0.27.

Each call of its functions chooses a backend anew, which takes the host longer than the launch. Here one is chosen once
for each type of device, and on NVIDIA GPUs its kernels are called without the code around them (`kitchen_kernels`).
"""

import functools
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # it is public, but not in the stubs

from ...memory import is_out_of_memory
from . import kitchen_kernels
from .kitchen_kernels import CODES

logger = logging.getLogger(__name__)

GROUP = kitchen_kernels.GROUP
"""Columns that ConvRot rotates together."""

_LEAST_CUDA, _LEAST_CAPABILITY = (13, 0), (7, 5)
"""comfy-kitchen's kernels are built for this CUDA, and need int8 tensor cores."""


class _Functions(NamedTuple):
    """The functions of the backend for a device."""

    int8_linear: Callable[..., torch.Tensor]
    quantize_int8_convrot_weight: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def linear(input: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``input @ weight.T + bias``, where ``rows * row_scale[:, None]`` is the rotated weight.

    The input (..., in) is rotated and rounded to int8, with a scale for each of its rows. The sums are exact integers,
    so equal arguments give equal bits. ``rows`` are int8 (out, in), ``row_scale`` is fp32 (out,), ``bias`` (out,) in
    input's dtype or None. Returns a fresh tensor (..., out) in input's dtype.
    """
    if torch.compiler.is_compiling():
        code = CODES[input.dtype]
        return torch.ops.comfy_kitchen.int8_linear(input, rows, row_scale, bias, code, True, GROUP)
    return _linear_on(input.device, input.dtype)(input, rows, row_scale, bias)


@functools.cache
def _linear_on(device: torch.device, dtype: torch.dtype) -> kitchen_kernels.Linear:
    def theirs(
        input: torch.Tensor, rows: torch.Tensor, row_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        own = _functions(device.type).int8_linear
        return own(input, rows, row_scale, bias, out_dtype=dtype, convrot=True, convrot_groupsize=GROUP)

    if device.type != "cuda":
        return theirs
    from comfy_kitchen.backends import cuda

    return kitchen_kernels.faster(theirs, cuda, device, dtype)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense weight (out, in) as `linear` takes it: rows and row_scale."""
    compiled = torch.ops.comfy_kitchen if torch.compiler.is_compiling() else _functions(weight.device.type)
    rows, scale = compiled.quantize_int8_convrot_weight(weight, GROUP)
    return rows, scale.view(-1)


@functools.cache
def _functions(device_type: str) -> _Functions:
    from comfy_kitchen import registry

    backend = "cuda" if device_type == "cuda" else "eager"
    own = (registry.get_implementation(name, backend=backend) for name in _Functions._fields)
    return _Functions(*map(_with_fast_export, own))


def _with_fast_export(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of comfy-kitchen's ``function`` that hands tensors to its kernels by `to_dlpack`.

    It does so by ``Tensor.__dlpack__``, whose checks take the host 3 us or more for each of ten tensors, most of what a
    call takes. Its own tensors and `linear`'s pass all of them.
    """
    variables = getattr(function, "__globals__", {})
    if _EXPORT not in variables:
        return function
    copy = FunctionType(
        function.__code__,
        {**variables, _EXPORT: to_dlpack},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_EXPORT = "_wrap_for_dlpack"
"""comfy-kitchen's function that exports a tensor, in 0.2.31 to 0.2.40."""


@functools.cache
def works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `linear` can be used, and is more than a slow stand-in: tried once; where it cannot, the log says why.

    Raises:
        RuntimeError: there is too little memory for that; another time there may be enough.
    """
    problem = problem_on(device, dtype)
    if problem is not None:
        logger.warning("NF4: int8 cannot be used here (%s), so everything is computed exactly", problem)
    return problem is None


def problem_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `linear` is of no use on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and the model computes on {'AMD' if torch.version.hip else device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, and the model computes in {dtype}"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no int8 tensor cores (GeForce 20 series and later have)"
    if tuple(map(int, str(torch.version.cuda).split(".")[:2])) < _LEAST_CUDA:
        return f"this PyTorch is built for CUDA {torch.version.cuda}, and comfy-kitchen needs 13 (torch cu130 or later)"
    try:
        return trial(device, dtype)
    except ImportError as error:
        return f"comfy-kitchen cannot be imported ({error}); ComfyUI 0.27 and later bring it"
    except Exception as error:  # whatever an older comfy-kitchen, an old driver or a new GPU leads to
        if is_out_of_memory(error):
            raise
        return f"comfy-kitchen's int8 fails here ({type(error).__name__}: {error})"


def trial(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try `quantise` and `linear` on a small weight. Returns why they are not right, or None."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    weight, input, bias = random(64, 2 * GROUP), random(32, 2 * GROUP), random(64)
    expected = torch.nn.functional.linear(input.float(), weight.float(), bias.float())
    found = linear(input, *quantise(weight), bias).float()
    if found.shape != expected.shape or not (found - expected).norm() < 0.04 * expected.norm():
        return "comfy-kitchen's int8 gives other values than it should here"
    return None
