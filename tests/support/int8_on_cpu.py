"""int8 on the CPU: comfy-kitchen's eager code multiplies, and plain torch does what the Triton kernels do."""

from contextlib import contextmanager

import pytest
import torch

from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
from flux_nf4.nf4_loader.linear import by_table, int8_weight, kitchen, measured


def launch(packed, absmax, row_scale, rows, quant_type, blocksize, dtype, patches, scales_are_known):
    """As `int8_weight._launch`."""
    weight = by_table.dequantise(packed, absmax, QuantState(quant_type, blocksize, rows.shape), torch.float32)
    for start, up, down, scale in patches:
        weight[start : start + len(up)] += (up.float() * scale) @ down.float()
    turned = int8_weight.rotated(weight)
    if not scales_are_known:
        row_scale.copy_(torch.where(row_scale == 0, turned.abs().amax(1) / 127, row_scale))
    rows.copy_((turned / row_scale[:, None]).round().clamp(-127, 127))


@contextmanager
def int8_on_cpu(*, by_kernel=True, is_faster=True):
    """``by_kernel``: with the kernels' stand-in, or else as without Triton. ``is_faster``: what measuring says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kitchen, "works_on", lambda device, dtype: True)
        patch.setattr(int8_weight, "works_on", lambda device, dtype: by_kernel)
        patch.setattr(int8_weight, "_launch", launch)
        patch.setattr(measured, "measure", lambda case: measured.Timing(2.0 if is_faster else 1.0, 1.0))
        patch.setattr(measured, "timings", {})
        yield
