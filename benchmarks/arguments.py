"""What the commands of this folder take alike."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows ``doc``, with the options that every command has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an NF4 file of Flux.1 dev; made if not given")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks", help="where weights are kept")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    parser.add_argument("--dry-run", action="store_true", help="tiny weights and pictures, to try it without a GPU")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with both folders there; what a dry run makes is kept apart."""
    given = parser.parse_args()
    if given.dry_run:
        given.folder = given.folder / "tiny"
    for folder in (given.folder, given.output):
        folder.mkdir(parents=True, exist_ok=True)
    return given
