"""What the ComfyUI registry reads."""

import sys

import environment
from publish_links import with_links

from flux_nf4.nf4_loader.saving.save import VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

PYPROJECT = (environment.ROOT / "pyproject.toml").read_text("utf-8")


def test_the_links_are_where_the_registry_looks():
    project = tomllib.loads(with_links(PYPROJECT, "someone/flux-nf4", "v1.2.3"))
    assert project["project"]["urls"]["Repository"] == "https://github.com/someone/flux-nf4"
    comfy = project["tool"]["comfy"]
    for key, name in (("Icon", "icon.png"), ("Banner", "banner.png")):
        assert comfy[key] == f"https://raw.githubusercontent.com/someone/flux-nf4/v1.2.3/images/{name}"
        assert (environment.ROOT / "images" / name).is_file()
    assert comfy["PublisherId"]
    without = tomllib.loads(PYPROJECT)
    assert project["project"].items() >= without["project"].items()


def test_saved_files_name_the_version_that_is_published():
    assert tomllib.loads(PYPROJECT)["project"]["version"] == VERSION


def test_no_requirement_is_comfyuis_own():
    lines = (environment.ROOT / "requirements.txt").read_text("utf-8").splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == tomllib.loads(PYPROJECT)["project"]["dependencies"]
    assert not any(line.startswith(("torch", "numpy", "transformers", "safetensors")) for line in listed)
