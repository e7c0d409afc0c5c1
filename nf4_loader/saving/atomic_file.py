"""Files that appear whole, or not at all: they get their name in one step, when every byte is on disk."""

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...memory import GIB

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

PARTIAL_SUFFIX = ".nf4-partial"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A context that yields a file to write to. At its end the file replaces ``path``; after an error it is removed.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
    try:  # Ctrl-C may come at any time: before the file is made, too
        with _create(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":
                partial.replace(path)  # before the lock ends
        if sys.platform == "win32":
            partial.replace(path)  # Windows renames no open file
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_abandoned(folder: Path) -> None:
    """Remove the files that killed writers have left in ``folder``. A file that is being written stays."""
    for partial in folder.glob(f"*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):  # the file is in use, or another process removes it
            nbytes = partial.stat().st_size
            _remove_unless_in_use(partial)
            logger.warning(
                "NF4: removed %s (%.2f GiB), which a saving that was broken off had left", partial, nbytes / GIB
            )


def _create(partial: Path) -> BinaryIO:
    while True:
        file = partial.open("xb")
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # without locks nobody removes what others have left
                fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():  # else taken for abandoned before it was locked
            return file
        file.close()


def _remove_unless_in_use(partial: Path) -> None:
    if sys.platform == "win32":
        partial.unlink()  # refused while it is open
    else:
        with partial.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Have the new name on disk, too; Windows does that by itself and cannot open a folder."""
    if sys.platform != "win32":
        # Some network file systems refuse it. The file is whole and has its name, so this is no error.
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
