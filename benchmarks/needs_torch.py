"""Ends a script, and says why, where this Python has no PyTorch; else makes the package importable as ``flux_nf4``.

Scripts import it before torch. Where there is no torch they can only show the first text of their help.
"""

import importlib.util
import sys

import arguments  # noqa: F401  makes commands/package.py importable

if importlib.util.find_spec("torch") is None and not {"-h", "--help"}.isdisjoint(sys.argv):
    print(sys.modules["__main__"].__doc__)

import package  # noqa: F401
