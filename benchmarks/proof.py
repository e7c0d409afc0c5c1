"""Whether this package holds what it claims: each claim measured by its benchmark, beside its target.

    COMFYUI_PATH=~/ComfyUI python benchmarks/proof.py --output results --gguf-pack ~/ComfyUI/custom_nodes/ComfyUI-GGUF
    COMFYUI_PATH=~/ComfyUI python benchmarks/proof.py --output results --rows nf4 card-8
    COMFYUI_PATH=~/ComfyUI python benchmarks/proof.py --list

Run it with ComfyUI's Python. Each row is one run of another benchmark, in processes of its own. After each row its
figures are printed, and ``proof.json`` in ``--output`` is written anew from all that is there: so runs of other rows
into the same folder give one table, and a run that was cut keeps what it had. ``--table`` runs nothing and shows it.

Full-size files with random weights are made in ``--folder``, each once. Where the disk has no room for those of a row,
those that the row does not need are removed. ``python tools/charts.py --proof results/proof.json`` puts the figures
into the texts. It fails if a target is missed, or a row could not be measured.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
from about import about
from arguments import comfyui_tree, plain_parser, positive, require_gpu
from cases import matching
from inside_comfyui import ALLOCATOR, allocator_of_comfyui
from proof_figures import Figure
from proof_rows import FILES_GB, MAKING_S_A_GB, ROWS, Machine, Row

BENCHMARKS = Path(__file__).resolve().parent


def main() -> None:
    given = arguments()
    if given.table:
        report(given.output)
        return
    machine = machine_of(given)
    rows = [row for row in ROWS if row.name in given.rows]
    if given.list:
        print(listed(rows, machine, given.folder))
        return
    require_gpu()
    for folder in (given.folder, given.output):
        folder.mkdir(parents=True, exist_ok=True)
    if ALLOCATOR not in os.environ:
        os.environ[ALLOCATOR] = allocator_of_comfyui()  # for all benchmarks: else each asks for it
    until = time.monotonic() + 60 * given.minutes
    for row in rows:
        if missing := row.missing(machine):
            print(f"{row.name}: left out: {missing}", flush=True)
        elif time.monotonic() + estimate(row, given.folder) > until:
            print(f"{row.name}: left out: it takes longer than the {given.minutes:g} minutes", flush=True)
        else:
            run(row, given)
            print("\n".join(lines_of(row.name, read(row, given.output))), flush=True)
            write(given.output)
    report(given.output)


def arguments() -> argparse.Namespace:
    parser = plain_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="where weights are kept")
    parser.add_argument("--rows", default="*", help="names with commas between; * and ? stand for any")
    parser.add_argument("--gguf-pack", type=Path, help="your copy of city96/ComfyUI-GGUF")
    parser.add_argument(
        "--rounds", type=positive, help="turns of whatever is measured in turns; else as each row has it"
    )
    parser.add_argument("--prompts", type=positive, help="of the row soak; else as it has it")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no row that would take longer than this")
    parser.add_argument("--list", action="store_true", help="only say which rows there are, and what they would take")
    parser.add_argument("--table", action="store_true", help="run nothing: show what is in --output")
    given = parser.parse_args()
    try:
        given.rows = matching([row.name for row in ROWS], given.rows.split(","))
    except ValueError as error:
        parser.error(str(error))
    return given


def machine_of(given: argparse.Namespace) -> Machine:
    import torch

    return Machine(comfyui_tree(), torch.cuda.device_count())


def estimate(row: Row, folder: Path) -> float:
    """Seconds, with those for the files that are to be made."""
    return row.seconds + MAKING_S_A_GB * missing_gb(row, folder)


def missing_gb(row: Row, folder: Path) -> float:
    return sum(FILES_GB[name] for name in row.files if not (folder / name).exists())


def listed(rows: Sequence[Row], machine: Machine, folder: Path) -> str:
    lines = ["| row | seconds | files, GB | to be made, GB | what |", "|---" * 5 + "|"]
    for row in rows:
        what = f"{row.what} ({row.missing(machine)})" if row.missing(machine) else row.what
        to_make = missing_gb(row, folder)
        lines.append(f"| {row.name} | {estimate(row, folder):.0f} | {row.gb:.1f} | {to_make:.1f} | {what} |")
    return "\n".join(lines)


def run(row: Row, given: argparse.Namespace) -> None:
    """Have the row's benchmark measure it; how that went is in ``run.json`` beside the benchmark's own."""
    folder = given.output / row.name
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / result_name(row), folder / "log.txt"
    result.unlink(missing_ok=True)
    make_room(row, given.folder)
    command = command_of(row, given)
    print(f"{row.name}: {shlex.join(command[1:])}", flush=True)
    how: dict[str, Any] = {"about": about(), "command": shlex.join([Path(command[1]).name, *row.arguments])}
    started = time.monotonic()
    how["code"] = execute(command, log, 2 * estimate(row, given.folder) + 120)
    how["seconds"] = round(time.monotonic() - started)
    how["said"] = last_line(log) if how["code"] else ""
    (folder / "run.json").write_text(json.dumps(how, indent=1))


def command_of(row: Row, given: argparse.Namespace) -> list[str]:
    """Of two equal options the last counts."""
    command = [sys.executable, str(BENCHMARKS / row.script), *row.arguments]
    for name in row.takes:
        if (value := getattr(given, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return [*command, "--output", str(given.output / row.name), "--folder", str(given.folder)]


def execute(command: Sequence[str], log: Path, timeout_s: float) -> int:
    """Run a command, and end it and its processes after this time or with this one; its exit code."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with log.open("a") as file:
            file.write(f"\nnot done after {timeout_s:.0f} s\n")
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text("utf-8", "replace").splitlines()) if line.strip()), "")


