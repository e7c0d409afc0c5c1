"""Which setting of the kernel that makes int8 rows is the fastest on this GPU: a part of `int8`."""

from functools import partial
from typing import Any

import torch
from int8_layers import SHAPES, Packed, by_bitsandbytes, device_ms, error, layer_of

SETTINGS = ((8, 4), (16, 4), (32, 4), (16, 8), (32, 8))
"""Rows of a program, and its warps."""


def tune(repeats: int) -> list[dict[str, Any]]:
    """For each shape and setting: milliseconds beside those of bitsandbytes' dequantisation, and what is wrong."""
    from flux_nf4.nf4_loader.linear import int8_weight, kernels

    used = int8_weight.ROWS, int8_weight.WARPS
    found = []
    for name, shape in SHAPES.items():
        layer, _ = layer_of(shape)
        weight: Packed = layer.packed_weight()
        plain_ms = device_ms(partial(by_bitsandbytes, *weight), repeats)
        turned = int8_weight.rotated(kernels.dequantise(*weight, torch.float32))
        for setting in SETTINGS:
            int8_weight.ROWS, int8_weight.WARPS = setting
            try:
                found.append({"layer": name, "setting": setting} | _timed(weight, turned, plain_ms, repeats))
            except Exception as problem:  # a setting may need more than this GPU has
                found.append({"layer": name, "setting": setting, "problem": f"{type(problem).__name__}: {problem}"})
    int8_weight.ROWS, int8_weight.WARPS = used
    return found


def _timed(weight: Packed, turned: torch.Tensor, plain_ms: float, repeats: int) -> dict[str, Any]:
    from flux_nf4.nf4_loader.linear import int8_weight

    row_scale = torch.zeros(len(turned), device=turned.device)
    rows = torch.empty(turned.shape, dtype=torch.int8, device=turned.device)

    def write(are_known: bool) -> None:
        int8_weight.write_int8_rows(*weight, torch.bfloat16, (), row_scale, rows, scales_are_known=are_known)

    write(False)
    ms = device_ms(lambda: write(True), repeats)
    off = error(rows * row_scale[:, None], turned)
    problem = {} if off < 0.011 else {"problem": f"wrong values: error {off:.4f}"}
    return {"ms": ms, "ratio": ms / plain_ms} | problem


def table(found: list[dict[str, Any]]) -> str:
    """A line for each layer; then the fastest right setting for all, by the sum of a forward, and the worst ratio."""
    lines = ["| layer | " + " | ".join(f"{rows} rows, {warps} warps" for rows, warps in SETTINGS) + " |"]
    lines.append("|" + "---|" * (len(SETTINGS) + 1))
    for name in SHAPES:
        own = {row["setting"]: row for row in found if row["layer"] == name}
        cells = [own[s].get("problem") or f"{own[s]['ms']:.4f} ({own[s]['ratio']:.2f})" for s in SETTINGS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for setting in SETTINGS:
        own_rows = [row for row in found if row["setting"] == setting]
        if any("problem" in row for row in own_rows):
            lines.append(f"{setting}: cannot be used")
        else:
            total, worst = sum(row["ms"] for row in own_rows), max(row["ratio"] for row in own_rows)
            lines.append(f"{setting}: {total:.4f} ms for one layer of each kind, at most {worst:.2f} of bitsandbytes")
    return "\n".join(lines)
