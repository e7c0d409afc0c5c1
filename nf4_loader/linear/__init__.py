"""How a 4-bit Linear computes. Knows no files.

``linear4bit`` (the module and the tensors that it holds), ``dense_view`` (its weight, as others see it), ``matmul``
(the table of ways to multiply), ``kernels`` (dequantise, and bitsandbytes' matmul), ``patched_weight`` (dequantise with
a LoRA in it). Of ``checkpoint`` they use ``quant_state`` only, which says how the bytes of a weight are read.
"""
