"""One contender's turn at one case: load, warm up, time, watch the memory, unload."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bus import slow_bus
from cases import Case
from family import Family, Model
from memory import Use, Watch, capped, resident_bytes
from timing import Clock, milliseconds, seconds


@dataclass(frozen=True)
class Effort:
    """How much one turn measures: calls until either limit is met, two at least."""

    calls: int = 12
    seconds: float = 6.0


@dataclass(frozen=True)
class Difference:
    """An output against another contender's of the same case."""

    compared_with: str
    is_equal: bool
    relative_error: float


@dataclass
class Figures:
    """What a turn measured. Times in ms or s, memory in bytes; ``bus_gbps`` is what a pinned copy showed meanwhile.

    ``stays``: how many blocks of each kind this package kept on the device; nothing for what it does not stream.
    """

    ms: list[float] = field(default_factory=list)
    sampling_s: list[float] = field(default_factory=list)
    load_s: float = 0.0
    first_call_s: float = 0.0
    peak_device: int = 0
    peak_allocated: int = 0
    resident: int = 0
    bus_gbps: float = 0.0
    stays: dict[str, int] = field(default_factory=dict)
    difference: Difference | None = None


def take_turn(family: Family, setting: str, name: str, case: Case, effort: Effort, outputs: Path) -> Figures:
    """Measure one contender.

    Args:
        family: The weights.
        setting: Which way to run them.
        name: The contender's name.
        case: What to run.
        effort: How much of it.
        outputs: A folder in which the first contender at a case leaves its output, for the others to be compared with.

    Raises:
        Unavailable: the contender cannot do this case.
        torch.OutOfMemoryError: the device has no room.
    """
    gc.collect()  # what a turn that failed has left
    figures = Figures()
    device = device_of_comfyui()
    with slow_bus(device, case.bus_gbps) as figures.bus_gbps, capped(device, case.cap_gib):
        before = Use.at_rest(device)
        with torch.inference_mode(), family.at_work(setting, case) as model:
            figures.load_s = seconds(model.load, device)
            figures.first_call_s = seconds(model.forward, device)
            if case.steps:
                output = _measure_sampling(model, effort, figures, before)
            else:
                output = _measure_calls(model, effort, figures, before)
            figures.resident = resident_bytes()
            figures.stays = model.stays()
            figures.difference = _compare(output.cpu(), outputs / f"{case.name}.pt", name)
    return figures


def device_of_comfyui() -> torch.device:
    import comfy.model_management

    device: torch.device = comfy.model_management.get_torch_device()
    return device


def _measure_calls(model: Model, effort: Effort, figures: Figures, before: Use) -> torch.Tensor:
    one_s = min(seconds(model.step, model.device) for _ in range(2))
    calls = max(2, min(effort.calls, int(effort.seconds / one_s)))
    figures.ms = milliseconds(model.step, calls, model.device)
    return _watched(model.forward, model.device, figures, before)


def _measure_sampling(model: Model, effort: Effort, figures: Figures, before: Use) -> torch.Tensor:
    _watched(lambda: model.sample(lambda: None, 2), model.device, figures, before)
    outputs: list[torch.Tensor] = []
    started = time.perf_counter()
    while not outputs or time.perf_counter() - started < effort.seconds:
        clock, begun = Clock(model.device), time.perf_counter()
        outputs.append(model.sample(clock.tick))  # on the CPU: the device is done
        figures.sampling_s.append(time.perf_counter() - begun)
        figures.ms += clock.milliseconds()
    return outputs[-1]


def _watched(call: Callable[[], torch.Tensor], device: torch.device, figures: Figures, before: Use) -> torch.Tensor:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier calls needed more is not needed now
    with Watch(device, before) as watch:
        output = call()
    figures.peak_device, figures.peak_allocated = watch.peak.device, watch.peak.allocated
    return output


def _compare(output: torch.Tensor, path: Path, name: str) -> Difference | None:
    if not path.exists():
        torch.save({"name": name, "output": output}, path)
        return None
    first: dict[str, Any] = torch.load(path)
    expected = first["output"]
    if first["name"] == name or expected.shape != output.shape:
        return None
    error = (output.float() - expected.float()).norm() / expected.float().norm()
    return Difference(first["name"], torch.equal(output, expected), float(error))
