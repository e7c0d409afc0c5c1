"""Writes ``locales/en`` from what nodes.py and the page's script say: they are where English is written.

    python3 tools/english_locale.py

Translators begin with these files: a language is the same files, with the same keys, in ``locales/<language>``.
"""

import argparse
import json
import re
import sys
from typing import Any

import environment
import orderly

FOLDER = environment.ROOT / "locales" / "en"

_SETTING = re.compile(
    r'id: (?P<id>\w+),\s+category: (?P<category>\[.+?\]),\s+name: "(?P<name>.+?)",\s+tooltip: "(?P<tooltip>.+?)",'
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    comfyui = environment.enter(None)
    sys.path[:0] = [str(comfyui), str(environment.ROOT / "commands")]
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import package  # noqa: F401  makes flux_nf4 importable

    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in english().items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (FOLDER / name).write_text(text, "utf-8")


def english() -> dict[str, dict[str, Any]]:
    """Each file of the locale, by its name."""
    from flux_nf4.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    nodes = {name: _node(node, NODE_DISPLAY_NAME_MAPPINGS[name]) for name, node in NODE_CLASS_MAPPINGS.items()}
    classes: dict[str, Any] = NODE_CLASS_MAPPINGS
    own_categories = {node.CATEGORY.rpartition("/")[2] for node in classes.values()}
    settings = settings_of((environment.ROOT / "web" / "flux_nf4.js").read_text("utf-8"))
    shown_categories = dict.fromkeys(part for setting in settings for part in json.loads(setting["category"])[:2])
    return {
        "main.json": {
            "nodeCategories": {category: category for category in sorted(own_categories)},
            "settingsCategories": {category: category for category in shown_categories},
        },
        "nodeDefs.json": nodes,
        "settings.json": {one["id"]: {"name": one["name"], "tooltip": one["tooltip"]} for one in settings},
    }


def settings_of(script: str) -> list[dict[str, str]]:
    """The settings that ``script`` registers; their ids as the page looks them up."""
    ids = dict(re.findall(r'const (\w+) = "(FluxNF4\.[\w.]+)";', script))
    settings = [match.groupdict() for match in _SETTING.finditer(script)]
    return [setting | {"id": ids[setting["id"]].replace(".", "_")} for setting in settings]


def _node(node: Any, display_name: str) -> dict[str, Any]:
    types = node.INPUT_TYPES()
    inputs = {**types.get("required", {}), **types.get("optional", {})}
    tooltips = getattr(node, "OUTPUT_TOOLTIPS", ())
    return {
        "display_name": display_name,
        "description": node.DESCRIPTION,
        "inputs": {name: {"name": name, "tooltip": options[1]["tooltip"]} for name, options in inputs.items()},
        "outputs": {
            str(index): {"name": kind, "tooltip": tooltip}
            for index, (kind, tooltip) in enumerate(zip(node.RETURN_TYPES, tooltips, strict=True))
        },
    }


if __name__ == "__main__":
    orderly.run(main)
