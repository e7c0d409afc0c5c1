"""A script in a Python of its own: for what happens at exit, and after a fork."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

HEAD = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "tests" / "support")!r}, {str(ROOT / "commands")!r}]
import package, torch
"""


def run_script(*parts):
    """Run ``parts``, one after the other; they must end well, within a minute, without a word of complaint."""
    script = HEAD + "".join(map(textwrap.dedent, parts))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.split()
