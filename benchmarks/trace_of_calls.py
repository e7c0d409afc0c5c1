"""Where the time of a forward goes: a profiler's trace of one contender at one case, and what it says in figures.

    COMFYUI_PATH=~/ComfyUI python benchmarks/trace_of_calls.py --contender streamed-0-0 --case 512

Run it with ComfyUI's Python. Writes a trace for https://ui.perfetto.dev and prints, for the calls in it: how long the
stream that computes is busy, how long the bus is, the longest times in which compute stands still and what ended them,
and the kernels that take most. The names ``fetch ...`` and ``bind ...`` in the trace are this package's.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from arguments import begin, parser_for, positive
from bus import slow_bus
from cases import CASES, TINY_CASES
from contenders import CONTENDERS, Options, family_maker
from family import Unavailable
from inside_comfyui import import_package, use_allocator_of_comfyui
from memory import capped
from turn import device_of_comfyui
from weights import Files

_LONGEST, _SHOWN = 8, 12


@dataclass(frozen=True)
class Gap:
    """A time in which the compute stream stood still, in us, and the kernel that came then."""

    us: float
    then: str


@dataclass(frozen=True)
class Timeline:
    """What a device did, in us: from the first kernel to the end of the last, and how much of it in what."""

    span_us: float
    compute_us: float
    copies_us: float
    copied_bytes: int
    gaps: Sequence[Gap]
    kernels: Sequence[tuple[str, float, int]]

    def markdown(self, calls: int) -> str:
        idle_us = self.span_us - self.compute_us
        gbps = self.copied_bytes / self.copies_us / 1e3 if self.copies_us else 0.0
        lines = [
            f"{self.span_us / calls / 1e3:.2f} ms a call: compute {self.compute_us / calls / 1e3:.2f} ms, "
            f"standing still {idle_us / calls / 1e3:.2f} ms",
            f"bus: {self.copied_bytes / calls / 1e9:.3f} GB a call in {self.copies_us / calls / 1e3:.2f} ms, "
            f"{gbps:.1f} GB/s while it copies",
            "",
            "| compute stood still, us | then came |",
            "|---|---|",
            *(f"| {gap.us:.0f} | {gap.then[:90]} |" for gap in self.gaps[:_LONGEST]),
            "",
            "| kernel | ms a call | launches a call |",
            "|---|---|---|",
            *(f"| {name[:90]} | {us / calls / 1e3:.2f} | {n / calls:.0f} |" for name, us, n in self.kernels[:_SHOWN]),
        ]
        return "\n".join(lines)


def timeline(events: Iterable[dict[str, Any]]) -> Timeline:
    """Read the events of a Chrome trace as torch's profiler writes it (``ts`` and ``dur`` in us).

    Raises:
        ValueError: there is no kernel among them.
    """
    events = list(events)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]]
    if not kernels:
        raise ValueError("the trace has no kernel: nothing ran on a GPU")
    by_stream = Counter[int]()
    for event in kernels:
        by_stream[event["args"]["stream"]] += event["dur"]
    compute = by_stream.most_common(1)[0][0]
    run = sorted((event for event in kernels if event["args"]["stream"] == compute), key=lambda event: event["ts"])
    gaps = [Gap(after["ts"] - _end(before), after["name"]) for before, after in itertools.pairwise(run)]
    times, launches = Counter[str](), Counter[str]()
    for event in kernels:
        times[event["name"]] += event["dur"]
        launches[event["name"]] += 1
    return Timeline(
        span_us=_end(run[-1]) - run[0]["ts"],
        compute_us=sum(event["dur"] for event in run),
        copies_us=sum(event["dur"] for event in copies),
        copied_bytes=sum(event["args"].get("bytes", 0) for event in copies),
        gaps=sorted(gaps, key=lambda gap: -gap.us),
        kernels=[(name, us, launches[name]) for name, us in times.most_common()],
    )


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


def record(model: Any, calls: int, path: Path, *, with_host: bool = True) -> None:
    """Write the trace of ``calls`` calls, after some that warm up."""
    for _ in range(3):
        model.step()
    activities = [torch.profiler.ProfilerActivity.CPU] if with_host else []
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            model.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
    profiler.export_chrome_trace(str(path))


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--gguf-pack", type=Path, help="your copy of city96/ComfyUI-GGUF")
    names = [contender.name for contender in CONTENDERS]
    cases = [case.name for case in (*CASES, *TINY_CASES)]
    listed = "(compare.py --list names them)"
    parser.add_argument("--contender", choices=names, default="streamed-0-0", metavar="NAME", help=f"who runs {listed}")
    parser.add_argument("--case", choices=cases, default="1024", metavar="NAME", help=f"what runs {listed}")
    parser.add_argument("--calls", type=positive, default=3, help="of the transformer, in the trace")
    without_host = "leave the host out of the trace, which takes it half of its time"
    parser.add_argument("--without-host", action="store_true", help=without_host)
    given = parser.parse_args()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    contender = next(one for one in CONTENDERS if one.name == given.contender)
    case = next(one for one in (*CASES, *TINY_CASES) if one.name == given.case)
    path = given.output / f"trace-{contender.name}-{case.name}.json"
    with torch.inference_mode():
        try:
            family = family_maker(contender.family, Options(files, given.gguf_pack))()
        except Unavailable as error:
            parser.error(f"{contender.name} {error}")
        device = device_of_comfyui()
        with (
            slow_bus(device, case.bus_gbps),
            capped(device, case.cap_gib),
            family.at_work(contender.setting, case) as model,
        ):
            model.load()
            record(model, given.calls, path, with_host=not given.without_host or device.type != "cuda")
    print(f"{contender.name}, {case.name}: {path}")
    if device.type == "cuda":
        print(timeline(json.loads(path.read_text())["traceEvents"]).markdown(given.calls))
    else:
        print("No figures: a CPU has no streams.")


if __name__ == "__main__":
    orderly.run(main)
