"""Triton's interpreter in the place of its compiler: a kernel's arithmetic on the CPU."""

import importlib
from contextlib import contextmanager

import pytest


@contextmanager
def interpreted(name="patched_weight"):
    """The module ``name`` of `nf4_loader.linear`, with its kernels interpreted.

    In bf16 the interpreter multiplies wrongly: use fp16, or `corrected_interpreter`.
    """
    tl = pytest.importorskip("triton").language
    module = importlib.import_module(f"flux_nf4.nf4_loader.linear.{name}")
    compiled = [importlib.import_module(f"{module.__package__}.{part}") for part in ("weight_kernel", f"{name}_kernel")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions are interpreted only where that was asked for before it was imported.
        patch.setattr(tl, "max", lambda input, axis: tl.reduce(input, axis, tl.standard._elementwise_max))
        _, kernels = map(importlib.reload, compiled)
        for kernel, function in vars(kernels).items():
            if kernel.endswith("kernel"):
                patch.setattr(module, kernel, function)
        yield module
    for each in compiled:
        importlib.reload(each)
