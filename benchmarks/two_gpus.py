"""ComfyUI's *MultiGPU CFG Split* on a streamed model: what a second GPU wins, and whether the picture is the same.

    COMFYUI_PATH=~/ComfyUI python benchmarks/two_gpus.py

It samples a full-size Flux in NF4 with CFG 4, on one GPU (which computes both prompts of a step as one batch) and on
two (one prompt each), in turns: with all blocks that fit in VRAM, and with none. It needs two GPUs and a ComfyUI that
has the node (0.33.0 or later). Run it with ComfyUI's Python. It also writes ``two_gpus.json``. A batch of two may round
otherwise than two batches of one do, so it says how far the latents are from each other, too.

Both GPUs are driven by threads of one Python process, and only one of them runs Python at a time. So a step takes at
least as long as the host takes for both forwards: each line says how busy the host's CPU was with two GPUs. Near 1 it
is what limits them, and larger pictures gain more.
"""

import importlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import needs_torch  # noqa: F401
import orderly
import torch
from about import about
from arguments import begin, parser_for, positive, require_gpu
from inside_comfyui import import_package, use_allocator_of_comfyui

RESIDENT = {"auto": (), "0/0": (0, 0)}
"""Double and single blocks that stay; none: as many as there is room for."""


def require_two_gpus() -> None:
    """
    Raises:
        SystemExit: PyTorch sees fewer.
    """
    require_gpu()
    if torch.cuda.device_count() < 2:
        raise SystemExit("This measures two GPUs, and PyTorch sees one here (torch.cuda.device_count() is 1).")


def split(patcher: Any) -> Any:
    """What the node *MultiGPU CFG Split* makes of ``patcher``, for two GPUs.

    Raises:
        SystemExit: this ComfyUI has no such node.
    """
    try:
        multigpu: Any = importlib.import_module("comfy.multigpu")
    except ImportError:
        raise SystemExit("This ComfyUI has no MultiGPU CFG Split: 0.33.0 has it, 0.3.75 has not.") from None
    made = multigpu.create_multigpu_deepclones(patcher, 2, reuse_loaded=True)
    others = made.get_additional_models_with_key("multigpu")
    assert len(others) == 1, "the model has no twin on a second device"
    return made


@contextmanager
def two_devices_of_one_cpu() -> Iterator[None]:
    """For a dry run: ComfyUI sees them as it sees two GPUs."""
    import comfy.model_management

    management: Any = comfy.model_management
    before = getattr(management, "get_all_torch_devices", None)
    management.get_all_torch_devices = lambda **_: [torch.device("cpu"), torch.device("cpu", 1)]
    try:
        yield
    finally:
        management.get_all_torch_devices = before


def measure(patchers: dict[str, Any], case: Any, rounds: int) -> dict[str, Any]:
    """Seconds of whole samplings of each of ``patchers``, in turns, each after one that warms up; and their latents."""
    from comfy_model import at_work

    seconds: dict[str, list[float]] = {name: [] for name in patchers}
    busy: list[float] = []
    latents: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name, patcher in patchers.items():
            with at_work(patcher, case) as model:
                model.sample(lambda: None, 2)
                started, cpu = time.perf_counter(), time.process_time()
                latents[name] = model.sample(lambda: None)  # on the CPU: the devices are done
                seconds[name].append(time.perf_counter() - started)
                if name == "two":
                    busy.append((time.process_time() - cpu) / seconds[name][-1])
    one, two = (latents[name].float() for name in ("one", "two"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds": seconds,
        "ratio": medians["two"] / medians["one"],
        "host_busy": statistics.median(busy),
        "is_equal": torch.equal(one, two),
        "difference": float((two - one).norm() / one.norm()),
    }


def said(found: dict[str, Any]) -> str:
    one, two = (statistics.median(found["seconds"][name]) for name in ("one", "two"))
    picture = "equal to the bit" if found["is_equal"] else f"{found['difference']:.1e} away"
    return (
        f"{found['resident']}, {found['pixels']}: one GPU {one:.2f} s, two {two:.2f} s, {found['ratio']:.3f} of it, "
        f"the host busy {found['host_busy']:.2f} of the time; latents {picture}"
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--steps", type=positive, default=8, help="steps of each sampling")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each way")
    parser.add_argument("--pixels", type=positive, nargs="+", default=[1024, 1536], help="sides of the pictures")
    given = parser.parse_args()
    if not given.dry_run:
        require_two_gpus()
    use_allocator_of_comfyui()
    begin(given)
    import_package()
    from cases import Case
    from streamed import load, with_residency
    from weights import Files

    files = Files(given.folder, given.checkpoint, given.dry_run)
    files.enter()
    sides, text = ([64], {"text_tokens": 8}) if given.dry_run else (given.pixels, {})
    results: dict[str, Any] = {"about": about(), "steps": given.steps, "rows": []}
    with torch.inference_mode(), two_devices_of_one_cpu() if given.dry_run else nullcontext():
        patcher = load(files.nf4())
        for resident, counts in RESIDENT.items():
            one = with_residency(patcher, *counts)
            both = {"one": one, "two": split(one)}
            for pixels in sides:
                case = Case("cfg", pixels=pixels, steps=given.steps, cfg=4.0, **text)
                row = {"resident": resident, "pixels": pixels} | measure(both, case, given.rounds)
                print(said(row), flush=True)
                results["rows"].append(row)
                (given.output / "two_gpus.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    orderly.run(main)
