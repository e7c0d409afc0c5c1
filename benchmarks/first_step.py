"""Where the time goes from a file's name to the end of the first step, with the page cache warm.

    COMFYUI_PATH=~/ComfyUI python benchmarks/first_step.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/first_step.py --all-in-one --pixels 1024

Run it with ComfyUI's Python. Each round loads the file anew, into a process that has done so before, gets the model
ready for a step with every block streamed, and runs one. Without a checkpoint it makes one with random weights (7 GB;
12 GB with ``--all-in-one``), kept in ``--folder``. Prints a tree of what was called, with medians over the rounds: ms
on the clock, and ms that this thread computed; the rest it waited. The line *gc* is Python's garbage collector,
wherever it ran. Writes ``first_step.json``.
"""

import functools
import gc
import importlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from cases import Case
from inside_comfyui import import_package, use_allocator_of_comfyui
from weights import Files

STEPS = {
    "checkpoints": (
        "require_comfyui",
        "key_of",
        "build_transformer",
        "_source_for",
        "why_read",
        "map_blocks",
        "_pin_ahead",
        "attach_streaming",
        "materialise",
        "fill",
        "load_clip_and_vae",
        "leave_without_copies",
        "warm_up",
    ),
    "nf4_loader.models.transformers": ("_detected", "_adopt_4bit_weights", "_check_complete", "read_encoders"),
    "nf4_loader.models.fill": ("read_parts", "_swap_halves"),
    "nf4_loader.checkpoint.read_parts": ("_check_code_tables", "read_slices", "_convert"),
    "offload.file_arena": ("FileArena.bringing_in", "FileArena.pin", "FileArena.pin_ahead"),
    "offload.file_map": ("BringingIn.wait",),
    "offload.arena": ("HostArena.pin",),
    "offload.pinning_ahead": ("wait",),
    "offload.put": ("until_registered",),
    "offload.streamer": ("layouts_of", "blocks_in", "Streamer.start", "Streamer.pin", "Streamer._apply"),
    "offload.conveyor": ("Conveyor.__init__", "Conveyor.start", "until_registered"),
    "offload.comfyui.streaming": ("Streamer", "Patching", "Streaming.start", "copies_to", "through_bounce_buffers"),
    "offload.comfyui.patcher": ("StreamedModelPatcher.load", "StreamedModelPatcher._apply_patches"),
}
"""Functions and methods of this package that get a line, by the module that calls them by these names."""

STEPS_OF_COMFYUI = {
    "comfy.sd": ("load_state_dict_guess_config", "CLIP.__init__", "VAE.__init__"),
    "comfy.model_management": ("load_models_gpu", "free_memory", "soft_empty_cache", "LoadedModel.model_load"),
}

Row = tuple[float, float]
"""Milliseconds on the clock, and milliseconds that the thread computed."""


