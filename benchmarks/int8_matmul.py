"""Whether a Triton int8 matmul would be worth an entry of its own: a part of `int8`, and not in the package."""

from functools import partial
from typing import Any

import torch
import triton
from int8_layers import OF_EACH, SHAPES, Packed, device_ms, error, layer_of, rows_of_pictures
from matmul_kernel import matmul_kernel

SETTINGS = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 4), (128, 256, 64, 8, 4), (64, 256, 128, 4, 3))
"""Rows, columns and depth of a tile; warps; stages."""


def matmul(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor,
    setting: tuple[int, int, int, int, int],
) -> torch.Tensor:
    """Of quantised activations x (M, K) with x_scale (M,), and of a weight as `kitchen.linear` takes it."""
    (m, k), n = x.shape, len(rows)
    bm, bn, bk, warps, stages = setting
    out = torch.empty(m, n, dtype=bias.dtype, device=x.device)
    grid = (triton.cdiv(m, bm) * (n // bn),)
    sizes = {"BM": bm, "BN": bn, "BK": bk, "BAND": 8, "num_warps": warps, "num_stages": stages}
    matmul_kernel[grid](x, x_scale, rows, row_scale, bias, out, m, n, k, **sizes)
    return out


def compare(pixels: list[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of whole Linears, with bringing weight and activations to int8: exact, comfy-kitchen, this."""
    return [
        _compared(name, rows, side, repeats)
        for side in pixels
        for name in SHAPES
        for rows in rows_of_pictures(name, [side])
    ]


def _compared(name: str, count: int, side: int, repeats: int) -> dict[str, Any]:
    from flux_nf4.nf4_loader.linear import int8_weight, kernels, kitchen

    layer, _ = layer_of(SHAPES[name])
    weight: Packed = layer.packed_weight()
    bias = layer.bias.data
    input = torch.randn(count, layer.in_features, device=bias.device, dtype=bias.dtype)
    row_scale = torch.zeros(layer.out_features, device=bias.device)

    def rows(are_known: bool = True) -> torch.Tensor:
        made = torch.empty(layer.shape, dtype=torch.int8, device=bias.device)
        int8_weight.write_int8_rows(*weight, bias.dtype, (), row_scale, made, scales_are_known=are_known)
        return made

    def by_triton(setting: tuple[int, int, int, int, int]) -> torch.Tensor:
        return matmul(*kitchen.quantise(input), rows(), row_scale, bias, setting)

    expected = kitchen.linear(input, rows(False), row_scale, bias)
    times = {}
    for setting in SETTINGS:
        try:
            if (off := error(by_triton(setting), expected)) > 0.008:
                raise ValueError(f"wrong values: error {off:.4f}")
            times[setting] = device_ms(partial(by_triton, setting), repeats)
        except Exception as problem:  # a setting may need more than this GPU has
            print(f"{name}, {count} rows, {setting}: {type(problem).__name__}: {problem}", flush=True)
    best = min(times, key=lambda setting: times[setting], default=None)
    return {
        "pixels": side,
        "layer": name,
        "rows": count,
        "exact_ms": device_ms(lambda: kernels.gemm_4bit(input, *weight, bias), repeats),
        "kitchen_ms": device_ms(lambda: kitchen.linear(input, rows(), row_scale, bias), repeats),
        "triton_ms": None if best is None else times[best],
        "setting": best,
        "weight_ms": device_ms(rows, repeats),
        "input_ms": device_ms(lambda: kitchen.quantise(input), repeats),
    }


def table(found: list[dict[str, Any]]) -> str:
    """A line for each layer; then what a whole forward would gain, in milliseconds, if all that win were by Triton."""
    lines = ["| pixels | layer | rows | exact ms | comfy-kitchen | Triton | setting | of that: weight, input |"]
    lines.append("|" + "---|" * 8)
    for row in found:
        triton_ms = "-" if row["triton_ms"] is None else f"{row['triton_ms']:.4f}"
        lines.append(
            f"| {row['pixels']} | {row['layer']} | {row['rows']} | {row['exact_ms']:.4f} | {row['kitchen_ms']:.4f} | "
            f"{triton_ms} | {row['setting']} | {row['weight_ms']:.4f}, {row['input_ms']:.4f} |"
        )
    lines.append("")
    for side in dict.fromkeys(row["pixels"] for row in found):
        own = [row for row in found if row["pixels"] == side]
        counts = [OF_EACH // sum(row["layer"] == other["layer"] for other in own) for row in own]
        exact_ms = sum(count * row["exact_ms"] for count, row in zip(counts, own, strict=True))
        for what, taken in (("linear1", ["linear1"]), ("all layers", list(SHAPES))):
            gain = sum(
                count * max(0.0, row["exact_ms"] - (row["triton_ms"] or row["exact_ms"]))
                for count, row in zip(counts, own, strict=True)
                if row["layer"] in taken
            )
            lines.append(
                f"{side}: {what} by Triton would take {gain:.2f} ms less a forward, {100 * gain / exact_ms:.1f} % of "
                f"the {exact_ms:.1f} ms that all Linears take, which are a part of the forward"
            )
    return "\n".join(lines)
