"""What loading costs: time against a plain read of the same bytes, and peak memory against the model's bytes.

    COMFYUI_PATH=~/ComfyUI python benchmarks/load.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/load.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors

Run it with ComfyUI's Python, on Linux; it needs no GPU. Without a checkpoint it makes two small ones, v1 and v2, with
random weights (0.7 GB each, kept in ``.cache``). Prints a table and writes ``load.json``.

- Time: everything from the header to the filled transformer, and how much of it is reading; beside it a plain read, in
  the same process and in turns: every byte range that the loader reads, by as many threads, into one buffer; once into
  fresh anonymous memory, which is what the loader fills, and once into memory that has been written before. The page
  cache is warm; each number is a median, the ratios are those of the reading.
- Memory: how far the resident memory of a fresh process rises while it loads the transformer, against the bytes of the
  model's tensors.
"""

import argparse
import functools
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import ROOT, plain_parser, positive
from inside_comfyui import import_package
from memory import resident_bytes
from timing import seconds

Range = tuple[int, int]
MIB = 2**20


def ranges_read(path: Path) -> list[Range]:
    """(offset, bytes) of all that the loader reads of the transformer, in file order, neighbours joined."""
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue
    from flux_nf4.nf4_loader.checkpoint.tensors import Weight4bit

    catalogue = read_catalogue(path)
    weights = [part for part in catalogue.parts if isinstance(part, Weight4bit)]
    entries = [entry for weight in weights for entry in (weight.packed, weight.absmax)]
    entries += [part for part in catalogue.parts if not isinstance(part, Weight4bit)]
    joined: list[Range] = []
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if joined and sum(joined[-1]) == entry.offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + entry.nbytes)
        else:
            joined.append((entry.offset, entry.nbytes))
    return joined


def plain_read(path: Path, ranges: Sequence[Range], buffer: memoryview) -> memoryview:
    """Fill ``buffer`` with ``ranges``, one after the other, with the loader's number of threads and chunk size."""
    from flux_nf4.nf4_loader.checkpoint.read import CHUNK_BYTES, THREADS

    chunks, position = [], 0
    for offset, nbytes in ranges:
        for start in range(0, nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, nbytes - start)
            chunks.append((offset + start, buffer[position : position + size]))
            position += size

    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

        def read(chunk: tuple[int, memoryview]) -> None:
            offset, view = chunk
            while view:
                count = os.preadv(file.fileno(), [view], offset)
                offset, view = offset + count, view[count:]

        list(pool.map(read, chunks))
    return buffer


def fresh_memory(nbytes: int) -> memoryview:
    """Anonymous memory that the system gives page by page as it is written, huge pages where it can."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def fresh_seconds(call: Callable[[], Any]) -> float:
    """Time of ``call``, with the model of the call before freed; freeing what it returns is not in it."""
    gc.collect()
    kept: list[Any] = []
    return seconds(lambda: kept.append(call()), torch.device("cpu"))


def measure_time(path: Path, rounds: int) -> dict[str, float]:
    from streamed import load

    import flux_nf4.checkpoints

    loaded: Any = flux_nf4.checkpoints
    ranges = ranges_read(path)
    nbytes = sum(size for _, size in ranges)
    written = fresh_memory(nbytes)
    plain_read(path, ranges, written)
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: load(path),
        "plain_fresh": lambda: plain_read(path, ranges, fresh_memory(nbytes)),
        "plain_written": lambda: plain_read(path, ranges, written),
    }
    calls["load"]()
    times: dict[str, list[float]] = {name: [] for name in (*calls, "fill")}
    fill = loaded.fill

    def timed_fill(*arguments: Any) -> None:
        started = time.perf_counter()
        fill(*arguments)
        times["fill"].append(time.perf_counter() - started)

    loaded.fill = timed_fill
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(fresh_seconds(call))
    loaded.fill = fill
    result = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return {"read_bytes": nbytes} | result


def measure_own_memory(path: Path) -> dict[str, float]:
    """What loading adds to this process, which must be fresh."""
    from streamed import load

    before = resident_bytes()
    model = load(path).model
    peak = (resident_bytes("VmHWM") - before) / MIB
    tensors = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / MIB
    return {"peak_mib": peak, "tensors_mib": tensors}


def measure_memory(path: Path) -> dict[str, float]:
    """`measure_own_memory` in a fresh process."""
    command = [sys.executable, __file__, "--only-memory", "--checkpoint", str(path)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def checkpoint_files(given: Sequence[Path]) -> Sequence[Path]:
    if given:
        return given
    from make_checkpoint import Recipe, cached_checkpoint, forget_weights

    recipe = functools.partial(Recipe, double_blocks=2, single_blocks=4, unet_only=True)
    files = [cached_checkpoint(ROOT / ".cache" / "checkpoints", recipe(nested=nested)) for nested in (True, False)]
    forget_weights()
    return files


def measure(path: Path, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"file": path.name} | measure_time(path, rounds) | measure_memory(path)
    for memory in ("fresh", "written"):
        row[f"ratio_to_{memory}"] = row["fill_s"] / row[f"plain_{memory}_s"]
    row["memory_ratio"] = row["peak_mib"] / row["tensors_mib"]
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| file | GB read | load s | of it reading s | plain read s, fresh memory | ratio | written memory | ratio "
        "| peak MiB | tensors MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row['load_s']:.3f} | {row['fill_s']:.3f} | {row['plain_fresh_s']:.3f} | {row['ratio_to_fresh']:.2f}"
        times += f" | {row['plain_written_s']:.3f} | {row['ratio_to_written']:.2f}"
        memory = f"{row['peak_mib']:.0f} | {row['tensors_mib']:.0f} | {row['memory_ratio']:.3f}"
        lines.append(f"| {row['file']} | {row['read_bytes'] / 1e9:.2f} | {times} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], help="NF4 files; made if not given")
    parser.add_argument("--rounds", type=positive, default=7, help="loads and plain reads, in turns")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    import_package()
    with torch.inference_mode():
        if given.only_memory:
            print(json.dumps(measure_own_memory(given.checkpoint[0])))
            return
        rows = [measure(path, given.rounds) for path in checkpoint_files(given.checkpoint)]
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "load.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    orderly.run(main)
