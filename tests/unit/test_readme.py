"""What the texts for users and contributors say is so: files, options, links, commands, sizes."""

import re
from fnmatch import fnmatch

import environment
import pytest
from sparse_checkpoint import make_sparse_checkpoint

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

READMES = ("README.md", "README.zh.md")
DOCS = tuple(f"docs/{path.name}" for path in sorted((environment.ROOT / "docs").glob("*.md")))
TEXTS = (*READMES, *DOCS, "CONTRIBUTING.md")
_FOLDERS = "benchmarks|commands|docs|example_workflows|images|locales|tools|tests|web"
_FILE = re.compile(rf"(?<![\w./~-])((?:{_FOLDERS})(?:/[\w.-]+\w)+|README[\w.]*md)")
_COMMAND = re.compile(r"python3? ((?:benchmarks|commands|tools)/\w+\.py)([^\n#`]*)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)
_LINK = re.compile(r'\]\(([^)#:]*)(?:#([\w-]+))?\)|<img src="([^"]+)"')


def read(name):
    return (environment.ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("text", [*READMES, "CONTRIBUTING.md"])
def test_files_that_are_named_exist(text):
    named = set(_FILE.findall(read(text)))
    assert named
    assert [name for name in named if not (environment.ROOT / name).exists()] == []


@pytest.mark.parametrize("text", DOCS)
def test_files_that_a_page_of_docs_names_exist(text):
    named = set(_FILE.findall(read(text)))
    assert [name for name in named if not (environment.ROOT / name).exists()] == []


@pytest.mark.parametrize("text", TEXTS)
def test_options_of_commands_exist(text):
    for script, arguments in _COMMAND.findall(read(text)):
        source = read(script) + (read("benchmarks/arguments.py") if script.startswith("benchmarks/") else "")
        for option in re.findall(r"(?<= )--[\w-]+", arguments):
            assert f'"{option}"' in source or option == "--help", f"{script} {option}"


def test_the_texts_name_commands():
    assert all(_COMMAND.findall(read(text)) for text in (*READMES, "docs/files.md", "docs/measurements.md"))


@pytest.mark.parametrize("text", TEXTS)
def test_links_lead_to_files_and_headings(text):
    folder = (environment.ROOT / text).parent
    for page, anchor, image in _LINK.findall(read(text)):
        target = folder / (image or page) if image or page else environment.ROOT / text
        assert target.is_file(), target
        if anchor:
            titles = _HEADING.findall(target.read_text("utf-8"))
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("text", READMES)
def test_a_readme_is_one_page(text):
    assert len(read(text).splitlines()) <= 150


def test_both_readmes_have_the_same_parts_in_the_same_order():
    parts = [re.findall(r"^(?:## |<!-- \w+ -->|    \S+ \S+|<img)", read(text), re.M) for text in READMES]
    assert parts[0] == parts[1]


@pytest.mark.parametrize("text", TEXTS)
def test_a_command_has_no_blank_to_fill_in(text):
    lines = re.findall(r"^ {4,}\S.*", read(text), re.M)
    assert [line for line in lines if "<" in line] == []


def test_every_page_of_docs_is_linked_from_the_readmes():
    for text in READMES:
        assert [page for page in DOCS if f"]({page})" not in read(text)] == []


def test_the_ram_in_total_is_that_of_the_file_that_the_readme_names(tmp_path):
    path = tmp_path / "flux1-dev-bnb-nf4-v2.safetensors"
    make_sparse_checkpoint(path)
    catalogue = read_catalogue(path)
    beside = [sum(entry.nbytes for entry in part.values()) for part in (catalogue.text_encoders, catalogue.vae)]
    sizes = [f"{size / 1e9:.1f}" for size in (catalogue.ram_bytes, catalogue.transformer_ram, *beside)]
    assert sizes == ["11.9", "6.7", "5.0", "0.2"]
    gib = f"{catalogue.ram_bytes / 2**30:.2f}"
    for text in READMES:
        said = next(line for line in read(text).replace("\n  ", " ").splitlines() if "11.9 GB" in line)
        assert re.findall(r"\d+\.\d+", said) == [sizes[0], gib, *sizes[1:]]


@pytest.mark.parametrize("text", READMES)
def test_what_a_readme_shows_and_links_is_in_the_published_package(text):
    ignored = [line.rstrip("/") for line in read(".comfyignore").splitlines()]
    for page, _, image in _LINK.findall(read(text)):
        path = image or page
        assert not any(fnmatch(path, pattern) or path.startswith(f"{pattern}/") for pattern in ignored), path
