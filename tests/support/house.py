"""The rules of the package's house, and what breaks them: read from the source, so that a lazy import counts, too."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

BELOW_ALL = frozenset({"memory", "families", "with_triton", "low_rank"})
PACKAGES = frozenset({"nf4_loader", "offload"})

MAY_IMPORT = {
    "memory": frozenset(),
    "families": frozenset({"memory"}),
    "with_triton": frozenset({"memory"}),
    "low_rank": frozenset({"memory", "with_triton"}),
    "nf4_loader": BELOW_ALL,
    "offload": BELOW_ALL,
    "checkpoints": BELOW_ALL | PACKAGES,
    "encoders": BELOW_ALL | PACKAGES | {"checkpoints"},
    "nodes": BELOW_ALL | PACKAGES | {"checkpoints", "encoders"},
    "page": BELOW_ALL | PACKAGES | {"checkpoints", "encoders", "nodes"},
    "__init__": BELOW_ALL | PACKAGES | {"checkpoints", "encoders", "nodes", "page"},
}
"""What each part at the root may import beside itself. ``nodes`` are all files whose names begin so."""

ROOMS = {
    "checkpoint": frozenset(),
    "linear": frozenset({"checkpoint"}),
    "models": frozenset({"checkpoint", "linear"}),
    "saving": frozenset({"checkpoint", "linear"}),
}
"""What each room of ``nf4_loader`` may import beside itself."""

WITHOUT_TORCH = ("offload.plan", "offload.ring", "families")
WITHOUT_COMFYUI = ("offload", "nf4_loader.checkpoint", "families", "memory", "low_rank", "with_triton")
COMFYUI_IN_OFFLOAD = "offload.comfyui"
COMFYUI = frozenset({"comfy", "comfy_api", "folder_paths", "nodes", "server", "execution"})
LOWEST = "nf4_loader.checkpoint.errors"
MOST_LINES, MOST_LINES_BESIDE = 350, 600


@dataclass
class Imports:
    """What a file imports: modules of this package by their dotted names, and the first names of all others.

    ``at_once`` is what of both is imported with it, outside of any function.
    """

    own: set[str] = field(default_factory=set)
    own_for_types: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    at_once: set[str] = field(default_factory=set)


def files(root: Path) -> list[Path]:
    """The files of the package: what is at the root, and every folder there that has an ``__init__``."""
    folders = [path.parent for path in root.glob("*/__init__.py")]
    return sorted([*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def sources(root: Path) -> dict[str, str]:
    """The text of each file of the package, by its dotted name; a package's own file is called as the package."""
    return {_name(path.relative_to(root)): path.read_text("utf-8") for path in files(root)}


def broken_import_rules(texts: Mapping[str, str]) -> list[str]:
    """One line for each import that is against the rules, and for each circle."""
    graph = {name: _imports(name, text, texts) for name, text in texts.items()}
    return sorted([*_against_the_floors(graph), *_against_the_rooms(graph), *_too_heavy(graph), *_circles(graph)])


def too_long(root: Path, beside: Iterable[str] = ()) -> list[str]:
    """Files of the package with more than `MOST_LINES`, and files in the folders ``beside`` it with too many."""
    limits = dict.fromkeys(files(root), MOST_LINES)
    limits |= dict.fromkeys((path for folder in beside for path in (root / folder).rglob("*.py")), MOST_LINES_BESIDE)
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in limits}
    return sorted(f"{path.relative_to(root)}: {lines}" for path, lines in lengths.items() if lines > limits[path])


def unnamed(texts: Mapping[str, str]) -> list[str]:
    """Modules that their package's docstring leaves out, where it names others."""
    missing = []
    for package, text in texts.items():
        of_package = [name for name in texts if name.rpartition(".")[0] == package and not _is_package(name, texts)]
        said = ast.get_docstring(ast.parse(text)) or ""
        named = {name for name in of_package if f"``{name.rpartition('.')[2]}``" in said}
        missing += sorted({*of_package} - named) if named else []
    return missing


def _is_package(name: str, texts: Mapping[str, str]) -> bool:
    return any(other.startswith(f"{name}.") for other in texts)


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def _imports(name: str, text: str, texts: Mapping[str, str]) -> Imports:
    found = Imports()
    package = name.split(".") if _is_package(name, texts) else name.split(".")[:-1]
    tree = ast.parse(text)
    for_types = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            kind, names = found.others, {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            kind, names = found.others, {str(node.module).split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            module = ".".join(filter(None, base))
            members = {".".join(filter(None, (module, alias.name))) for alias in node.names}
            kind = found.own_for_types if id(node) in for_types else found.own
            names = {member if member in texts else module for member in members}
        else:
            continue
        kind |= names
        if id(node) not in for_types | later:
            found.at_once |= names
    return found


def _part(name: str) -> str:
    """What is at the root: the first of the dotted names."""
    first = name.split(".")[0]
    return "nodes" if first.startswith("nodes") else first


def _against_the_floors(graph: Mapping[str, Imports]) -> Iterator[str]:
    for name, imports in graph.items():
        part = _part(name)
        if part not in MAY_IMPORT:
            yield f"{name}: no rule says what {part} may import"
            continue
        for own in imports.own | imports.own_for_types:
            if _part(own) not in MAY_IMPORT[part] | {part}:
                yield f"{name} imports {own}"
        for other in imports.others & {_part(name) for name in graph} - COMFYUI:
            yield f"{name} imports {other} by its full name, which is the user's"


def _against_the_rooms(graph: Mapping[str, Imports]) -> Iterator[str]:
    rooms = {name: name.split(".")[1] for name in graph if name.startswith("nf4_loader.")}
    for name, room in rooms.items():
        if room not in ROOMS:
            yield f"{name}: no rule says what the room {room} may import"
            continue
        for own in graph[name].own | graph[name].own_for_types:
            if own in rooms and rooms[own] not in ROOMS[room] | {room}:
                yield f"{name} imports {own}"
            elif own == "nf4_loader":
                yield f"{name} imports {own}, which is above all rooms"
        if name == LOWEST and (graph[name].own or graph[name].own_for_types):
            yield f"{name} imports {', '.join(graph[name].own)}, and is below all"


def _too_heavy(graph: Mapping[str, Imports]) -> Iterator[str]:
    for name in graph:
        if _is_in(name, WITHOUT_TORCH):
            for reached in _reached(name, {other: imports.at_once for other, imports in graph.items()}):
                if "torch" in graph[reached].at_once:
                    yield f"{name} needs torch" + ("" if reached == name else f", by {reached}")
        if _is_in(name, WITHOUT_COMFYUI) and not _is_in(name, (COMFYUI_IN_OFFLOAD,)):
            for other in graph[name].others & COMFYUI:
                yield f"{name} imports {other}, which is ComfyUI's"
            for own in graph[name].own:
                if _is_in(own, (COMFYUI_IN_OFFLOAD,)):
                    yield f"{name} imports {own}, which knows ComfyUI"


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _reached(name: str, imported: Mapping[str, set[str]]) -> set[str]:
    """``name`` and all of this package that comes with it."""
    found, left = set(), [name]
    while left:
        module = left.pop()
        if module in imported and module not in found:
            found.add(module)
            left += imported[module]
    return found


def _circles(graph: Mapping[str, Imports]) -> Iterator[str]:
    imported = {name: imports.own for name, imports in graph.items()}
    for name in graph:
        for own in imported[name] - {name}:
            if own in graph and name in _reached(own, imported):
                yield f"{name} imports {own}, which needs {name}"
