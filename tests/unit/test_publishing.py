"""What the ComfyUI registry reads."""

import sys

import environment
import yaml
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


def test_the_links_are_still_there_when_it_is_published():
    """What checks the repository out comes before the links are written: it would write the old text over them."""
    workflow = yaml.safe_load((environment.ROOT / ".github/workflows/publish.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    steps = [f"{step.get('uses', '')} {step.get('run', '')}" for step in job["steps"]]
    (links,) = [index for index, step in enumerate(steps) if "tools/publish_links.py" in step]
    (published,) = [index for index, step in enumerate(steps) if "comfy node publish" in step]
    assert links < published
    assert "actions/checkout" in steps[0]
    assert not any(step.get("uses") for step in job["steps"][1:])
    assert not any("git " in step for step in steps[links:])
