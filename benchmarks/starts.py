"""From a file's name to the end of the first step, page cache warm: this package beside what ComfyUI's own files take.

    COMFYUI_PATH=~/ComfyUI python benchmarks/starts.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/starts.py --gguf-pack ~/ComfyUI/custom_nodes/ComfyUI-GGUF --cap 8

Run it with ComfyUI's Python. Each contender has a process of its own. Each round loads the file anew (*load*), has
ComfyUI get the model ready for a step (*ready*), and runs one step (*first step*); the process has done all three
before. With ComfyUI's dynamic VRAM the weights come in the first step, here some of them come before: compare the sums.
`first_step.py` says where the time of this package goes. Prints a table and writes ``starts.json``; files are made as
for `compare.py`.
"""

import gc
import json
import os
import statistics
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
from about import about
from arguments import begin, parser_for, positive
from cases import Case, matching
from contenders import CONTENDERS, Contender, Options, family_maker
from inside_comfyui import ALLOCATOR, allocator_of_comfyui, import_package
from weights import Files
from worker import in_process, log_to, make_files

DEFAULT = ["streamed-0-0", "streamed-auto", "comfy-int8", "gguf-q4"]
PARTS = ("load_s", "ready_s", "first_step_s")


def measure(contender: Contender, options: Options, case: Case, rounds: int, results: Path, log: Path) -> None:
    """A whole process: seconds of each part, medians, or why there are none, as JSON in ``results``."""
    log_to(log)
    import_package()
    import torch
    from family import Unavailable

    options.files.enter()
    try:
        with torch.inference_mode():
            make = family_maker(contender.family, options)
            times = [start(make, contender.setting, case) for _ in range(rounds + 1)][1:]
            found: dict[str, Any] = {part: statistics.median(time[part] for time in times) for part in PARTS}
    except (Unavailable, torch.OutOfMemoryError) as error:
        found = {"failure": " ".join(str(error).split())[:300]}
    results.write_text(json.dumps(found))


def start(make: Any, setting: str, case: Case) -> dict[str, float]:
    """One round, after which nothing of the model is left."""
    from memory import capped
    from timing import seconds
    from turn import device_of_comfyui

    import flux_nf4.checkpoints

    flux_nf4.checkpoints._models.clear()
    gc.collect()
    device = device_of_comfyui()
    loaded: list[Any] = []
    with capped(device, case.cap_gib):
        times = {"load_s": seconds(lambda: loaded.append(make()), device)}
        with loaded[0].at_work(setting, case) as model:
            times |= {"ready_s": seconds(model.load, device), "first_step_s": seconds(model.forward, device)}
    return times


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| contender | load s | ready s | first step s | in all s |", "|---" * 5 + "|"]
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['contender']} | {row['failure']} |" + " |" * 3)
            continue
        parts = [row[part] for part in PARTS]
        lines.append(f"| {row['contender']} | {' | '.join(f'{value:.3f}' for value in (*parts, sum(parts)))} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--gguf-pack", type=Path, help="your copy of city96/ComfyUI-GGUF")
    parser.add_argument("--only", nargs="+", default=DEFAULT, metavar="NAME", help="contenders, as compare.py has them")
    parser.add_argument("--rounds", type=positive, default=5, help="starts of each contender")
    parser.add_argument("--pixels", type=positive, default=512, help="picture size")
    parser.add_argument("--cap", type=float, default=0.0, help="GiB of the card; 0 leaves it as it is")
    given = parser.parse_args()
    try:
        names = matching([contender.name for contender in CONTENDERS], given.only)
    except ValueError as error:
        parser.error(str(error))
    begin(given)
    if ALLOCATOR not in os.environ:
        os.environ[ALLOCATOR] = allocator_of_comfyui()  # for the contenders' processes
    contenders = [contender for contender in CONTENDERS if contender.name in names]
    options = Options(Files(given.folder, given.checkpoint, given.dry_run), given.gguf_pack)
    if in_process(make_files, [contender.family for contender in contenders], options, given.output / "files.log"):
        raise SystemExit(f"the weights could not be made: see {given.output / 'files.log'}")
    case = Case("", 64, text_tokens=8) if given.dry_run else Case("", given.pixels, cap_gib=given.cap)
    results: dict[str, Any] = {"about": about(), "cap_gib": given.cap, "rows": []}
    for contender in contenders:
        told, log = given.output / f"{contender.name}.json", given.output / f"{contender.name}.log"
        told.unlink(missing_ok=True)
        code = in_process(measure, contender, options, case, given.rounds, told, log)
        found = json.loads(told.read_text()) if told.exists() else {"failure": f"exit code {code}; see {log}"}
        results["rows"].append({"contender": contender.name, **found})
        (given.output / "starts.json").write_text(json.dumps(results, indent=1))
    print(table(results["rows"]))


if __name__ == "__main__":
    orderly.run(main)
