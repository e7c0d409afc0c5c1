"""What a file must hold so that a node can load it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ...families import Family
from .catalogue import CLIP_L_PREFIX, SCALES, T5_PREFIX, VAE_PREFIX, Catalogue
from .encoder_file import EncoderFile
from .errors import DAMAGED, CheckpointError
from .header import TensorEntry, natural_key
from .identify import what_else_it_is
from .quant_state import QUANT_STATE
from .tensors import Weight4bit

_MAX_BLOCKS = 500
"""Eight times as many as the deepest model has. A plan takes longer with more blocks, and the page asks for many."""


def require_transformer(catalogue: Catalogue) -> None:
    """Check that there is a transformer of a known family with 4-bit weights, and that all of it can be read.

    Raises:
        CheckpointError: saying what the file is and which loader is right.
    """
    is_4bit = any(isinstance(part, Weight4bit) for part in catalogue.parts)
    if catalogue.found is None or not is_4bit:
        raise CheckpointError(catalogue.path, what_else_it_is(catalogue.header))
    _require_blocks(catalogue, catalogue.found.family)
    for part in catalogue.parts:
        if isinstance(part, TensorEntry) and _is_packed(part):
            weight = part.name.removesuffix(".absmax")
            raise CheckpointError(
                catalogue.path,
                f"{weight}: it is packed, but '{weight}{QUANT_STATE}nf4', which gives its shape, is not in the file. "
                f"{DAMAGED}",
            )
        if part.name.endswith(SCALES):
            raise CheckpointError(
                catalogue.path,
                f"{part.name}: some of its layers are in 4 bits and others in scaled fp8, which this node cannot run. "
                "Make a 4-bit file of it with commands/quantise.py and load that.",
            )


def _require_blocks(catalogue: Catalogue, family: Family) -> None:
    found = {(block.blocks, block.index) for name in catalogue.transformer if (block := family.block_of(name))}
    if len(found) > _MAX_BLOCKS:
        problem = f"it has {len(found):,} blocks; no {family.name} model has more than {_MAX_BLOCKS}. {DAMAGED}"
        raise CheckpointError(catalogue.path, problem)


def require_all_in_one(catalogue: Catalogue) -> None:
    """Check that the transformer, CLIP-L, T5 and the VAE are in the file.

    Raises:
        CheckpointError: saying what the file is, or naming the parts that are missing, and what to do.
    """
    require_transformer(catalogue)
    parts = {
        "CLIP-L": any(name.startswith(CLIP_L_PREFIX) for name in catalogue.text_encoders),
        "T5-XXL": catalogue.t5_layers > 0,
        "VAE": bool(catalogue.vae),
    }
    missing = [part for part, present in parts.items() if not present]
    if missing:
        raise CheckpointError(
            catalogue.path,
            f"it has the Flux transformer but no {', no '.join(missing)} (looked for '{CLIP_L_PREFIX}*', "
            f"'{T5_PREFIX}*' and '{VAE_PREFIX}*'). This node gives MODEL, CLIP and VAE from one all-in-one file, such "
            "as flux1-dev-bnb-nf4-v2.safetensors. A file without them goes into models/diffusion_models: load it with "
            "'Load Flux NF4 UNet (streamed)', with 'DualCLIPLoader' (clip_l and t5xxl, type flux) and 'Load VAE' "
            "(ae.safetensors) beside it.",
        )


def require_4bit(files: Sequence[EncoderFile]) -> None:
    """Check that one of the ``files`` is in 4 bits.

    Raises:
        CheckpointError: none is; it names the nodes for dense ones.
    """
    if not any(file.is_4bit for file in files):
        raise CheckpointError(
            files[0].path,
            f"it is {files[0].encoder.name} with dense weights, not in NF4 or FP4. Load it with "
            f"{'CLIPLoader' if len(files) == 1 else 'DualCLIPLoader'!r} and stream it with 'Stream Text Encoder'.",
        )


def require_no_missing(path: Path, of: str, missing: Iterable[str]) -> None:
    """Check that no tensor of a model is missing.

    Args:
        path: Of its file.
        of: The model, such as "the transformer".
        missing: Names of the tensors that the model needs and the file lacks.

    Raises:
        CheckpointError: naming the first ones.
    """
    names = sorted(missing, key=natural_key)
    if names:
        raise CheckpointError(
            path,
            f"tensors of {of} are missing ({len(names)}): {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}. "
            "The file is incomplete: download it again.",
        )


def _is_packed(entry: TensorEntry) -> bool:
    return entry.name.endswith(".absmax") or (entry.name.endswith(".weight") and entry.dtype in ("U8", "I8"))
