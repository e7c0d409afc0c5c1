"""Makes this package importable as ``flux_nf4`` for the commands in this folder, whatever its folder is called."""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

package = types.ModuleType("flux_nf4")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("flux_nf4", package)
