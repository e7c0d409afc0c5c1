"""What diffusers' ``config.json`` beside a model's files says of it that its tensors do not."""

import json
from pathlib import Path

from .catalogue import Catalogue

_MAX_BYTES = 1_000_000


def told_by_config(catalogue: Catalogue) -> list[str]:
    """Names of the empty tensors from which ComfyUI sees what the model's ``config.json`` says."""
    told = catalogue.found.family.told_by_config if catalogue.found is not None else {}
    if not told:
        return []
    (entry, *_) = catalogue.header.tensors.values()
    true = true_in_config(entry.path.parent)
    return [name for key, name in told.items() if key in true]


def true_in_config(folder: Path) -> frozenset[str]:
    """Names of what is true of the model by ``config.json`` in ``folder``; none where there is no file that says so."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > _MAX_BYTES:
            return frozenset()
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return frozenset()
    return (
        frozenset(name for name, value in document.items() if value is True)
        if isinstance(document, dict)
        else frozenset()
    )
