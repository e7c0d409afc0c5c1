"""What people use to run Flux on a GPU, side by side: time, memory and output of each, on your card.

    COMFYUI_PATH=~/ComfyUI python benchmarks/compare.py
    COMFYUI_PATH=~/ComfyUI python benchmarks/compare.py --cases 1024 '*-cap8' --only 'streamed-*' bnb-nf4
    COMFYUI_PATH=~/ComfyUI python benchmarks/compare.py --list

Run it with ComfyUI's Python. Every contender goes through ComfyUI's own memory manager, model and sampler; the
contenders of one family share a process that loads its weights once, and the families take turns, several rounds for
each case, so that what changes on the machine meanwhile meets all of them. Between turns a family has nothing on the
device but its CUDA context, about 0.5 GiB; where even that is too much, ``--alone`` has one process at a time. Each
time is the median of the turn that the machine disturbed least; compare ratios within one run. With ``--apart`` no two
contenders share a process, so that none meets what another has left in ComfyUI or in an allocator.

Without ``--checkpoint`` it makes a full-size Flux with random weights (NF4 6.9 GB; with the dense and GGUF contenders
24, 12 and 7 GB more), which is kept in ``--folder`` for the next run. A contender that fails, or is not available on
this machine, is reported, and the others go on. Results are written after every turn: ``compare.md``, ``compare.json``
and the log of each family, in ``--output``.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needs_torch  # noqa: F401
import orderly
from about import about
from arguments import begin, parser_for, positive
from cases import CASES, TINY_CASES, matching
from contenders import CONTENDERS, Contender, Options
from inside_comfyui import ALLOCATOR, allocator_of_comfyui
from results import Results, Row
from turn import Effort
from weights import Files
from worker import Request, Worker, in_process, make_files


def main() -> None:
    given = arguments()
    contenders = [next(c for c in CONTENDERS if c.name == name) for name in given.only]
    cases = [next(c for c in given.available_cases if c.name == name) for name in given.cases]
    if given.list:
        print("\n".join([*(case.name for case in cases), "", *(c.name for c in contenders)]))
        return
    begin(given)
    if ALLOCATOR not in os.environ:
        os.environ[ALLOCATOR] = allocator_of_comfyui()  # for the families' processes
    results = Results(given.output, about())
    run = Run(given, contenders, results)
    try:
        for case in cases:
            run.case(case)
    finally:
        run.stop()
    print(results.markdown())
    print(f"{given.output / 'compare.md'}, {given.output / 'compare.json'}")


def arguments() -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--gguf-pack", type=Path, help="your copy of city96/ComfyUI-GGUF")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these contenders; * and ? stand for any")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="these cases; * and ? stand for any")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each contender at each case")
    parser.add_argument("--calls", type=positive, default=12, help="timed calls of a turn, at most")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the timed calls of a turn")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no turn after this time")
    parser.add_argument("--turn-timeout", type=float, default=240.0, metavar="SECONDS", help="end a turn that hangs")
    parser.add_argument("--load-timeout", type=float, default=400.0, metavar="SECONDS", help="the same, with loading")
    parser.add_argument("--apart", action="store_true", help="a process for each contender, not for each family")
    parser.add_argument("--alone", action="store_true", help="one family after the other: for small cards, little RAM")
    parser.add_argument("--list", action="store_true", help="only say which contenders and cases would run")
    given = parser.parse_args()
    given.available_cases = TINY_CASES if given.dry_run else CASES
    try:
        given.only = matching([contender.name for contender in CONTENDERS], given.only)
        given.cases = matching([case.name for case in given.available_cases], given.cases)
    except ValueError as error:
        parser.error(str(error))
    return given


class Run:
    """The families' processes, and the order of turns."""

    def __init__(self, given: argparse.Namespace, contenders: Sequence[Contender], results: Results) -> None:
        self._given, self._contenders, self._results = given, contenders, results
        self._until = time.monotonic() + 60 * given.minutes
        self._failed: dict[Contender, str] = {}
        self._effort = Effort(given.calls, given.seconds)
        options = Options(Files(given.folder, given.checkpoint, given.dry_run), given.gguf_pack)
        families = {self._process_of(contender): contender.family for contender in contenders}
        self._workers = {
            name: Worker(family, options, given.output / f"{name}.log") for name, family in families.items()
        }
        if not given.alone:
            for worker in self._workers.values():
                worker.start()  # while the files are made, if they have to be: it reads none before its first turn
        if in_process(make_files, list(dict.fromkeys(families.values())), options, given.output / "files.log"):
            self.stop()
            raise SystemExit(f"the weights could not be made: see {given.output / 'files.log'}")
        if not given.alone:
            for worker in self._workers.values():
                worker.wait(given.load_timeout)

    def _process_of(self, contender: Contender) -> str:
        return contender.name if self._given.apart else contender.family

    def case(self, case: Any) -> None:
        """Every contender, ``--rounds`` times in turn; one that fails is not asked again."""
        (self._given.output / f"{case.name}.pt").unlink(missing_ok=True)
        rows = [Row(case, contender, failure=self._failed.get(contender, "")) for contender in self._contenders]
        self._results.rows += rows
        if not self._given.alone:
            self._turns(rows)
            return
        for name, worker in self._workers.items():
            self._turns([row for row in rows if self._process_of(row.contender) == name])
            worker.stop()

    def _turns(self, rows: Sequence[Row]) -> None:
        for turn in range(self._given.rounds):
            for row in rows:
                if not row.failure and time.monotonic() < self._until:
                    self._turn(row, turn)

    def _turn(self, row: Row, turn: int) -> None:
        contender, worker = row.contender, self._workers[self._process_of(row.contender)]
        request = Request(contender.setting, contender.name, row.case, self._effort, self._given.output)
        timeout = self._given.turn_timeout if worker.loaded else self._given.load_timeout
        row.add(worker.ask(request, timeout))
        row.loaded = worker.loaded or row.loaded
        if row.is_lasting:
            self._failed[contender] = row.failure
        told = row.failure or f"{row.ms:.1f} ms, {row.typical('peak_device') / 2**30:.2f} GiB"
        print(f"{row.case.name}, turn {turn + 1}, {contender.name}: {told}", flush=True)
        self._results.write()

    def stop(self) -> None:
        self._results.write()
        for worker in self._workers.values():
            worker.stop()


if __name__ == "__main__":
    orderly.run(main)
