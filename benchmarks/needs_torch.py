"""Ends a script, and says why, where this Python has no PyTorch; else makes the package importable as ``flux_nf4``.

Scripts import it before torch. Where there is no torch they can only show the first text of their help.
"""

import arguments  # noqa: F401  makes commands/package.py importable
import package  # noqa: F401
