"""Tokenizers that ComfyUI does not bring along, from the files beside the weights.

ComfyUI has those of CLIP, T5 and Qwen itself. That of Mistral 3 it takes from its own files, where it is a tensor
``tekken_model``: the bytes of Mistral's ``tekken.json``. Files of transformers have no such tensor. Beside them is
``tekken.json`` or transformers' ``tokenizer.json``, which holds the same vocabulary in another form.
"""

import base64
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.encoder_file import EncoderFile
from ..checkpoint.errors import CheckpointError, reason

_TEKKEN = "tekken_model"
_MAX_BYTES = 100_000_000
_WHERE_FROM = (
    "'tekken.json' of mistralai/Mistral-Small-3.2-24B-Instruct-2506, or 'tokenizer.json' from the folder 'tokenizer' "
    "of diffusers/FLUX.2-dev-bnb-4bit (both on huggingface.co)"
)


def tokenizer_tensors(file: EncoderFile, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors (uint8) that ComfyUI makes the tokenizer of, if the file's own ``names`` have none and it needs any.

    Raises:
        CheckpointError: the tokenizer's file is missing or is not readable.
    """
    if file.encoder.name != "Mistral 3" or _TEKKEN in names:
        return {}
    folder = file.path if file.path.is_dir() else file.path.parent
    for name, read in (("tekken.json", _as_it_is), ("tokenizer.json", _tekken_of)):
        for path in (folder / name, folder.parent / "tokenizer" / name):
            if path.is_file():
                return {_TEKKEN: torch.frombuffer(bytearray(_read(path, read)), dtype=torch.uint8)}
    raise CheckpointError(
        file.path,
        f"the tokenizer of {file.encoder.name} is missing. Put one of these files beside it: {_WHERE_FROM}.",
    )


def _read(path: Path, convert: Any) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        raw = path.read_bytes()
        converted: bytes = convert(json.loads(raw), raw)
    except OSError as error:
        raise CheckpointError(path, f"the tokenizer cannot be read ({reason(error)}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            path,
            f"it is no tokenizer of Mistral 3 ({type(error).__name__}: {error}). Download it again: {_WHERE_FROM}.",
        ) from None
    return converted


def _as_it_is(document: Any, raw: bytes) -> bytes:
    if not (document["vocab"] and document["special_tokens"] and document["config"]["default_vocab_size"]):
        raise ValueError("it lists no tokens")
    return raw


def _tekken_of(document: Any, _: bytes) -> bytes:
    """``tekken.json`` of transformers' ``tokenizer.json``: ordinary tokens are numbered after the special ones there,
    and are bytes in base64."""
    special = {int(token["id"]): str(token["content"]) for token in document["added_tokens"]}
    offset = max(special) + 1
    ids = {token: int(number) for token, number in document["model"]["vocab"].items() if number >= offset}
    if not ids:
        raise ValueError("it lists no tokens")
    byte_of = _bytes_by_character()
    vocab = [
        {"rank": number - offset, "token_bytes": base64.b64encode(bytes(byte_of[char] for char in token)).decode()}
        for token, number in sorted(ids.items(), key=lambda item: item[1])
    ]
    config = {"default_vocab_size": max(ids.values()) + 1, "default_num_special_tokens": offset}
    named = [{"rank": number, "token_str": text} for number, text in sorted(special.items())]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": named}).encode()


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: the printable bytes are themselves, the others come after U+00FF in order.
    https://github.com/openai/gpt-2/blob/master/src/encoder.py (``bytes_to_unicode``)"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
