"""How a 4-bit Linear computes. Knows no files.

``linear4bit`` is the module and the tensors that it holds, ``dense_view`` its weight as others see it. ``matmul`` is
the table of ways to multiply: exact ones with ``kernels`` (dequantise, and bitsandbytes' matmul) and ``patched_weight``
(dequantise with a LoRA in it), and ``int8`` with ``int8_weight`` and ``kitchen``, where ``measured`` finds it faster.
``kernels`` expands by the Triton kernel of ``expanded_weight``, by bitsandbytes, or ``by_table``. The Triton kernels
are in ``expanded_weight_kernel``, ``patched_weight_kernel`` and ``int8_weight_kernel``; the last two have
``weight_kernel`` in common, and all of them the small weights of ``triton_trial``. ``kitchen_kernels`` calls
comfy-kitchen's without their wrappers. Of ``checkpoint`` they use ``quant_state`` only, which says how the bytes of a
weight are read.
"""
