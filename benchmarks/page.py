"""What the page's questions cost a prompt that is running: every other step of it is disturbed by 100 of them.

    python3 benchmarks/page.py
    COMFYUI_PATH=~/ComfyUI python3 benchmarks/page.py --prompts 10

Starts a real ComfyUI server on the CPU with a small checkpoint and a short prompt, for quick steps. A prompt of 20
steps gets 1,000 questions for plans of a file of the real size, as from a page whose budget is dragged: the next one
when the last is answered. Each disturbed step is held against the mean of the two beside it, so that what else the
machine does hits both alike. After each such prompt comes one with as many of a question of ComfyUI's own, which is
what any question costs. Needs Linux and no GPU. Prints medians, and the processor time of a question while nothing
runs; fails if a prompt gets slower by more than 2 %. Writes ``page.json``.
"""

import http.client
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path
from typing import Any

import arguments
import environment
import orderly
from arguments import positive

STEPS, QUESTIONS = 20, 1000
PLAN, STATS = "the plan", "/system_stats"
MOST_PERCENT = 2.0
FULL_SIZE = "flux1-full-size.safetensors"
WORKFLOW = arguments.ROOT / "example_workflows" / "api" / "flux_nf4_text_to_image.json"


def main() -> None:
    parser = arguments.plain_parser(__doc__)
    parser.add_argument("--prompts", type=positive, default=3, help="of each kind of question")
    parser.add_argument("--pixels", type=positive, default=192, help="width and height of the picture")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    comfyui = environment.enter(Path(os.environ["COMFYUI_PATH"]) if "COMFYUI_PATH" in os.environ else None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended then, too
    with tempfile.TemporaryDirectory(prefix="flux-nf4-") as base:
        measured = measure(comfyui, Path(base), given.prompts, given.pixels)
    percent = {}
    for name, (prompts, idle_us) in measured.items():
        step = statistics.median(itertools.chain(*prompts))
        slower = statistics.median(itertools.chain(*map(differences, prompts)))
        percent[name] = 100 * slower / step / 2  # every other step
        print(
            f"{name}: a step takes {1000 * step:.0f} ms, with {2 * QUESTIONS // STEPS} questions {1000 * slower:+.1f}"
        )
        print(f"{name}: {QUESTIONS} in {STEPS} steps, {STEPS * step:.0f} s: {percent[name]:+.2f} %")
        print(f"{name}: one, idle server: {idle_us:.0f} us of processor time")
    figures = {
        name: {"step_seconds": prompts, "slower_percent": percent[name], "idle_us": idle_us}
        for name, (prompts, idle_us) in measured.items()
    }
    (given.output / "page.json").write_text(json.dumps(figures, indent=2), "utf-8")
    if percent[PLAN] > MOST_PERCENT:
        raise SystemExit(f"slower by more than {MOST_PERCENT} %")


def differences(steps: Sequence[float]) -> Iterator[float]:
    """How much longer each disturbed step (the odd ones) took than the mean of those beside it."""
    for index in range(1, len(steps) - 1, 2):
        yield steps[index] - (steps[index - 1] + steps[index + 1]) / 2


def measure(comfyui: Path, base: Path, prompts: int, pixels: int) -> dict[str, tuple[list[list[float]], float]]:
    """For each kind of question: seconds of the steps of each prompt, and microseconds of the idle server's processors
    for one."""
    from comfy_server import ComfyServer, drop_package, link_model
    from make_checkpoint import Recipe, cached_checkpoint
    from sparse_checkpoint import make_sparse_checkpoint

    checkpoint = cached_checkpoint(environment.CACHE / "checkpoints", Recipe())
    drop_package(arguments.ROOT, base)
    link_model(checkpoint, base, "checkpoints")
    make_sparse_checkpoint(base / "models" / "checkpoints" / FULL_SIZE)
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        # The widget of the budget, dragged up to 24 GiB and again, in its steps of 0.1.
        budgets = (1 + n % 230 / 10 for n in count())
        plans = (f"/flux_nf4/plan?folder=checkpoints&file={FULL_SIZE}&budget={budget:.1f}" for budget in budgets)
        kinds = {PLAN: Questions(server.port, plans), "ComfyUI's system_stats": Questions(server.port, repeat(STATS))}
        for questions in kinds.values():
            questions.ask(1)  # reads the header
        steps: dict[str, list[list[float]]] = {name: [] for name in kinds}
        seeds = count()  # ComfyUI does not run the same prompt again
        for _ in range(prompts):
            for name, questions in kinds.items():
                steps[name].append(run(server, checkpoint.name, pixels, next(seeds), questions))
        return {name: (steps[name], idle_cost_us(server.pid, questions)) for name, questions in kinds.items()}


def idle_cost_us(pid: int, questions: "Questions") -> float:
    before = processor_seconds(pid)
    questions.ask(QUESTIONS)
    return 1e6 * (processor_seconds(pid) - before) / QUESTIONS


class Questions:
    """Asks for one address after the other over one connection."""

    def __init__(self, port: int, addresses: Iterator[str]) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.addresses = addresses

    def ask(self, number: int) -> None:
        for address in itertools.islice(self.addresses, number):
            self.connection.request("GET", address)
            answer = self.connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {text.decode()}")


def run(server: Any, checkpoint: str, pixels: int, seed: int, questions: Questions) -> list[float]:
    """Seconds between the steps of one prompt, each odd one disturbed."""
    workflow = json.loads(WORKFLOW.read_text("utf-8"))
    inputs = {node["class_type"]: node["inputs"] for node in workflow.values()}
    inputs["FluxNF4CheckpointLoaderStreamed"]["ckpt_name"] = checkpoint
    inputs["EmptySD3LatentImage"] |= {"width": pixels, "height": pixels}
    inputs["KSampler"] |= {"seed": seed, "steps": STEPS + 2}
    encoder = inputs["CLIPTextEncode"]  # without padding: eight tokens in place of 256
    workflow["T5"] = {"class_type": "T5TokenizerOptions", "inputs": {"min_padding": 0, "min_length": 0}}
    workflow["T5"]["inputs"]["clip"], encoder["clip"], encoder["text"] = encoder["clip"], ["T5", 0], "a lighthouse"
    sampler = next(key for key, node in workflow.items() if node["class_type"] == "KSampler")
    moments: list[float] = []
    asking: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def note(message: Any) -> None:
            if message["type"] == "progress" and message["data"]["node"] == sampler:
                moments.append(time.monotonic())
                if len(moments) % 2 == 0 and len(moments) <= STEPS:
                    asking.append(pool.submit(questions.ask, 2 * QUESTIONS // STEPS))

        history = server.run(workflow, note)
    for burst in asking:
        burst.result()
    if history["status"]["status_str"] != "success":
        raise SystemExit(str(history["status"]))
    return [after - before for before, after in itertools.pairwise(moments)]


def processor_seconds(pid: int) -> float:
    """Of all threads of a process since it began; Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    orderly.run(main)
