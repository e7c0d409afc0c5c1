"""What streaming costs: a full-size NF4 Flux on the GPU, streamed in several plans against all resident.

    COMFYUI_PATH=~/ComfyUI python benchmarks/streaming.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/streaming.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors

Run it with ComfyUI's Python. Without a checkpoint it makes one with random weights (7 GB, kept in ``--folder``).
Prints a table and writes ``streaming.json``. Every variant runs in the same process, in turns, and each number is a
median; compare ratios within one run. Outputs of all variants must be bit-identical, or it fails.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, pattern, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from timing import copy_gbps, milliseconds
from weights import Files

GIB = 2**30
RING = 208


class Setting(NamedTuple):
    """Blocks of each kind that stay (None: as the budget in GiB allows), MiB of the ring, whole blocks or layers."""

    double: int | None = None
    single: int | None = None
    budget: float | None = None
    ring: int = RING
    whole_blocks: bool = False


SETTINGS = {
    "all resident": Setting(19, 38),
    "0/0": Setting(0, 0),
    "7/7": Setting(7, 7),
    "12/24": Setting(12, 24),
    "budget of 1 GiB": Setting(budget=1),
    "budget of 3 GiB": Setting(budget=3),
    "budget of 3 GiB, 7 doubles": Setting(double=7, budget=3),
    "0/0, ring of 112 MiB": Setting(0, 0, ring=112),
    "0/0, ring of 160 MiB": Setting(0, 0, ring=160),
    "0/0, ring of 384 MiB": Setting(0, 0, ring=384),
    "0/0, whole blocks": Setting(0, 0, ring=384, whole_blocks=True),
    "12/24, ring of 384 MiB": Setting(12, 24, ring=384),
}


def allocations_and_syncs(forward: Callable[[], Any]) -> tuple[int, int]:
    """What one forward allocates on the device, and how often the host waits for it."""

    def allocated() -> int:
        return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = allocated()
        forward()
        count = allocated() - before
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return count, sum("synchronizing" in str(warning.message) for warning in caught)


def interrupted_forward_leaves_next_equal(model: Any, reference: torch.Tensor) -> None:
    """Raise in the middle of some blocks; the next forward must give the same bits."""
    transformer = model.patcher.model.diffusion_model
    layers = (transformer.double_blocks[5].img_mlp[2], transformer.single_blocks[20].linear2)
    for layer in layers:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = layer.register_forward_pre_hook(interrupt)
        try:
            model.forward()
        except KeyboardInterrupt:
            handle.remove()
        if not torch.equal(model.forward(), reference):
            raise SystemExit(f"after an interrupt at {model.case.pixels}: the output differs")


def measure(
    path: Path, settings: Mapping[str, Setting], sizes: Sequence[int], rounds: int, repeats: int
) -> dict[str, Any]:
    from comfy_model import ComfyModel
    from streamed import host_bytes_of_first_block, load

    started = time.monotonic()
    patcher = load(path)
    loaded = time.monotonic()
    device = patcher.load_device
    ComfyModel(patcher, Case("", sizes[0])).load()
    torch.cuda.synchronize()
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device),
        "checkpoint_bytes": path.stat().st_size,
        "read_s": loaded - started,
        "pin_and_start_s": time.monotonic() - loaded,
        "rows": [],
    }
    results["copy_gbps"] = copy_gbps(host_bytes_of_first_block(patcher), device)
    for pixels in sizes:
        results["rows"] += measure_settings(patcher, Case("", pixels), settings, rounds, repeats)
    return results


def measure_settings(
    patcher: Any, case: Case, settings: Mapping[str, Setting], rounds: int, repeats: int
) -> list[dict[str, Any]]:
    from comfy_model import ComfyModel
    from streamed import with_residency

    streamer = patcher.model.streaming.streamer
    rows: dict[str, dict[str, Any]] = {name: {"pixels": case.pixels, "plan": name} for name in settings}
    times: dict[str, list[float]] = {name: [] for name in settings}
    reference = None
    for _ in range(rounds):
        for name, setting in settings.items():
            clone = with_residency(patcher, setting.double, setting.single, setting.budget)
            clone.staging_bytes = setting.ring << 20
            clone.whole_blocks = setting.whole_blocks
            model = ComfyModel(clone, case)
            model.load()
            output = model.forward().clone()
            reference = output if reference is None else reference
            if not torch.equal(output, reference):
                raise SystemExit(f"{name} at {case.pixels}: the output differs")
            interrupted_forward_leaves_next_equal(model, reference)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            rows[name]["allocations"], rows[name]["syncs"] = allocations_and_syncs(model.forward)
            times[name] += milliseconds(model.forward, repeats)[1:]
            rows[name]["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            rows[name]["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            rows[name]["bus_gb"] = streamer.plan.bytes_per_forward / 1e9
    for name, row in rows.items():
        row["ms"] = statistics.median(times[name])
        row["ratio"] = row["ms"] / statistics.median(next(iter(times.values())))
    return list(rows.values())


def table(results: dict[str, Any]) -> str:
    columns = (
        "picture | plan | ms | against the first | peak GiB | reserved GiB | GB over the bus | allocations | syncs"
    )
    lines = [f"| {columns} |", "|---" * 9 + "|"]
    for row in results["rows"]:
        memory = f"{row['peak_gib']:.2f} | {row['reserved_gib']:.2f} | {row['bus_gb']:.2f}"
        counts = f"{row['allocations']} | {row['syncs']}"
        lines.append(
            f"| {row['pixels']} | {row['plan']} | {row['ms']:.1f} | {row['ratio']:.3f} | {memory} | {counts} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--only", type=pattern, default="", help="the settings to run: a regular expression")
    parser.add_argument("--pixels", type=positive, nargs="+", default=[1024, 512], help="picture sizes")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each setting")
    parser.add_argument("--repeats", type=positive, default=8, help="timed forwards of a turn")
    given = parser.parse_args()
    settings = {name: setting for name, setting in SETTINGS.items() if given.only.search(name)}
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    with torch.inference_mode():
        path = Files(given.folder, given.checkpoint).nf4()
        results = measure(path, settings, given.pixels, given.rounds, given.repeats)
    (given.output / "streaming.json").write_text(json.dumps(results, indent=1))
    print(", ".join(f"{key} {value}" for key, value in results.items() if key != "rows"))
    print(table(results))


if __name__ == "__main__":
    orderly.run(main)
