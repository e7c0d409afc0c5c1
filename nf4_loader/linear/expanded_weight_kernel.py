"""The Triton kernel of `expanded_weight`.

A thread reads words of eight codes. The eight values of a word are 16 bytes, which it stores at once; bitsandbytes 0.50
stores values one by one. With bytes in the place of words, and `tl.interleave`, Triton 3.6 compiles to more
instructions. So it does with 16 bytes a load: threads have to exchange what they have read.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # Triton would look for the names of types
    packed,
    absmax,
    nested_absmax,
    nested_map,
    nested_offset,
    code,
    out,
    words,
    BLOCK_WORDS: tl.constexpr,
    IS_NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Expand WORDS of the ``words`` of 4 bytes in ``packed``.

    ``code`` has the sixteen values. BLOCK_WORDS share one absmax; if it IS_NESTED, NESTED_BLOCK values of it share one
    of ``nested_absmax``.
    """
    # What says that nothing is contiguous keeps Triton from loads of 16 bytes: neighbours read 4 bytes each.
    word = tl.max_contiguous(tl.program_id(0) * WORDS + tl.arange(0, WORDS), 1)
    is_there = word < words
    read = tl.load(packed.to(tl.pointer_type(tl.int32)) + word, mask=is_there, other=0)
    block = word // BLOCK_WORDS
    if IS_NESTED:
        codes_of_absmax = tl.load(absmax + block, mask=is_there, other=0).to(tl.int32)
        scale = tl.load(nested_absmax + block // NESTED_BLOCK, mask=is_there, other=0.0)
        factor = tl.load(nested_map + codes_of_absmax) * scale + tl.load(nested_offset)
    else:
        factor = tl.load(absmax + block, mask=is_there, other=0.0)

    value = tl.arange(0, 8)
    codes = (read[:, None] >> ((value ^ 1) * 4)[None, :]) & 15  # the first of a byte is in its high half
    table = tl.load(code + tl.arange(0, 16))
    values = tl.reshape(tl.gather(table, tl.reshape(codes, (8 * WORDS,)), 0), (WORDS, 8))  # from shared memory
    values *= factor[:, None]
    tl.store(out + word[:, None] * 8 + value[None, :], values.to(out.dtype.element_ty), mask=is_there[:, None])
