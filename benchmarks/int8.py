"""4-bit weights on int8 tensor cores, layer by layer: is it right on this GPU, and what does it win?

    COMFYUI_PATH=~/ComfyUI python benchmarks/int8.py --output results

For each shape of Flux's Linears it prints the time to make int8 rows of the weight, beside bitsandbytes' dequantisation
and beside the way through a dense weight; the errors of these rows; the time and the error of whole Linears, exact and
int8, at the rows that pictures of 512, 1024 and 1536 pixels have; and the host's time. Run it with ComfyUI's Python. It
also writes ``int8.json``, and ends with an error if a result is wrong.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import needs_torch  # noqa: F401
import torch
from about import about
from arguments import begin, parser_for
from inside_comfyui import import_package, use_allocator_of_comfyui
from timing import milliseconds

SHAPES = {
    "qkv": (9216, 3072),
    "proj": (3072, 3072),
    "mlp.0": (12288, 3072),
    "mlp.2": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
}
TEXT_TOKENS = 512
RANK = 16
MOST_ERROR = 0.016


def inputs(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """What activations look like: Gaussian, with a hundredth of the channels 20 times larger, log-normal channels."""
    plain = torch.randn(rows, columns, device="cuda")
    outliers = torch.where(torch.rand(columns, device="cuda") < 0.01, 20.0, 1.0)
    kinds = {"gaussian": plain, "outliers": plain * outliers, "log-normal": plain * torch.randn_like(plain[0]).exp()}
    return {kind: values.bfloat16() for kind, values in kinds.items()}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    milliseconds(call, 3)
    return statistics.median(milliseconds(call, repeats))


def host_us(call: Callable[[], Any], repeats: int = 60) -> float:
    """Of the thread, while the device is far behind; so few calls that none waits for room in the queue."""
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    started = time.thread_time()
    for _ in range(repeats):
        call()
    return 1e6 * (time.thread_time() - started) / repeats


def measure(shape: tuple[int, int], pixels: list[int], repeats: int) -> dict[str, Any]:
    from bitsandbytes import functional as bnb

    from flux_nf4.low_rank.branch import Patch
    from flux_nf4.nf4_loader.checkpoint.quant_state import QuantState
    from flux_nf4.nf4_loader.linear import int8_weight, kernels, kitchen

    torch.manual_seed(0)
    out, columns = shape
    full = torch.randn(shape, device="cuda") * 0.02
    packed, made = bnb.quantize_4bit(full.view(-1), blocksize=64, quant_type="nf4")
    state = QuantState("nf4", 64, shape)
    weight = (packed.view(-1), made.absmax, state)
    bias = torch.randn(out, device="cuda", dtype=torch.bfloat16)
    row_scale, rows = torch.zeros(out, device="cuda"), torch.empty(shape, dtype=torch.int8, device="cuda")
    patch = Patch(
        0,
        torch.randn(out, RANK, device="cuda", dtype=torch.bfloat16),
        torch.randn(RANK, columns, device="cuda", dtype=torch.bfloat16) * 0.001,
        torch.ones(RANK, device="cuda"),
    )
    patched_scale = torch.zeros(out, device="cuda")

    def by_kernel() -> None:
        int8_weight.write_int8_rows(*weight, torch.bfloat16, (), row_scale, rows)

    def with_scales() -> None:
        row_scale.zero_()
        by_kernel()

    def with_patch() -> None:
        int8_weight.write_int8_rows(*weight, torch.bfloat16, (patch,), patched_scale, rows)

    row: dict[str, Any] = {
        "dequantise_ms": median_ms(lambda: kernels.dequantise(*weight, torch.bfloat16), repeats),
        "kernel_ms": median_ms(by_kernel, repeats),
        "with_scales_ms": median_ms(with_scales, repeats),
        "with_patch_ms": median_ms(with_patch, repeats),
        "dense_ms": median_ms(lambda: kitchen.quantise(kernels.dequantise(*weight, torch.bfloat16)), repeats),
    }
    by_kernel()
    dense = kernels.dequantise(*weight, torch.float32)
    turned = int8_weight.rotated(dense)
    row["weight_error"] = error(rows * row_scale[:, None], turned)
    reference, scale = kitchen.quantise(dense.bfloat16())
    row["weight_error_dense"] = error(reference * scale[:, None], turned)
    row["scale_off"] = float((row_scale / scale - 1).abs().max())
    with_patch()
    patched = int8_weight.rotated(dense + patch.up.float() @ patch.down.float())
    row["patched_error"] = error(rows * patched_scale[:, None], patched)

    def exact(input: torch.Tensor) -> torch.Tensor:
        return kernels.gemm_4bit(input, *weight, bias)

    def int8(input: torch.Tensor) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.int8, device="cuda")
        int8_weight.write_int8_rows(*weight, torch.bfloat16, (), row_scale, made)
        return kitchen.linear(input, made, row_scale, bias)

    row["linears"] = []
    for side in pixels:
        tokens = (side // 16) ** 2
        count = tokens + TEXT_TOKENS if out == 21504 or columns == 15360 else tokens
        for number in {count, TEXT_TOKENS} if side == pixels[0] else {count}:
            input = inputs(number, columns)["gaussian"]
            times: dict[str, list[float]] = {"exact": [], "int8": []}
            for _ in range(3):
                for name, call in (("exact", exact), ("int8", int8)):
                    times[name] += milliseconds(lambda call=call, input=input: call(input), repeats)[1:]  # type: ignore[misc]
            row["linears"].append({"rows": number, **{name: statistics.median(t) for name, t in times.items()}})
    few = inputs(TEXT_TOKENS, columns)["gaussian"]
    row["host_us"] = {"exact": host_us(lambda: exact(few)), "int8": host_us(lambda: int8(few))}
    row["errors"] = {}
    for kind, input in inputs(TEXT_TOKENS * 2, columns).items():
        ideal = torch.nn.functional.linear(input.float(), full, bias.float()) - bias.float()
        ours, exactly = (call(input).float() - bias.float() for call in (int8, exact))
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
    lines += ["", "| layer | rows | exact ms | int8 ms | ratio |", "|" + "---|" * 5]
    for name, row in found.items():
        for case in row["linears"]:
            ratio = case["int8"] / case["exact"]
            lines.append(f"| {name} | {case['rows']} | {case['exact']:.4f} | {case['int8']:.4f} | {ratio:.3f} |")
    lines += [
        "",
        "| layer | host us exact | int8 | error of the weight | through dense | with LoRA |",
        "|" + "---|" * 6,
    ]
    for name, row in found.items():
        host = row["host_us"]
        errors = [row[key] for key in ("weight_error", "weight_error_dense", "patched_error")]
        cells_ = " | ".join(f"{e:.4f}" for e in errors)
        lines.append(f"| {name} | {host['exact']:.1f} | {host['int8']:.1f} | {cells_} |")
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


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024, 1536], help="sides of the pictures")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of a turn")
    given = parser.parse_args()
    begin(given)
    use_allocator_of_comfyui()
    import_package()
    from flux_nf4.nf4_loader.linear import int8_weight, kitchen

    device = torch.device("cuda", torch.cuda.current_device())
    kitchen_problem = kitchen.problem_on(device, torch.bfloat16)
    triton_problem = int8_weight.problem_on(device, torch.bfloat16)
    print(f"comfy-kitchen: {kitchen_problem or 'works'}; Triton: {triton_problem or 'works'}", flush=True)
    if kitchen_problem or triton_problem:
        sys.exit("int8 cannot be measured here")
    found = {}
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            found[name] = measure(shape, given.pixels, given.repeats)
            (given.output / "int8.json").write_text(json.dumps({"about": about(), "layers": found}, indent=1))
    print(table(found))
    if said := problems(found):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()