def make_room(row: Row, folder: Path) -> None:
    """Remove what a run that was cut has left half made and, as far as it must be, files that ``row`` does not need."""
    for name in FILES_GB:
        for partial in folder.glob(f"[0-9]*.{name}"):
            partial.unlink()
    others = sorted((name for name in FILES_GB if name not in row.files), key=FILES_GB.__getitem__, reverse=True)
    for name in others:
        if shutil.disk_usage(folder).free > 1.05e9 * missing_gb(row, folder):
            return
        if (folder / name).exists():
            print(f"no room on the disk: {name} is removed", flush=True)
            (folder / name).unlink()


def result_name(row: Row) -> str:
    return f"{Path(row.script).stem}.json"


def read(row: Row, output: Path) -> list[Figure]:
    """The figures of a row that was run, whole or in part; one that says why there are none, where there are none."""
    try:
        found = json.loads((output / row.name / result_name(row)).read_text("utf-8"))
        return list(row.read(found))
    except FileNotFoundError:
        why = how_it_went(row, output)["said"] or "it was cut"
    except (ValueError, LookupError) as error:
        why = f"its JSON cannot be read: {error}"
    return [Figure(row.what, None, note=why)]


def how_it_went(row: Row, output: Path) -> dict[str, Any]:
    path = output / row.name / "run.json"
    told: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"said": ""}
    return told


def lines_of(name: str, found: Sequence[Figure]) -> Iterator[str]:
    for figure in found:
        yield f"| {name} | {figure.name} | {figure.shown} | {figure.target} | {figure.verdict} |"


def all_read(output: Path) -> dict[str, list[Figure]]:
    """Figures of every row that has a folder in ``output``."""
    return {row.name: read(row, output) for row in ROWS if (output / row.name).is_dir()}


def write(output: Path) -> None:
    rows: dict[str, Any] = {}
    for row in ROWS:
        if (output / row.name).is_dir():
            told = [
                asdict(figure) | {"shown": figure.shown, "target": figure.target, "verdict": figure.verdict}
                for figure in read(row, output)
            ]
            rows[row.name] = {"what": row.what, "script": row.script, **how_it_went(row, output), "figures": told}
    partial = output / "proof.json.partial"
    partial.write_text(json.dumps({"rows": rows}, indent=1))
    partial.replace(output / "proof.json")


def report(output: Path) -> None:
    """Write and print all that was found.

    Raises:
        SystemExit: not all of it holds.
    """
    write(output)
    found = all_read(output)
    print("\n| row | what | figure | target | |\n" + "|---" * 5 + "|")
    for name, figures in found.items():
        print("\n".join(lines_of(name, figures)))
    of = {verdict: [f for figures in found.values() for f in figures if f.verdict == verdict] for verdict in VERDICTS}
    print(f"\n{', '.join(f'{len(figures)} {verdict}' for verdict, figures in of.items())}; {output / 'proof.json'}")
    if of["missed"] or of["not measured"]:
        sys.exit("not all of it holds")


VERDICTS = ("held", "missed", "not measured", "beside")


if __name__ == "__main__":
    orderly.run(main)
