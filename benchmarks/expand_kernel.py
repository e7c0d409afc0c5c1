"""The Triton kernel of `expand_kernels`: an NF4 weight in blocks of 64 is expanded, with the bits of bitsandbytes.

A thread reads words of eight codes. The eight values of a word are 16 bytes, which it stores at once; bitsandbytes 0.50
stores values one by one. With bytes in the place of words, and `tl.interleave`, Triton 3.6 compiles to more
instructions. So it does with 16 bytes a load: threads have to exchange what they have read.
"""

import triton
import triton.language as tl

from flux_nf4.nf4_loader.checkpoint.quant_state import NF4_CODE

_CODE = tl.constexpr(NF4_CODE)


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
    packed, absmax, code, out, words, LOOKUP: tl.constexpr, WORDS: tl.constexpr
) -> None:
    """Expand WORDS of the ``words`` of 4 bytes in ``packed``. ``code`` has the sixteen values.

    LOOKUP is how a value is found: "load", in global memory, as bitsandbytes 0.50 does; "gather", in shared memory;
    "tree", by the bits of its code alone, as older versions of bitsandbytes do.
    """
    # What says that nothing is contiguous keeps Triton from loads of 16 bytes: neighbours read 4 bytes each.
    word = tl.max_contiguous(tl.program_id(0) * WORDS + tl.arange(0, WORDS), 1)
    is_there = word < words
    read = tl.load(packed.to(tl.pointer_type(tl.int32)) + word, mask=is_there, other=0)
    factor = tl.load(absmax + (word >> 3), mask=is_there, other=0.0)  # eight words are a block

    value = tl.arange(0, 8)
    codes = (read[:, None] >> ((value ^ 1) * 4)[None, :]) & 15  # the first of a byte is in its high half
    if LOOKUP == "load":
        values = tl.load(code + codes)
    elif LOOKUP == "gather":
        table = tl.load(code + tl.arange(0, 16))
        values = tl.reshape(tl.gather(table, tl.reshape(codes, (8 * WORDS,)), 0), (WORDS, 8))
    else:
        ones, twos, fours = (codes & 1) != 0, (codes & 2) != 0, (codes & 4) != 0
        values = tl.where((codes & 8) != 0, _one_of_8(ones, twos, fours, 8), _one_of_8(ones, twos, fours, 0))
    values *= factor[:, None]
    tl.store(out + word[:, None] * 8 + value[None, :], values.to(out.dtype.element_ty), mask=is_there[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _one_of_8(ones, twos, fours, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where(fours, _one_of_4(ones, twos, FIRST + 4), _one_of_4(ones, twos, FIRST))


@triton.jit  # type: ignore[untyped-decorator]
def _one_of_4(ones, twos, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    high = tl.where(ones, _CODE[FIRST + 3], _CODE[FIRST + 2])
    return tl.where(twos, high, tl.where(ones, _CODE[FIRST + 1], _CODE[FIRST]))
