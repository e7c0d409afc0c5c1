"""Every node says what it is, in English and in Chinese, wherever the page looks for it."""

import json
import re

import environment
import pytest

from flux_nf4.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

NAMES = sorted(NODE_CLASS_MAPPINGS)
TRANSLATED = json.loads((environment.ROOT / "locales/zh/nodeDefs.json").read_text("utf-8"))
CHINESE = re.compile("[一-鿿]")


def inputs_of(name):
    types = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_outputs_have_tooltips_and_the_node_has_words_that_find_it(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert NODE_DISPLAY_NAME_MAPPINGS[name]
    assert node.DESCRIPTION
    assert node.SEARCH_ALIASES
    for given, options in inputs_of(name).items():
        assert options[1]["tooltip"], given
    assert len(getattr(node, "OUTPUT_TOOLTIPS", ())) == len(node.RETURN_TYPES)


@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_in_chinese_too(name):
    translated = TRANSLATED[name]
    assert CHINESE.search(translated["display_name"])
    assert CHINESE.search(translated["description"])
    assert translated["inputs"].keys() == inputs_of(name).keys()
    assert translated.get("outputs", {}).keys() == {str(i) for i in range(len(NODE_CLASS_MAPPINGS[name].RETURN_TYPES))}
    for text in (*translated["inputs"].values(), *translated.get("outputs", {}).values()):
        assert text["name"]
        assert CHINESE.search(text["tooltip"])


def test_nothing_is_translated_that_is_not_there():
    assert TRANSLATED.keys() <= NODE_CLASS_MAPPINGS.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_its_help_page_names_every_input(name, language):
    text = (environment.ROOT / "web" / "docs" / name / f"{language}.md").read_text("utf-8")
    assert text.startswith("# ")
    assert bool(CHINESE.search(text)) == (language == "zh")
    for given in inputs_of(name):
        assert f"`{given}`" in text, given


def test_settings_are_translated():
    script = (environment.ROOT / "web/flux_nf4.js").read_text("utf-8")
    ids = re.findall(r'"(FluxNF4\.\w+\.\w+)"', script)
    assert ids
    settings = json.loads((environment.ROOT / "locales/zh/settings.json").read_text("utf-8"))
    assert settings.keys() == {name.replace(".", "_") for name in ids}


def test_both_languages_of_the_bar_say_the_same_things():
    script = (environment.ROOT / "web/words.js").read_text("utf-8")
    english, chinese = script.split("const en = {")[1].split("const zh = {")
    keys = re.compile(r"^\s{2,6}(\w+):", re.M)
    assert keys.findall(english) == keys.findall(chinese)
