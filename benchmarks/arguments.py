"""What the commands of this folder take alike, and what they need. Standard library only, so that ``--help`` works."""

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "commands")]


class _Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and each option's default."""


def plain_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows ``doc``, with the one option that every command has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Format)
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "results", help="folder for results")
    return parser


def parser_for(doc: str | None, *, can_be_dry: bool = True) -> argparse.ArgumentParser:
    """`plain_parser`, for what runs a full-size model on a GPU, or with ``--dry-run`` a tiny one anywhere."""
    parser = plain_parser(doc)
    parser.set_defaults(dry_run=False, can_be_dry=can_be_dry)
    parser.add_argument("--checkpoint", type=Path, help="an NF4 file of Flux.1 dev; made if not given")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks", help="where weights are kept")
    if can_be_dry:
        parser.add_argument("--dry-run", action="store_true", help="tiny weights and pictures, to try it without a GPU")
    return parser


def positive(text: str) -> int:
    """The type of an option that is a number of things: a whole number from 1 on."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return number


def pattern(text: str) -> re.Pattern[str]:
    """The type of an option that is a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression: {error}") from None


def begin(given: argparse.Namespace) -> None:
    """See that there is what arguments of `parser_for` ask for, and make the folders; a dry run has its own.

    Raises:
        SystemExit: there is no ComfyUI, no GPU, or no such checkpoint.
    """
    comfyui_tree()
    if given.checkpoint is not None and not given.checkpoint.is_file():
        raise SystemExit(f"{given.checkpoint}: there is no such file")
    if given.dry_run:
        given.folder = given.folder / "tiny"
        print("A dry run: tiny weights on any device. Its figures mean nothing.", flush=True)
    else:
        require_gpu(can_be_dry=given.can_be_dry)
    for folder in (given.folder, given.output):
        folder.mkdir(parents=True, exist_ok=True)


def comfyui_tree() -> Path:
    """The ComfyUI tree to measure in.

    Raises:
        SystemExit: the environment does not name one.
    """
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        raise SystemExit("COMFYUI_PATH is not set. Set it to the folder of the ComfyUI to measure in.")
    if not Path(given, "comfy").is_dir():
        raise SystemExit(f"COMFYUI_PATH={given}: there is no ComfyUI (it has no folder comfy).")
    return Path(given)


def require_gpu(*, can_be_dry: bool = False) -> None:
    """
    Raises:
        SystemExit: PyTorch sees no GPU. The message says whether there is another way (``can_be_dry``).
    """
    import torch

    if not torch.cuda.is_available():
        without = ", or try it here with --dry-run" if can_be_dry else ""
        raise SystemExit(
            "This measures a GPU, and PyTorch sees none here (torch.cuda.is_available() is False). Run it where there "
            f"is one{without}."
        )
