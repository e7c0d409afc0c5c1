"""What Triton's interpreter (3.6) does otherwise than a GPU, corrected: bf16, and loops up to a number of run time."""

import numpy as np
import torch


def correct(patch):
    """For as long as ``patch``, a `pytest.MonkeyPatch`, lasts.

    The interpreter keeps bf16 as its bits in an uint16. It multiplies these as if they were numbers, and cuts a float
    off where GPUs round it to the nearest. A number it keeps as an array of one, which numpy 2.4 does not take for one.
    """
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, handle, dtype):
        if (handle.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, handle, dtype)
        bits = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
    patch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
    patch.setattr(interpreter, "_patch_lang_tensor", patched)
