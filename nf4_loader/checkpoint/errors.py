"""The one exception that leaves this package. It shows text from unchecked files safely."""

from pathlib import Path

DAMAGED = "The file is damaged or was made by a tool that this node does not know."


def printable(text: str) -> str:
    """``text`` with its control characters escaped: a terminal would obey them."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def reason(error: OSError) -> str:
    """Why a file cannot be read. Unlike ``str(error)`` it names no folder: the page gets to see it."""
    return error.strerror or type(error).__name__


class CheckpointError(Exception):
    """A file that cannot be loaded, with what was found, what was expected and what to do.

    The message starts with the file's name and holds no folder and no control character, so it can be shown to a
    person, in a terminal or in the page, as it is.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(printable(f"{path.name or path.resolve().name}: {problem}"))
