"""What the texts for users and contributors name is there."""

import re

import environment
import pytest

TEXTS = ("README.md", "README.zh.md", "CONTRIBUTING.md")
_FILE = re.compile(
    r"(?<![\w./~-])((?:benchmarks|commands|example_workflows|images|locales|tools|tests|web)(?:/[\w.]+)+|README[\w.]*md)"
)
_COMMAND = re.compile(r"python3? ((?:benchmarks|commands|tools)/\w+\.py)([^\n#`]*)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)
_LINK = re.compile(r"\]\(([^)#]*)#([\w-]+)\)")


def read(name):
    return (environment.ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("text", TEXTS)
def test_files_that_are_named_exist(text):
    named = set(_FILE.findall(read(text)))
    assert named
    assert [name for name in named if not (environment.ROOT / name).exists()] == []


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_options_of_commands_exist(text):
    commands = _COMMAND.findall(read(text))
    assert commands
    for script, arguments in commands:
        source = read(script) + (read("benchmarks/arguments.py") if script.startswith("benchmarks/") else "")
        for option in re.findall(r"(?<= )--[\w-]+", arguments):
            assert f'"{option}"' in source or option == "--help", f"{script} {option}"


@pytest.mark.parametrize("text", TEXTS)
def test_links_lead_to_headings(text):
    for target, anchor in _LINK.findall(read(text)):
        headings = [
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(read(target or text))
        ]
        assert anchor in headings
