"""Finds what keeps ComfyUI from using our nodes and our folder, and says in the log what the user has to change."""

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..nodes import NODE_CLASS_MAPPINGS

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent.parent.name


def replaced() -> dict[str, str]:
    """Our nodes whose names are registered for another package's node, and that package's folder.

    While this package loads, our nodes replace those. Later, those have replaced ours.
    """
    current: Mapping[str, Any] = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    return {
        name: _folder_of(current[name])
        for name, node in NODE_CLASS_MAPPINGS.items()
        if name in current and current[name] is not node
    }


def _folder_of(node: Any) -> str:
    module = getattr(node, "RELATIVE_PYTHON_MODULE", None) or node.__module__
    return str(module).removeprefix("custom_nodes.")


def say_what_is_replaced() -> None:
    """Call it while this package loads."""
    for folder, names in _by_folder(replaced()):
        logger.warning(
            "NF4: the package in custom_nodes/%s has registered %s already; the nodes of custom_nodes/%s take their "
            "place. To use the others, remove or disable custom_nodes/%s and restart ComfyUI.",
            folder,
            names,
            FOLDER,
            FOLDER,
        )


def say_what_was_taken() -> None:
    """Call it when all packages are loaded."""
    for folder, names in _by_folder(replaced()):
        logger.warning(
            "NF4: the package in custom_nodes/%s was loaded after custom_nodes/%s and has registered %s, too: graphs "
            "get its nodes. To use ours, remove or disable custom_nodes/%s and restart ComfyUI.",
            folder,
            FOLDER,
            names,
            folder,
        )


def _by_folder(taken: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return [
        (folder, ", ".join(name for name, of in taken.items() if of == folder))
        for folder in dict.fromkeys(taken.values())
    ]


def say_what_folder_is_not_served() -> None:
    """ComfyUI serves no files of a package if its folder's name has characters that must be escaped in a URL."""
    if quote(FOLDER, safe="!$&'()*+,;=@~") != FOLDER:
        logger.warning(
            "NF4: ComfyUI serves no files of a folder that is called '%s', so the nodes have no memory plan, no help "
            "and no templates in the page. Rename the folder to letters, digits, - and _ only, such as flux-nf4, and "
            "restart ComfyUI.",
            FOLDER,
        )
