"""4-bit weights on int8 tensor cores, layer by layer: is it right on this GPU, and what does it win?

    COMFYUI_PATH=~/ComfyUI python benchmarks/int8.py --output results
    COMFYUI_PATH=~/ComfyUI python benchmarks/int8.py --tune --matmul

For each shape of Flux's Linears it prints the time to make int8 rows of the weight, beside bitsandbytes' dequantisation
and beside the way through a dense weight; the errors of these rows; the time and the error of whole Linears, exact and
int8, at the rows that pictures of 512, 1024 and 1536 pixels have, and which of them `int8 where faster` would choose;
and the host's time. Run it with ComfyUI's Python. It also writes ``int8.json``, and ends with an error if a result is
wrong. Before that, ``--tune`` tries other settings of the kernel that makes the rows, and ``--matmul`` a Triton matmul
in the place of comfy-kitchen's.
"""

import json
import statistics
import sys
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive
from inside_comfyui import import_package, use_allocator_of_comfyui
from int8_layers import (
    FASTER,
    SHAPES,
    TEXT_TOKENS,
    Packed,
    by_bitsandbytes,
    device_ms,
    error,
    host_us,
    layer_of,
    rows_of_pictures,
)
from timing import milliseconds

RANK = 16
MOST_ERROR = 0.016
MOST_OF_DEQUANTISING, MOST_HOST_US = 1.3, 60.0
"""What this package wants to hold: the weight kernel beside bitsandbytes', and the host's time beside exact."""


