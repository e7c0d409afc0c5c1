"""The Triton kernel of `int8_matmul`."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def matmul_kernel(  # type: ignore[no-untyped-def]
    x,
    x_scale,
    w,
    w_scale,
    bias,
    out,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """``out = (x @ w.T) * x_scale[:, None] * w_scale[None, :] + bias``: x (M, K) and w (N, K) int8, sums in int32.

    BN divides N, and BK divides K. Programs run through bands of BAND tiles of rows, so that they share what is in L2.
    """
    tile, tiles_n = tl.program_id(0), N // BN
    first = tile // (BAND * tiles_n) * BAND
    height = min((M + BM - 1) // BM - first, BAND)
    in_band = tile % (BAND * tiles_n)
    row = (first + in_band % height) * BM + tl.arange(0, BM)
    column = in_band // height * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    xs = x + (row % M)[:, None] * K + depth[None, :]
    ws = w + column[None, :] * K + depth[:, None]
    sums = tl.full((BM, BN), 0, tl.int32)
    for _ in range(K // BK):
        sums = tl.dot(tl.load(xs), tl.load(ws), sums, out_dtype=tl.int32)
        xs += BK
        ws += BK
    scaled = sums.to(tl.float32) * tl.load(x_scale + row % M)[:, None] * tl.load(w_scale + column)[None, :]
    scaled += tl.load(bias + column).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * N + column[None, :], scaled.to(out.dtype.element_ty), mask=(row < M)[:, None])
