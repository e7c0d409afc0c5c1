"""Adds to pyproject.toml where this repository's source, icon and banner are, which the ComfyUI registry shows.

    python3 tools/publish_links.py OWNER/NAME v0.1.0

The publish workflow runs it: only there is it known where the repository is.
"""

import argparse
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def with_links(text: str, repository: str, revision: str) -> str:
    """``text`` of a pyproject.toml with the links to ``repository`` (owner/name) at ``revision``."""
    images = f"https://raw.githubusercontent.com/{repository}/{revision}/images"
    urls = f'[project.urls]\nRepository = "https://github.com/{repository}"\n\n[tool.comfy]\n'
    links = f'Icon = "{images}/icon.png"\nBanner = "{images}/banner.png"\n'
    return text.replace("[tool.comfy]\n", urls + links, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", metavar="OWNER/NAME", help="on GitHub")
    parser.add_argument("revision", help="the tag that is published")
    given = parser.parse_args()
    _PYPROJECT.write_text(with_links(_PYPROJECT.read_text("utf-8"), given.repository, given.revision), "utf-8")


if __name__ == "__main__":
    main()
