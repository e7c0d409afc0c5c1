"""Makes this package importable as ``flux_nf4``, whatever its folder is called, for whoever imports this module.

In ComfyUI its name is the folder's. What runs outside of ComfyUI (commands, tests, tools, benchmarks) needs a name that
it can write down: it puts this folder on ``sys.path`` and says ``import package``.
"""

import importlib.util
import logging
import sys
import types
from pathlib import Path

if importlib.util.find_spec("torch") is None:
    if not {"-h", "--help"}.isdisjoint(sys.argv):  # the options are known only once torch is imported
        print(sys.modules["__main__"].__doc__, flush=True)
    raise SystemExit(
        "This Python has no PyTorch. Run the command with the Python that runs ComfyUI (portable build: "
        "python_embeded\\python.exe)."
    )

ROOT = Path(__file__).resolve().parent.parent

package = types.ModuleType("flux_nf4")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("flux_nf4", package)

# When it is imported it warns that the package `kernels` is missing, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