def inputs(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """What activations look like: Gaussian, with a hundredth of the channels 20 times larger, log-normal channels."""
    plain = torch.randn(rows, columns, device="cuda")
    outliers = torch.where(torch.rand(columns, device="cuda") < 0.01, 20.0, 1.0)
    kinds = {"gaussian": plain, "outliers": plain * outliers, "log-normal": plain * torch.randn_like(plain[0]).exp()}
    return {kind: values.bfloat16() for kind, values in kinds.items()}


def measure(name: str, pixels: list[int], repeats: int) -> dict[str, Any]:
    from flux_nf4.low_rank.branch import Patch
    from flux_nf4.nf4_loader.linear import int8_weight, kernels, kitchen, measured

    layer, full = layer_of(SHAPES[name])
    (out, columns), device, dtype = layer.shape, full.device, layer.dtype
    weight: Packed = layer.packed_weight()
    row_scale, rows = torch.zeros(out, device=device), torch.empty(layer.shape, dtype=torch.int8, device=device)
    patch = Patch(
        0,
        torch.randn(out, RANK, device=device, dtype=dtype),
        torch.randn(RANK, columns, device=device, dtype=dtype) * 0.001,
        torch.ones(RANK, device=device),
    )
    patched_scale = torch.zeros(out, device=device)

    def by_kernel(are_known: bool = True) -> None:
        int8_weight.write_int8_rows(*weight, dtype, (), row_scale, rows, scales_are_known=are_known)

    def with_scales() -> None:
        row_scale.zero_()
        by_kernel(False)

    def with_patch(are_known: bool = True) -> None:
        int8_weight.write_int8_rows(*weight, dtype, (patch,), patched_scale, rows, scales_are_known=are_known)

    with_patch(False)
    patched = int8_weight.rotated(kernels.dequantise(*weight, torch.float32) + patch.up.float() @ patch.down.float())
    row: dict[str, Any] = {
        "patched_error": error(rows * patched_scale[:, None], patched),
        "dequantise_ms": device_ms(lambda: by_bitsandbytes(*weight), repeats),
        "with_scales_ms": device_ms(with_scales, repeats),
        "kernel_ms": device_ms(by_kernel, repeats),
        "with_patch_ms": device_ms(with_patch, repeats),
        "dense_ms": device_ms(lambda: kitchen.quantise(kernels.dequantise(*weight, dtype)), repeats),
    }
    by_kernel()
    turned = int8_weight.rotated(kernels.dequantise(*weight, torch.float32))
    row["weight_error"] = error(rows * row_scale[:, None], turned)
    reference, scale = kitchen.quantise(kernels.dequantise(*weight, dtype))
    row["weight_error_dense"] = error(reference * scale[:, None], turned)
    row["scale_off"] = float((row_scale / scale - 1).abs().max())

    counts = sorted(set(rows_of_pictures(name, pixels)))
    measured.timings.clear()
    chosen = {count: measured.measure(measured.Case(layer.shape, count, dtype, device, True)) for count in counts}
    for count in (*counts, 2 * TEXT_TOKENS, TEXT_TOKENS):
        measured.timings[measured.Case(layer.shape, count, dtype, device, True)] = measured.Timing(2.0, 1.0)
    layer.compute_by(FASTER, device, dtype)
    kept = layer.int8

    def exact(input: torch.Tensor) -> torch.Tensor:
        layer.int8 = None
        return layer(input)

    def int8(input: torch.Tensor) -> torch.Tensor:
        layer.int8 = kept
        return layer(input)

    row["linears"] = []
    for count in counts:
        input = inputs(count, columns)["gaussian"]
        times: dict[str, list[float]] = {"exact": [], "int8": []}
        for _ in range(3):
            for way, call in (("exact", exact), ("int8", int8)):
                times[way] += milliseconds(lambda call=call, input=input: call(input), repeats)[1:]  # type: ignore[misc]
        medians = {way: statistics.median(own) for way, own in times.items()}
        on_device = {
            f"{way}_device": device_ms(lambda call=call, input=input: call(input), repeats)  # type: ignore[misc]
            for way, call in (("exact", exact), ("int8", int8))
        }
        decision = {"chosen": chosen[count].int8_is_faster, "measured": chosen[count]._asdict()}
        row["linears"].append({"rows": count} | medians | on_device | decision)
    few = inputs(TEXT_TOKENS, columns)["gaussian"].view(1, TEXT_TOKENS, columns)
    row["host_us"] = {"exact": host_us(lambda: exact(few)), "int8": host_us(lambda: int8(few))}
    row["host_us"]["rows"] = host_us(by_kernel)
    row["host_us"]["matmul"] = host_us(lambda: kitchen.linear(few, rows, row_scale, layer.bias))
    row["errors"] = {}
    bias = layer.bias.float()
    for kind, input in inputs(TEXT_TOKENS * 2, columns).items():
        ideal = torch.nn.functional.linear(input.float(), full)
        ours, exactly = (call(input).float() - bias for call in (int8, exact))
        row["errors"][kind] = {
            "against_exact": error(ours, exactly),
            "nf4": error(exactly, ideal),
            "nf4_int8": error(ours, ideal),
        }
    again = int8(few)
    row["is_repeatable"] = torch.equal(int8(few), again)
    return row


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| layer | dequantise ms | int8 rows | ratio | with LoRA | scales, too | through dense |",
        "|" + "---|" * 7,
    ]
    for name, row in found.items():
        plain = row["dequantise_ms"]
        cells = [row["kernel_ms"], row["kernel_ms"] / plain, *(row[f"{k}_ms"] for k in ("with_patch", "with_scales"))]
        lines.append(f"| {name} | {plain:.4f} | " + " | ".join(f"{c:.4f}" for c in (*cells, row["dense_ms"])) + " |")
    lines += ["", "| layer | rows | exact ms | int8 ms | ratio | on the device alone | chosen |", "|" + "---|" * 7]
    for name, row in found.items():
        for case in row["linears"]:
            ratio, alone = case["int8"] / case["exact"], case["int8_device"] / case["exact_device"]
            lines.append(
                f"| {name} | {case['rows']} | {case['exact']:.4f} | {case['int8']:.4f} | {ratio:.3f} | {alone:.3f} | "
                f"{'int8' if case['chosen'] else 'exact'} |"
            )
    lines += [
        "",
        "| layer | host us exact | int8 | of that: rows | matmul | error of the weight | through dense | with LoRA |",
        "|" + "---|" * 8,
    ]
    for name, row in found.items():
        host = row["host_us"]
        errors = [row[key] for key in ("weight_error", "weight_error_dense", "patched_error")]
        cells_ = " | ".join(f"{e:.4f}" for e in errors)
        times_ = " | ".join(f"{host[key]:.1f}" for key in ("exact", "int8", "rows", "matmul"))
        lines.append(f"| {name} | {times_} | {cells_} |")
    lines += ["", "| layer | input | int8 against exact | NF4 against full | NF4 and int8 |", "|" + "---|" * 5]
    for name, row in found.items():
        for kind, e in row["errors"].items():
            lines.append(f"| {name} | {kind} | {e['against_exact']:.4f} | {e['nf4']:.4f} | {e['nf4_int8']:.4f} |")
    return "\n".join(lines)


