"""What it is worth that a device copies from the file's own memory: beside the same model read into an arena.

    COMFYUI_PATH=~/ComfyUI python benchmarks/file_memory.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/file_memory.py --checkpoint flux1-dev-bnb-nf4-v2.safetensors

Run it with ComfyUI's Python, on Linux. Without a checkpoint it makes one with random weights (7 GB, kept in
``--folder``). Prints tables and writes ``file_memory.json``. Every block is streamed.

- Start: a fresh process for each way loads the file again and again, with the page cache warm, and once from the disk.
  Seconds until ComfyUI has the model ready for its first step, and what of the process's memory is its own.
- Steps: both ways in one process, in turns; the median of the turn that the machine disturbed least. Outputs must be
  bit-identical, or it fails.
- Processes: two that load the same file, each on a GPU of its own, or both on the first where there is one. By how much
  the memory of both together grows when they load, against the first alone (Pss), and the time of a step of the first
  alone and while both run. ``--part processes`` measures only these, in less than a minute once the file is there.
- Copies to each GPU from memory that was registered for the first one.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import resident_bytes
from timing import copy_gbps, least_disturbed, milliseconds
from weights import Files

WAYS = ("file", "arena")
PIXELS = (1024, 512)
PARTS = ("start", "steps", "processes")
GIB = 2**30


def load(path: Path, way: str) -> Any:
    """A patcher that streams every block of a model that nobody else has."""
    from streamed import load as load_shared
    from streamed import read_into_an_arena, with_residency

    import flux_nf4.checkpoints

    flux_nf4.checkpoints._models.clear()
    with read_into_an_arena() if way == "arena" else contextlib.nullcontext():
        patcher = with_residency(load_shared(path), 0, 0)
    require(way, patcher)
    return patcher


def require(way: str, patcher: Any) -> None:
    streamer = patcher.model.streaming.streamer
    found = "file" if streamer.file.nbytes > streamer.arena.nbytes else "arena"
    if found != way:
        raise SystemExit(f"the weights are in the {found}, not in the {way}: the log says why")


def put_on_device(patcher: Any, pixels: int = 512) -> Any:
    """The model ready for a step of this picture."""
    from comfy_model import ComfyModel

    model = ComfyModel(patcher, Case("", pixels))
    model.load()
    torch.cuda.synchronize()
    if not patcher.model.streaming.streamer.all_pinned:
        raise SystemExit("not all host memory is pinned: the log says why")
    return model


def forget_everything() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def step(model: Any) -> None:
    model.forward()
    torch.cuda.synchronize()


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(path: Path, way: str, rounds: int) -> dict[str, float]:
    """Loads of this process, which must be fresh. The first one, which also makes CUDA ready, is not counted."""
    times: dict[str, list[float]] = {"load_s": [], "ready_s": [], "first_step_s": []}
    own: list[int] = []
    for index in range(rounds + 2):
        is_cold = index == rounds + 1
        forget_everything()
        if is_cold:
            drop_from_cache(path)
        before = resident_bytes("RssAnon")
        moments = [time.perf_counter()]
        patcher = load(path, way)
        moments.append(time.perf_counter())
        model = put_on_device(patcher)
        moments.append(time.perf_counter())
        step(model)
        moments.append(time.perf_counter())
        own.append(resident_bytes("RssAnon") - before)
        for name, begun, ended in zip(times, moments, moments[1:], strict=False):
            times[name].append(ended - begun)
        del patcher, model
    result = {name: statistics.median(values[1:-1]) for name, values in times.items()}
    result["first_load_s"] = times["load_s"][0] + times["ready_s"][0]
    result["cold_load_s"] = times["load_s"][-1] + times["ready_s"][-1]
    result["own_gib"] = statistics.median(own[1:-1]) / GIB
    return result


def steps(path: Path, rounds: int, repeats: int) -> dict[str, Any]:
    """Both ways in this process."""
    from streamed import host_bytes_of_first_block

    patchers = {way: load(path, way) for way in WAYS}
    step(put_on_device(patchers[WAYS[0]]))  # in ComfyUI 0.33 the first forward of a process rounds otherwise
    result: dict[str, Any] = {}
    for pixels in PIXELS:
        times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        outputs = []
        for _ in range(rounds):
            for way, patcher in patchers.items():
                model = put_on_device(patcher, pixels)
                outputs.append(model.forward().clone())
                if not torch.equal(outputs[0], outputs[-1]):
                    raise SystemExit(f"{way} at {pixels}: the output differs")
                times[way].append(milliseconds(model.forward, repeats, model.device)[1:])
        result |= {f"{way}_{pixels}_ms": least_disturbed(turns) for way, turns in times.items()}
        result[f"ratio_{pixels}"] = result[f"file_{pixels}_ms"] / result[f"arena_{pixels}_ms"]
    part = host_bytes_of_first_block(patchers["file"])
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    result["copy_gbps"] = [copy_gbps(part, device) for device in devices]
    return result


def pss_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def serve(path: Path, repeats: int) -> None:
    """One of several processes: does what it is told on its standard input, a verb and a way a line, and answers."""
    model: Any = None
    answer("is there")
    for line in sys.stdin:
        verb, way = line.split()
        said: Any = "done"
        if verb == "load":
            model = put_on_device(load(path, way))
            step(model)
        elif verb == "time":
            said = {pixels: time_of(model.patcher, pixels, repeats) for pixels in PIXELS}
        else:
            model = None
            forget_everything()
        answer(json.dumps(said))


def time_of(patcher: Any, pixels: int, repeats: int) -> float:
    """Milliseconds of a step, the median."""
    model = put_on_device(patcher, pixels)
    return statistics.median(milliseconds(model.forward, repeats, model.device)[1:])


ANSWER = "answer: "


def answer(text: str) -> None:
    print(ANSWER + text, flush=True)


class Server:
    """A process that serves, on ``device``."""

    def __init__(self, arguments: Sequence[str], device: int) -> None:
        self._process = subprocess.Popen(
            own_command("serve", *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(device)},
        )

    def begin(self, verb: str, way: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {way}\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """The next one; whatever else the process prints is passed over."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise SystemExit("a process has ended early: its own messages say why")

    @property
    def pss(self) -> int:
        return pss_bytes(self._process.pid)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def all_at_once(servers: Sequence[Server], verb: str, way: str) -> list[Any]:
    for server in servers:
        server.begin(verb, way)
    return [json.loads(server.answer()) for server in servers]


