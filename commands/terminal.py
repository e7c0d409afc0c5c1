"""What a terminal can show: Windows' code pages and ``LC_ALL=C`` lack most characters."""

import io
import sys


def replace_what_it_lacks() -> None:
    """Have ``print`` show another character in the place of one that the terminal lacks, where it would raise."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def shows(text: str) -> bool:
    """Whether the terminal has all characters of ``text``."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True
