"""What it costs when host memory cannot be pinned: a full-size NF4 Flux, all blocks streamed, pinned in several ways.

    COMFYUI_PATH=~/ComfyUI python benchmarks/pinning.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/pinning.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors

Run it with ComfyUI's Python. Without a checkpoint it makes one with random weights (7 GB, kept in ``--folder``).
Prints a table and writes ``pinning.json``. Every variant runs in the same process, in turns, and each number is a
median; compare ratios within one run. Outputs of all variants must be bit-identical, a refused registration must leave
no pending error, and the memory of the worker must go with its last user, or it fails.
"""

import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from cases import Case
from inside_comfyui import import_package
from timing import copy_gbps, milliseconds
from weights import Files

GIB = 2**30


@dataclass(frozen=True)
class Variant:
    """How much of the arena is pinned, and MiB of each bounce buffer for the rest (0: plain copies)."""

    pinned_share: float
    buffer_mib: int = 0


VARIANTS = {
    "all pinned": Variant(1.0),
    "half pinned, rest bounced": Variant(0.5, 32),
    "none pinned, bounced": Variant(0.0, 32),
    "none pinned, bounced by 8 MiB": Variant(0.0, 8),
    "none pinned, pageable": Variant(0.0),
}


def copies_for(variant: Variant, device: torch.device) -> Any:
    from flux_nf4.offload.bounce import BouncedCopies
    from flux_nf4.offload.copies import copies_to

    copies: Any = copies_to(device)
    return BouncedCopies(copies, variant.buffer_mib << 20) if variant.buffer_mib else copies


def switch(streamer: Any, variant: Variant, plan: Any, device: torch.device) -> float:
    """Stream as ``variant`` says; returns the seconds that pinning took."""
    streamer.stop()
    streamer.arena.unpin()
    started = time.monotonic()
    streamer.pin(int(streamer.arena.nbytes * variant.pinned_share), device)
    seconds = time.monotonic() - started
    streamer.start(plan, copies_for(variant, device))
    return seconds


def host_milliseconds(forward: Callable[[], Any]) -> float:
    """How long the calling thread is busy with one forward."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    forward()
    return 1000 * (time.perf_counter() - started)


def fill_gbps(record: torch.Tensor) -> float:
    """GB/s at which one thread's copies fill a bounce buffer from host memory."""
    buffer = torch.empty(32 << 20, dtype=torch.uint8, pin_memory=True)
    times = []
    for start in range(0, record.nbytes - buffer.nbytes, buffer.nbytes):
        started = time.perf_counter()
        buffer.copy_(record[start : start + buffer.nbytes])
        times.append(time.perf_counter() - started)
    return buffer.nbytes / statistics.median(times) / 1e9


def require_clean_refusal(arena: Any, device: torch.device) -> int:
    """Have the driver refuse a registration; returns its error code."""
    from flux_nf4.offload.pinning import CudaRegistrar

    error = CudaRegistrar(device).register(arena.records[0].data_ptr(), 4096)  # it is registered already
    if not error:
        raise SystemExit("the driver registered the same memory twice")
    if float(torch.ones(4, device=device).sum()) != 4:
        raise SystemExit(f"after a refused registration (error {error}) the device computes something else")
    return int(error)


def measure(path: Path, rounds: int, repeats: int) -> dict[str, Any]:
    from comfy_model import ComfyModel
    from streamed import load, read_into_an_arena, with_residency

    with read_into_an_arena():
        patcher = with_residency(load(path), 0, 0)
    device = patcher.load_device
    ComfyModel(patcher, Case("")).load()
    streamer = patcher.model.streaming.streamer
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device),
        "arena_gib": streamer.arena.nbytes / GIB,
        "copy_gbps": copy_gbps(streamer.arena.records[0], device),
        "fill_gbps": fill_gbps(streamer.arena.records[1]),
        "refusal": require_clean_refusal(streamer.arena, device),
        "rows": [],
    }
    for pixels in (1024, 512):
        model = ComfyModel(patcher, Case("", pixels))
        model.load()
        results["rows"] += measure_variants(model, rounds, repeats)
    switch(streamer, VARIANTS["all pinned"], patcher.plan, device)
    time.sleep(1)
    if any(thread.name.startswith("bounce") for thread in threading.enumerate()):
        raise SystemExit("a worker has outlived its last user")
    return results


def measure_variants(model: Any, rounds: int, repeats: int) -> list[dict[str, Any]]:
    streamer, plan = model.patcher.model.streaming.streamer, model.patcher.plan
    pixels = model.case.pixels
    rows: dict[str, dict[str, Any]] = {name: {"pixels": pixels, "variant": name} for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    host_times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    reference = None
    for _ in range(rounds):
        for name, variant in VARIANTS.items():
            rows[name]["pin_s"] = switch(streamer, variant, plan, model.device)
            output = model.forward().clone()
            reference = output if reference is None else reference
            if not torch.equal(output, reference):
                raise SystemExit(f"{name} at {pixels}: the output differs")
            host_times[name] += [host_milliseconds(model.forward) for _ in range(3)]
            times[name] += milliseconds(model.forward, repeats)[1:]
            if not torch.equal(model.forward(), reference):
                raise SystemExit(f"{name} at {pixels}: the output differs after some forwards")
            rows[name]["pinned_gib"] = streamer.arena.pinned_bytes / GIB
    for name, row in rows.items():
        row["ms"] = statistics.median(times[name])
        row["ratio"] = row["ms"] / statistics.median(times["all pinned"])
        row["gbps"] = plan.bytes_per_forward / row["ms"] / 1e6
        row["host_ms"] = statistics.median(host_times[name])
    return list(rows.values())


def table(results: dict[str, Any]) -> str:
    columns = "picture | host memory | ms | against all pinned | GB/s over the bus | host ms | GiB pinned | pinned in"
    lines = [f"| {columns} |", "|---" * 8 + "|"]
    for row in results["rows"]:
        figures = f"{row['ms']:.1f} | {row['ratio']:.3f} | {row['gbps']:.1f} | {row['host_ms']:.1f}"
        pinned = f"{row['pinned_gib']:.2f} | {row['pin_s']:.2f} s"
        lines.append(f"| {row['pixels']} | {row['variant']} | {figures} | {pinned} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each variant")
    parser.add_argument("--repeats", type=positive, default=6, help="timed forwards of a turn")
    given = parser.parse_args()
    begin(given)
    import_package()
    with torch.inference_mode():
        results = measure(Files(given.folder, given.checkpoint).nf4(), given.rounds, given.repeats)
    (given.output / "pinning.json").write_text(json.dumps(results, indent=1))
    print(", ".join(f"{key} {value}" for key, value in results.items() if key != "rows"))
    print(table(results))


if __name__ == "__main__":
    orderly.run(main)
