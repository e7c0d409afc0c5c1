"""Triton's interpreter in the place of its compiler: a kernel's arithmetic on the CPU."""

import importlib
from contextlib import contextmanager

import pytest


@contextmanager
def interpreted():
    """`patched_weight`, with its kernel interpreted."""
    pytest.importorskip("triton")
    from flux_nf4.nf4_loader.linear import patched_weight, patched_weight_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(patched_weight, "kernel", importlib.reload(patched_weight_kernel).kernel)
        yield patched_weight
    importlib.reload(patched_weight_kernel)
