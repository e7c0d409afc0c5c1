"""Downloads that went wrong: what is in the file in place of a model, and how to get the rest."""

import re
from pathlib import Path

CUT_SHORT = "The file is damaged or cut short: download it again."

_UNFINISHED = (".part", ".crdownload", ".opdownload", ".download", ".incomplete", ".aria2", ".!qb", ".!ut")
"""Ends of names that browsers, download managers and torrent clients give files until they are whole."""

_LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/\S+\s.*?(?:\bsize (?P<size>\d{1,18}))?\s*\Z", re.S)
_TITLE = re.compile(r"<title[^>]*>\s*(.*?)\s*</title", re.S | re.I)

BEGINNING = 4096
"""Bytes from the beginning of a file that `what_came_instead` should see."""


def what_to_do(path: Path) -> str:
    """What to do about a file that is not whole: wait, if its download seems to go on; else download it again."""
    beside = next((path.name + end for end in _UNFINISHED if path.with_name(path.name + end).exists()), None)
    if beside is None:
        return CUT_SHORT
    return f"Its download has not finished ({beside} is beside it): let it finish, or download it again."


def is_unfinished(path: Path) -> str | None:
    """A sentence for the user, if the file's name shows that its download has not finished; else None."""
    if path.suffix.lower() not in _UNFINISHED:
        return None
    return (
        f"its download has not finished: a file whose name ends in {path.suffix} is only a part. Let the download "
        "finish, or start it again; the file loses this ending when it is whole."
    )


def what_came_instead(beginning: bytes, size: int) -> str | None:
    """What a file of ``size`` bytes that begins like this is, in sentences; None if it may be a model.

    Only for files whose first eight bytes cannot begin a safetensors file.
    """
    if not size:
        return "it has 0 bytes: its download has not begun, or it failed. Let it finish, or download it again."
    if not any(beginning):
        return (
            "its first bytes are zeros: the file has its place on the disk, but the download has not filled it, as a "
            "torrent that has not finished. Let it finish, check it in the torrent client, or download it again."
        )
    if pointer := _LFS.match(beginning):
        real = f" of {int(pointer['size']):,} bytes" if pointer["size"] else ""
        return (
            f"this is a Git LFS pointer, a note that stands for a file{real}, and not the file. Run 'git lfs pull' in "
            "the folder that was cloned, or download the file from its page."
        )
    return _web_page_or_text(beginning)


def _web_page_or_text(beginning: bytes) -> str | None:
    text = beginning.decode("utf-8", errors="ignore")  # the last letter may be cut
    if len(beginning) - len(text.encode()) > 3:
        return None
    text = text.lstrip("\ufeff").strip()
    if not re.fullmatch(r"[^\x00-\x08\x0e-\x1f\x7f-\x9f]+", text):
        return None
    if text.startswith("<"):
        title = _TITLE.search(text)
        said = f" ('{_short(title[1])}')" if title and title[1] else ""
        return (
            f"this is a web page{said}, not a model: the site wanted a login or an accepted licence, or has no such "
            "file. Open the model's page in a browser, log in, accept the licence, and download the file again."
        )
    return (
        f"this is a text ('{_short(text)}'), not a model: what the site answered in place of the file, or another file "
        "under this name. Log in and accept the licence on the model's page if it asks for that, and download it again."
    )


def _short(text: str) -> str:
    """On one line, 80 characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
