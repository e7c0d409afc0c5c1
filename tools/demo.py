"""Makes one picture, start to end, with the real ComfyUI: the package's main job.

    python3 tools/demo.py
    python3 tools/demo.py --comfyui ~/ComfyUI --checkpoint ~/models/flux1-dev-bnb-nf4-v2.safetensors

Without options it needs only Python 3.10 and git's checkout: it makes an environment, downloads ComfyUI 0.3.75 and
writes a small checkpoint with random weights (so the picture is noise), once. Then it starts the server headless
with this package dropped in, posts the API workflow, shows progress and saves the PNG.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import orderly

_WORKFLOW = environment.ROOT / "example_workflows" / "api" / "flux_nf4_text_to_image.json"
_OUTPUT = environment.CACHE / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--comfyui", type=Path, help="use this ComfyUI, with its own Python if it has one (venv, .venv)"
    )
    parser.add_argument("--checkpoint", type=Path, help="use this NF4 all-in-one file")
    parser.add_argument("--prompt", help="what to paint")
    size, steps = _between(64, 4096, step=16), _between(1, 1000)
    parser.add_argument("--size", type=size, help="width and height in pixels (256; with --checkpoint 1024)")
    parser.add_argument("--steps", type=steps, help="sampling steps (4; with --checkpoint 20)")
    count = _between(-1, 100)  # as the node
    parser.add_argument("--double", type=count, default=-1, help="double blocks that stay in VRAM (-1: automatic)")
    parser.add_argument("--single", type=count, default=-1, help="single blocks that stay in VRAM (-1: automatic)")
    parser.add_argument("--output", type=Path, default=_OUTPUT, help="folder for the PNG")
    given = parser.parse_args()
    if given.checkpoint and not given.checkpoint.is_file():
        parser.error(f"{given.checkpoint}: there is no such file")
    if given.output.exists() and not given.output.is_dir():
        parser.error(f"{given.output}: it is a file. Name a folder for the picture")
    comfyui = environment.enter(given.comfyui, own_python=True)
    checkpoint = given.checkpoint or _small_checkpoint()
    real = given.checkpoint is not None
    workflow = _workflow(checkpoint.name, given, size=1024 if real else 256, steps=20 if real else 4)
    _run(comfyui, checkpoint, workflow, given.output)


def _between(least: int, most: int, step: int = 1) -> Callable[[str], int]:
    """What argparse takes for a number in these bounds."""
    multiple = f", a multiple of {step}" if step > 1 else ""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not least <= int(text) <= most or int(text) % step:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {most}{multiple}")
        return int(text)

    return number


def _small_checkpoint() -> Path:
    from make_checkpoint import Recipe, cached_checkpoint

    def say(text: str) -> None:
        print(f"\r{text:<79}", end="", flush=True)

    try:
        return cached_checkpoint(environment.CACHE / "checkpoints", Recipe(), say)
    except SystemExit as error:
        raise SystemExit(f"\n{error}") from None  # below what `say` has shown


def _workflow(name: str, given: argparse.Namespace, size: int, steps: int) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(_WORKFLOW.read_text("utf-8"))
    inputs = {node["class_type"]: node["inputs"] for node in workflow.values()}
    loader = inputs["FluxNF4CheckpointLoaderStreamed"]
    loader |= {
        "ckpt_name": name,
        "double_blocks": given.double,
        "single_blocks": given.single,
    }
    inputs["EmptySD3LatentImage"] |= {"width": given.size or size, "height": given.size or size}
    inputs["KSampler"] |= {"steps": given.steps or steps}
    if given.prompt:
        inputs["CLIPTextEncode"]["text"] = given.prompt
    return workflow


def _run(comfyui: Path, checkpoint: Path, workflow: dict[str, Any], output: Path) -> None:
    from comfy_server import ComfyServer, ServerError, drop_package, link_model

    base = Path(tempfile.mkdtemp(prefix="flux-nf4-"))
    try:
        drop_package(environment.ROOT, base)
        link_model(checkpoint, base, "checkpoints")
        print(f"Starting ComfyUI ({comfyui})", flush=True)
        with ComfyServer(comfyui, base, () if _has_gpu() else ("--cpu",)) as server:
            progress = _Progress({identifier: node["class_type"] for identifier, node in workflow.items()})
            started = time.monotonic()
            history = server.run(workflow, progress.show)
            seconds = time.monotonic() - started
            if history["status"]["status_str"] != "success":
                raise SystemExit(_failure(history))
            output.mkdir(parents=True, exist_ok=True)
            for image in server.images(history):
                path = output / f"flux_nf4_{time.strftime('%Y%m%d_%H%M%S')}.png"
                path.write_bytes(image)
                print(f"\nSaved {path}")
            print(
                f"{seconds:.1f} s from prompt to picture; server memory at its highest {_peak_gib(server.pid):.2f} GiB"
            )
    except ServerError as error:
        raise SystemExit(f"\n{error}") from None
    finally:
        shutil.rmtree(base, ignore_errors=True)


class _Progress:
    """A line for each node; within it, each tenth of the way."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.tenth = 0

    def show(self, message: Any) -> None:
        data = message["data"]
        if message["type"] == "executing" and data.get("node"):
            self.tenth = 0
            print(f"\n{self.names.get(data['node'], data['node'])}", end="", flush=True)
        elif message["type"] == "progress" and 10 * data["value"] // data["max"] > self.tenth:
            self.tenth = 10 * data["value"] // data["max"]
            print(f" {10 * self.tenth}%", end="", flush=True)


def _failure(history: dict[str, Any]) -> str:
    errors = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
    return "\n" + "\n".join(f"{error['node_type']}: {error['exception_message']}" for error in errors)


def _has_gpu() -> bool:
    probe = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(probe, check=False, capture_output=True).returncode == 0


def _peak_gib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kib) / 2**20


if __name__ == "__main__":
    orderly.run(main)