def problems(found: dict[str, dict[str, Any]]) -> list[str]:
    said = []
    for name, row in found.items():
        if row["weight_error"] > 0.011 or row["patched_error"] > 0.012 or row["scale_off"] > 0.02:
            said.append(f"{name}: the kernel's rows are not those of the reference")
        for kind, e in row["errors"].items():
            if e["against_exact"] > MOST_ERROR or e["nf4_int8"] > 1.02 * e["nf4"]:
                said.append(f"{name}: the error with {kind} inputs is too large")
        if not row["is_repeatable"]:
            said.append(f"{name}: the same input gives other bits")
    return said


def missed(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is right, but takes longer than this package wants."""
    said = []
    for name, row in found.items():
        ratio, host = row["kernel_ms"] / row["dequantise_ms"], row["host_us"]["int8"] - row["host_us"]["exact"]
        if ratio > MOST_OF_DEQUANTISING:
            said.append(f"{name}: int8 rows take {ratio:.2f} of dequantising (wanted: {MOST_OF_DEQUANTISING})")
        if host > MOST_HOST_US:
            said.append(f"{name}: the host takes {host:.0f} us more than for exact (wanted: {MOST_HOST_US:.0f})")
    return said


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--pixels", type=positive, nargs="+", default=[512, 1024, 1536], help="sides of the pictures")
    parser.add_argument("--repeats", type=positive, default=30, help="timed calls of a turn")
    parser.add_argument("--tune", action="store_true", help="try other settings of the kernel that makes int8 rows")
    parser.add_argument("--matmul", action="store_true", help="try a Triton int8 matmul")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    from flux_nf4.nf4_loader.linear import int8_weight, kitchen

    device = torch.device("cuda", torch.cuda.current_device())
    kitchen_problem = kitchen.problem_on(device, torch.bfloat16)
    triton_problem = int8_weight.problem_on(device, torch.bfloat16)
    print(f"comfy-kitchen: {kitchen_problem or 'works'}; Triton: {triton_problem or 'works'}", flush=True)
    if kitchen_problem or triton_problem:
        sys.exit("int8 cannot be measured here")
    result: dict[str, Any] = {"about": about()}

    def write(name: str, value: Any) -> None:
        result[name] = value
        (given.output / "int8.json").write_text(json.dumps(result, indent=1))

    with torch.inference_mode():
        if given.tune:
            import int8_tuning

            write("tuning", int8_tuning.tune(given.repeats))
            print(int8_tuning.table(result["tuning"]), flush=True)
        if given.matmul:
            import int8_matmul

            write("matmul", int8_matmul.compare(given.pixels, given.repeats))
            print(int8_matmul.table(result["matmul"]), flush=True)
        found = {}
        for name in SHAPES:
            found[name] = measure(name, given.pixels, given.repeats)
            write("layers", found)
    print(table(found))
    print("\n".join(["", *missed(found)]))
    if said := problems(found):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    orderly.run(main)
