"""Prints what a 4-bit transformer or text encoder is: layout, model, quantisation, sizes, and the plan for a budget.

    python commands/describe.py flux1-dev-bnb-nf4-v2.safetensors
    python commands/describe.py ~/models/FLUX.1-dev-bnb-4bit/transformer --budget 4

Nothing but headers is read. Run it with the Python that runs ComfyUI (it needs PyTorch, NumPy and nothing else).
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import orderly
import package  # noqa: F401  makes flux_nf4 importable
import terminal
import torch

from flux_nf4 import families
from flux_nf4.families import Found
from flux_nf4.families.encoders import has_encoder
from flux_nf4.memory import GIB, MIB
from flux_nf4.nf4_loader.checkpoint.catalogue import CLIP_L_PREFIX, T5_PREFIX, VAE_PREFIX, Catalogue, read_catalogue
from flux_nf4.nf4_loader.checkpoint.encoder_file import EncoderFile, encoder_in
from flux_nf4.nf4_loader.checkpoint.errors import CheckpointError, printable
from flux_nf4.nf4_loader.checkpoint.header import Header
from flux_nf4.nf4_loader.checkpoint.quant_state import QUANT_STATE
from flux_nf4.nf4_loader.checkpoint.require import require_4bit, require_transformer
from flux_nf4.nf4_loader.checkpoint.shards import read_checkpoint_header
from flux_nf4.nf4_loader.checkpoint.tensors import Weight4bit
from flux_nf4.offload.plan import BlockSize, Residency
from flux_nf4.page.encoder_plan import encoder_other_bytes, encoder_sizes
from flux_nf4.page.file_plan import block_sizes, bytes_within, make_plan, modulation_sizes, more_bytes, other_bytes

_KEY, _VALUE = 60, 120  # characters of metadata that are shown
_DTYPE = torch.bfloat16  # what tensors that are not packed are on a GPU


def main() -> None:
    terminal.replace_what_it_lacks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .safetensors file, any one shard, an index or a folder")
    parser.add_argument("--budget", type=float, metavar="GiB", help="of VRAM for the transformer or the text encoder")
    given = parser.parse_args()
    if given.budget is not None and not 0 < given.budget < math.inf:
        parser.error("argument --budget: it is a number of GiB above 0")
    if not given.model.exists():
        raise SystemExit(f"{given.model}: there is no such file or folder.")
    try:
        for line in lines_of(given.model, given.budget):
            print(line)
    except (CheckpointError, ValueError) as error:
        raise SystemExit(str(error)) from None


def lines_of(path: Path, budget_gib: float | None) -> Iterator[str]:
    """One line a fact of a transformer, an all-in-one file or a text encoder, and its plan if there is a budget.

    Raises:
        CheckpointError: it is none of these in 4 bits.
        BudgetTooSmallError: the message says what is needed.
    """
    header = read_checkpoint_header(path)
    if families.detect(header.tensors) is None and has_encoder(header.tensors):
        file = encoder_in(header)
        sizes, others, more = encoder_sizes(file, _DTYPE), encoder_other_bytes(file, _DTYPE), 0
        yield from describe_encoder(file, sizes)
    else:
        catalogue = read_catalogue(path)
        require_transformer(catalogue)
        sizes, others = block_sizes(catalogue, _DTYPE), other_bytes(catalogue, _DTYPE)
        more = more_bytes(catalogue, _DTYPE)
        yield from describe(catalogue, sizes)
    if budget_gib is not None:
        yield from plan(sizes, others, budget_gib, more)


def describe_encoder(file: EncoderFile, sizes: Sequence[BlockSize]) -> Iterator[str]:
    """One line a fact.

    Raises:
        CheckpointError: none of it is in 4 bits.
    """
    require_4bit([file])
    files = {entry.path for entry in file.header.tensors.values()}
    yield f"layout        transformers, {'1 file' if len(files) == 1 else f'{len(files)} files'}"
    yield f"model         {file.encoder.name}, a text encoder (type {' or '.join(file.encoder.types)})"
    yield f"layers        {', '.join(f'{count} {kind}' for kind, count in file.layers.items() if count)}"
    yield from _sizes_and_kinds(sizes, list(file.tensors.values()))
    left_out = sum(entry.nbytes for entry in file.header.tensors.values()) - file.nbytes
    yield f"text encoder  {file.nbytes / GIB:.2f} GiB ({left_out / GIB:.2f} more in the file that is not used)"
    yield from _metadata(file.header)


def describe(catalogue: Catalogue, sizes: Sequence[BlockSize]) -> Iterator[str]:
    """One line a fact."""
    assert catalogue.found is not None, "`require_transformer` has checked it"
    counts = Counter(size.kind for size in sizes)
    files = {entry.path for entry in catalogue.header.tensors.values()}
    yield f"layout        {catalogue.found.layout.name}, {'1 file' if len(files) == 1 else f'{len(files)} files'}"
    yield f"model         {_model(catalogue.found, catalogue.logical_shapes)}"
    yield f"blocks        {', '.join(f'{counts[kind]} {kind}' for kind in catalogue.found.family.kinds)}"
    yield from _sizes_and_kinds(sizes, catalogue.parts)
    if ahead := modulation_sizes(catalogue, _DTYPE):
        size = f"{sum(layer.nbytes for layer in ahead) / GIB:.2f} GiB"
        yield f"  {'modulation':<12}{size} beside the blocks: in VRAM with all of them, or computed ahead"
    ram, disk = catalogue.transformer_ram / GIB, catalogue.transformer_bytes / GIB
    yield f"transformer   {ram:.2f} GiB in RAM ({disk:.2f} on disk)"
    for part, prefix in (("CLIP-L", CLIP_L_PREFIX), ("T5-XXL", T5_PREFIX), ("VAE", VAE_PREFIX)):
        yield f"{part:<14}{_summary(catalogue, prefix)}"
    yield f"RAM in total  {catalogue.ram_bytes / GIB:.2f} GiB"
    yield from _metadata(catalogue.header)


def _sizes_and_kinds(sizes: Sequence[BlockSize], parts: Sequence[object]) -> Iterator[str]:
    kinds = dict.fromkeys(size.kind for size in sizes)
    wide = _width(kinds)
    for kind in kinds:
        yield f"  {kind:<{wide}}{_range([size.nbytes / MIB for size in sizes if size.kind == kind])} MiB each"
    for kind, count in Counter(map(_kind, parts)).most_common():
        yield f"  {count:<12}{kind}"


def _metadata(header: Header) -> Iterator[str]:
    for key, value in header.metadata.items():
        yield f"{_cut(key, _KEY):<13} {_cut(value, _VALUE)}"


def _cut(text: str, length: int) -> str:
    """``text`` on a line: control characters escaped, and what is beyond ``length`` characters as their number."""
    more = f"... ({len(text):,} characters)" if len(text) > length else ""
    return printable(text[:length]) + more


def _model(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{found.family.name} {found.family.variant(shapes)}".rstrip()


def _width(kinds: Iterable[str]) -> int:
    """Of the column of kinds."""
    return max([12, *(len(kind) + 2 for kind in kinds)])


def _range(values: list[float]) -> str:
    least, most = f"{min(values):.1f}", f"{max(values):.1f}"
    return least if least == most else f"{least} to {most}"


def _summary(catalogue: Catalogue, prefix: str) -> str:
    beside = {**catalogue.text_encoders, **catalogue.vae}
    entries = [entry for name, entry in beside.items() if name.startswith(prefix)]
    if not entries:
        return "not in the file"
    ((dtype, _),) = Counter(entry.dtype for entry in entries).most_common(1)
    is_4bit = any(QUANT_STATE in entry.name for entry in entries)
    return f"{sum(entry.nbytes for entry in entries) / GIB:.2f} GiB, {'4-bit' if is_4bit else dtype}"


def _kind(part: object) -> str:
    if not isinstance(part, Weight4bit):
        return "tensors that are dense"
    nested = "nested" if part.state.nested else "fp32"
    return f"weights in {part.state.quant_type.upper()}, blocksize {part.state.blocksize}, absmax {nested}"


def plan(sizes: tuple[BlockSize, ...], others: int, budget_gib: float, more: int = 0) -> Iterator[str]:
    """What stays in VRAM and what is streamed for a budget: a bar for each kind of blocks, high ones stay.

    ``others`` are the bytes beside the blocks, ``more`` those that the modulation takes beyond that where it stays.

    Raises:
        BudgetTooSmallError: the message says what is needed.
    """
    wanted = Residency((), int(budget_gib * GIB))
    made = make_plan(sizes, others, wanted)
    assert made is not None
    stays = set(made.resident)
    high, low = _bar_characters()
    yield f"with {budget_gib:g} GiB"
    kinds = dict.fromkeys(size.kind for size in sizes)
    for kind in kinds:
        marks = [index in stays for index, size in enumerate(sizes) if size.kind == kind]
        bar = "".join(high if mark else low for mark in marks)
        yield f"  {kind:<{_width(kinds)}}{bar}  {sum(marks)} of {len(marks)} stay"
    takes, everything = bytes_within(made, others, more, wanted), others + sum(size.nbytes for size in sizes) + more
    if more:
        is_there = takes > others + made.device_bytes
        yield f"  {'modulation':<{_width(kinds)}}{'stays' if is_there else 'computed ahead of the steps'}"
    yield f"  VRAM        {takes / GIB:.2f} GiB, of {everything / GIB:.2f} for all"
    yield f"  bus         {made.bytes_per_forward / 1e9:.2f} GB a step, for {len(made.streamed)} streamed blocks"


def _bar_characters() -> tuple[str, str]:
    """Of a block that stays, and of one that is streamed."""
    return ("█", "▄") if terminal.shows("█▄") else ("#", "-")


if __name__ == "__main__":
    orderly.run(main)
