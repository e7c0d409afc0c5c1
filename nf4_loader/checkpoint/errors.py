"""The one exception that leaves this package."""

from pathlib import Path

DAMAGED = "The file is damaged or was made by a tool that this node does not know."


class CheckpointError(Exception):
    """A file that cannot be loaded, with what was found, what was expected and what to do.

    The message starts with the file's name, so it can be shown to a person as it is.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path.name or path.resolve().name}: {problem}")
