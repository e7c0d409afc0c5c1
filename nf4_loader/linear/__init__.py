"""How a 4-bit Linear computes: the module, the kernels, and the patches that it takes. Knows no files.

Of ``checkpoint`` it uses ``quant_state`` only, which says how the bytes of a weight are read.
"""