def processes(arguments: Sequence[str], devices: Sequence[int], ways: Sequence[str]) -> dict[str, Any]:
    """Two processes for all ways, as most of the time is their start: one of them has the model, then both."""
    servers = [Server(arguments, device) for device in devices]
    try:
        for server in servers:
            server.answer()
        say("both processes have ComfyUI")
        return {way: {"devices": list(devices)} | one_and_two(servers, way) for way in ways}
    finally:
        for server in servers:
            server.end()


def one_and_two(servers: Sequence[Server], way: str) -> dict[str, Any]:
    for verb in ("load", "forget"):  # what only a first load takes is no model's
        all_at_once(servers, verb, way)
    before = sum(server.pss for server in servers)
    found: dict[str, Any] = {}
    for name, last, of in (("one", servers[0], servers[:1]), ("two", servers[1], servers)):
        all_at_once([last], "load", way)
        grown = sum(server.pss for server in servers) - before
        found[name] = {"grown_gib": grown / GIB, "ms": all_at_once(of, "time", way)}
        say(f"weights in the {way}, {name} with the model: {json.dumps(found[name])}")
    all_at_once(servers, "forget", way)
    return found | {"grown_gib_ratio": found["two"]["grown_gib"] / found["one"]["grown_gib"]}


BEGUN = time.perf_counter()


def say(text: str) -> None:
    """A sign of life."""
    print(f"[{time.perf_counter() - BEGUN:.0f} s] {text}", flush=True)


def own_command(what: str, *arguments: str) -> list[str]:
    return [sys.executable, __file__, "--only", what, *arguments]


def in_fresh_process(what: str, *arguments: str) -> dict[str, Any]:
    output = subprocess.run(own_command(what, *arguments), check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(path: Path, given: argparse.Namespace) -> None:
    """Measure each part. Its figures are printed and in the file once it is done."""
    common = [
        "--checkpoint",
        str(path),
        "--output",
        str(given.output),
        "--rounds",
        str(given.rounds),
        "--repeats",
        str(given.repeats),
    ]
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "file_gb": path.stat().st_size / 1e9,
    }
    two = [0, min(1, torch.cuda.device_count() - 1)]
    measures: dict[str, Callable[[], Any]] = {
        "start": lambda: {way: in_fresh_process("start", *common, "--way", way) for way in given.ways},
        "steps": lambda: in_fresh_process("steps", *common),
        "processes": lambda: processes(common, two, given.ways),
    }
    for part in (part for part in PARTS if part in given.part):
        results[part] = measures[part]()
        print(*report(part, results[part], results["file_gb"]), sep="\n", flush=True)
        (given.output / "file_memory.json").write_text(json.dumps(results, indent=1))


def report(part: str, found: dict[str, Any], file_gb: float) -> list[str]:
    if part == "start":
        return report_of_start(found, file_gb)
    if part == "steps":
        return [f"{name}: {value}" for name, value in found.items()]
    ratios = {way: of_way["grown_gib_ratio"] for way, of_way in found.items()}
    return [
        f"weights in the {way}: to load, two processes take {ratios[way]:.3f} of the memory of one" for way in ratios
    ]


def report_of_start(found: dict[str, Any], size: float) -> list[str]:
    lines = [
        "| weights in | load s | ready s | load to first step, s a GB | first step s | first load s | from the disk s "
        "| own memory GiB | share of the file |",
        "|---" * 9 + "|",
    ]
    for way, row in found.items():
        until = row["load_s"] + row["ready_s"]
        times = f"{row['load_s']:.3f} | {row['ready_s']:.3f} | {until / size:.3f} | {row['first_step_s']:.3f}"
        loads = f"{row['first_load_s']:.2f} | {row['cold_load_s']:.2f}"
        share = row["own_gib"] * GIB / size / 1e9
        lines.append(f"| {way} | {times} | {loads} | {row['own_gib']:.2f} | {share:.3f} |")
    return [*lines, ""]


def main() -> None:
    parser = parser_for(__doc__, can_be_dry=False)
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each way")
    parser.add_argument("--repeats", type=positive, default=8, help="timed forwards of a turn")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="what to measure")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="of the parts start and processes")
    parser.add_argument("--way", choices=WAYS, default="file", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    parts: dict[str, Callable[[], Any]] = {
        "start": lambda: start(given.checkpoint, given.way, given.rounds),
        "steps": lambda: steps(given.checkpoint, given.rounds, given.repeats),
    }
    with torch.inference_mode():
        if given.only == "serve":
            serve(given.checkpoint, given.repeats)
            return
        if given.only:
            print(json.dumps(parts[given.only]()))
            return
        measure(Files(given.folder, given.checkpoint).nf4(), given)


if __name__ == "__main__":
    orderly.run(main)