class Watch:
    """Adds up the time of what is called, by the path of calls that leads to it, from `reset` on."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self.times: dict[tuple[str, ...], Row] = {}
        self._collecting: Row = (0.0, 0.0)
        gc.callbacks.append(self._on_collection)

    def reset(self) -> None:
        self.times = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._path.append(name)
        path = tuple(self._path)
        self.times.setdefault(path, (0.0, 0.0))  # before those inside of it
        begun = _now()
        try:
            yield
        finally:
            self._add(path, begun)
            self._path.pop()

    def wrap(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)
        label = f"{owner.__name__}.{name}" if isinstance(owner, type) else name

        @functools.wraps(inner, updated=())
        def timed(*arguments: Any, **options: Any) -> Any:
            if not self._path or threading.current_thread() is not threading.main_thread():
                return inner(*arguments, **options)
            with self.part(label):
                return inner(*arguments, **options)

        setattr(owner, name, timed)

    def _add(self, path: tuple[str, ...], begun: Row) -> None:
        clock, cpu = self.times.get(path, (0.0, 0.0))
        now = _now()
        self.times[path] = clock + now[0] - begun[0], cpu + now[1] - begun[1]

    def _on_collection(self, phase: str, _: Any) -> None:
        if phase == "start":
            self._collecting = _now()
        elif self._path:
            self._add(("gc",), self._collecting)


def _now() -> Row:
    return 1000 * time.perf_counter(), 1000 * time.thread_time()


def watch_all() -> Watch:
    watch = Watch()
    for prefix, steps in (("flux_nf4.", STEPS), ("", STEPS_OF_COMFYUI)):
        for module, names in steps.items():
            for name in names:
                owner: Any = importlib.import_module(prefix + module)
                *owners, last = name.split(".")
                for part in owners:
                    owner = getattr(owner, part)
                watch.wrap(owner, last)
    return watch


def measure(path: Path, watch: Watch, given: Any) -> dict[tuple[str, ...], Row]:
    """One round."""
    import comfy.model_management
    from comfy_model import ComfyModel
    from streamed import with_residency

    import flux_nf4.checkpoints as checkpoints
    from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

    watch.reset()
    checkpoints._models.clear()
    with watch.part("load"):
        with watch.part("read_catalogue"):
            catalogue = read_catalogue(path)
        whole = checkpoints.load_all_in_one(catalogue) if given.all_in_one else None
        model = whole.model if whole is not None else checkpoints.load_transformer(catalogue)
        patcher = with_residency(model, 0, 0)
    with watch.part("ready"):
        running = ComfyModel(patcher, Case("", given.pixels))
        running.load()
        synchronise(running.device)
    for name in ("first step", "second step"):
        with watch.part(name):
            running.forward()
            synchronise(running.device)
    del model, whole, patcher, running
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
    return watch.times


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(rounds: list[dict[tuple[str, ...], Row]]) -> dict[tuple[str, ...], Row]:
    paths = dict.fromkeys(path for times in rounds for path in times)
    none = (0.0, 0.0)
    return {
        path: tuple(statistics.median(times.get(path, none)[column] for times in rounds) for column in (0, 1))  # type: ignore[misc]
        for path in paths
    }


def table(times: dict[tuple[str, ...], Row], least_ms: float) -> str:
    lines = ["| what | ms | of it computing |", "|---|---|---|"]
    for path in in_order(times):
        clock, cpu = times[path]
        if clock >= least_ms or len(path) == 1:
            lines.append(f"| {'. ' * (len(path) - 1)}{path[-1]} | {clock:.1f} | {cpu:.1f} |")
    return "\n".join(lines)


def in_order(times: dict[tuple[str, ...], Row], parent: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for path in times:
        if path[:-1] == parent:
            yield path
            yield from in_order(times, path)


def checkpoint(given: Any) -> Path:
    if given.checkpoint is None and given.all_in_one:
        from workflow import checkpoint as all_in_one

        return all_in_one(given.folder, is_small=given.dry_run)
    files = Files(given.folder, given.checkpoint, is_tiny=given.dry_run)
    files.enter()
    return files.nf4()


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--pixels", type=positive, default=512, help="picture size")
    parser.add_argument("--all-in-one", action="store_true", help="with text encoders and VAE")
    parser.add_argument("--least-ms", type=float, default=0.5, help="shorter ones are left out of the table")
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    given.pixels, given.rounds = (64, 2) if given.dry_run else (given.pixels, given.rounds)
    path = checkpoint(given)
    size = path.stat().st_size / 1e9
    watch = watch_all()
    run: Callable[[], Any] = lambda: dict(measure(path, watch, given))  # noqa: E731
    with torch.inference_mode():
        first = run()
        times = medians([run() for _ in range(given.rounds)])
    until = sum(times[name,][0] for name in ("load", "ready"))
    print(f"{path.name}, {size:.2f} GB\n{table(times, given.least_ms)}")
    print(f"from load to the first step: {until / 1000:.3f} s, {until / 1000 / size:.3f} s a GB")
    print(f"the first of this process: load {first['load',][0]:.0f} ms, ready {first['ready',][0]:.0f} ms")
    rows = [{"what": path, "ms": clock, "computing_ms": cpu} for path, (clock, cpu) in times.items()]
    (given.output / "first_step.json").write_text(json.dumps({"file_gb": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    orderly.run(main)
