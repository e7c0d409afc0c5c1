"""The rules of the house: who imports whom, and how long a file may be (`docs/ARCHITECTURE.md`)."""

from pathlib import Path

import pytest
from house import broken_import_rules, sources, too_long, unnamed

ROOT = Path(__file__).parents[2]


def test_every_import_of_the_package_goes_down():
    texts = sources(ROOT)
    assert {"nodes", "checkpoints", "memory", "nf4_loader.checkpoint.errors", "offload.comfyui.patcher"} <= texts.keys()
    assert broken_import_rules(texts) == []


TINY = {
    "__init__": "from .nodes import X\nfrom .page.routes import add",
    "memory": "import torch",
    "families": "",
    "checkpoints": "from .nf4_loader.models import fill\nfrom .offload import plan",
    "nodes": "import nodes as comfy_nodes\nfrom .checkpoints import load",
    "nodes_old": "from .nodes_shared import X",
    "nodes_shared": "from .checkpoints import load",
    "page": "",
    "page.routes": "from ..nodes import X",
    "nf4_loader": "",
    "nf4_loader.checkpoint": "",
    "nf4_loader.checkpoint.errors": "",
    "nf4_loader.checkpoint.header": "from .errors import X\nfrom ... import families",
    "nf4_loader.linear": "",
    "nf4_loader.linear.matmul": "from ..checkpoint import header\nif TYPE_CHECKING:\n    from .linear4bit import X",
    "nf4_loader.linear.linear4bit": "from . import matmul",
    "nf4_loader.models": "",
    "nf4_loader.models.fill": "import comfy.sd\nfrom ..linear.matmul import X",
    "nf4_loader.saving": "",
    "nf4_loader.saving.save": "from ..checkpoint.header import X\nfrom ...memory import GIB",
    "offload": "",
    "offload.plan": "import math",
    "offload.ring": "def f():\n    import torch",
    "offload.streamer": "import torch\nfrom .plan import X\nfrom ..memory import Y",
    "offload.comfyui": "",
    "offload.comfyui.patcher": "import comfy.model_patcher\nfrom ..streamer import X",
}
"""A house in which all is well."""


def test_a_house_in_which_all_is_well_breaks_no_rule():
    assert broken_import_rules(TINY) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nf4_loader.checkpoint.header", "from ..linear.matmul import X", "header imports nf4_loader.linear.matmul"),
        ("nf4_loader.linear.matmul", "def f():\n    from ..models import fill", "imports nf4_loader.models.fill"),
        ("nf4_loader.models.fill", "from ..saving.save import X", "imports nf4_loader.saving.save"),
        ("nf4_loader.saving.save", "from ..models.fill import X", "imports nf4_loader.models.fill"),
        ("nf4_loader.checkpoint.errors", "from .header import X", "is below all"),
        ("nf4_loader.extra.new", "", "no rule says what the room extra may import"),
        ("nf4_loader.linear.matmul", "from ...offload import plan", "matmul imports offload.plan"),
        ("offload.streamer", "from ..nf4_loader.checkpoint import errors", "imports nf4_loader.checkpoint.errors"),
        ("memory", "from .offload import plan", "memory imports offload.plan"),
        ("families", "from ..nf4_loader.checkpoint.errors import X", "families imports nf4_loader.checkpoint.errors"),
        ("families", "from ..memory import GIB", "families needs torch, by memory"),
        ("checkpoints", "from .nodes import X", "checkpoints imports nodes"),
        ("nodes_shared", "from .page.routes import X", "nodes_shared imports page.routes"),
        ("new", "", "no rule says what new may import"),
        ("offload.plan", "import torch", "offload.plan needs torch"),
        ("offload.ring", "from ..memory import GIB", "offload.ring needs torch, by memory"),
        ("offload.streamer", "import comfy.utils", "imports comfy, which is ComfyUI's"),
        ("offload.streamer", "from .comfyui import patcher", "which knows ComfyUI"),
        ("nf4_loader.checkpoint.header", "import comfy.utils", "imports comfy, which is ComfyUI's"),
        (
            "offload.plan",
            "from . import streamer",
            "imports offload.plan, which needs offload.streamer",
        ),
        ("offload.plan", "import memory", "by its full name"),
    ],
)
def test_each_rule_is_noticed_when_it_is_broken(name, text, said):
    house = {**TINY, "families.family": ""} | {name: text}
    assert any(said in line for line in broken_import_rules(house))


def test_no_file_is_too_long():
    assert too_long(ROOT, ("tests", "tools", "benchmarks", "commands")) == []


def test_a_file_that_is_too_long_is_noticed(tmp_path):
    for name, lines in {
        "pack/__init__": 350,
        "pack/long": 351,
        "top": 351,
        "tests/fits": 600,
        "tests/long": 601,
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n" * lines)
    assert too_long(tmp_path, ["tests"]) == ["pack/long.py: 351", "tests/long.py: 601", "top.py: 351"]


def test_a_package_that_names_its_modules_names_all():
    assert unnamed(sources(ROOT)) == []


def test_a_module_that_is_not_named_is_noticed():
    texts = {"pack": '"""With ``one``."""', "pack.one": "", "pack.two": "", "pack.room": "", "pack.room.three": ""}
    assert unnamed(texts) == ["pack.two"]
