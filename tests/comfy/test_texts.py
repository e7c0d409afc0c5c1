"""Every node says what it is, in English and in Chinese, wherever the page looks for it."""

import json
import re

import english_locale
import environment
import pytest

from flux_nf4.families.encoders import ENCODERS, encoders_by_type
from flux_nf4.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

NAMES = sorted(NODE_CLASS_MAPPINGS)
TRANSLATED = json.loads((environment.ROOT / "locales/zh/nodeDefs.json").read_text("utf-8"))
READMES = ("README.md", "README.zh.md")
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


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8", "INT8 ConvRot", "W4A8", "W4A4", "MXFP8", "NVFP4"])
def test_the_node_for_any_model_names_every_format(kind):
    node = NODE_CLASS_MAPPINGS["StreamModelBlocks"]
    pages = [environment.ROOT / "web/docs/StreamModelBlocks" / f"{language}.md" for language in ("en", "zh")]
    texts = [page.read_text("utf-8") for page in (*pages, *(environment.ROOT / name for name in READMES))]
    tooltips = [inputs_of("StreamModelBlocks")["model"][1], TRANSLATED["StreamModelBlocks"]["inputs"]["model"]]
    assert [text for text in (*texts, *(said["tooltip"] for said in tooltips)) if kind not in text] == []
    assert kind in ("bf16", "fp16") or set(kind.lower().split()) <= set(node.SEARCH_ALIASES)


def test_the_node_for_text_encoders_names_those_of_each_type_in_every_language():
    name, marks = "Load4BitTextEncoderStreamed", str.maketrans({"：": ": ", "、": ", ", "。": ". "})
    for tooltip in (inputs_of(name)["type"][1]["tooltip"], TRANSLATED[name]["inputs"]["type"]["tooltip"]):
        assert encoders_by_type() in tooltip.translate(marks)
    for language in ("en", "zh"):
        page = (environment.ROOT / "web/docs" / name / f"{language}.md").read_text("utf-8")
        rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")]
        for encoder in ENCODERS:
            for kind in encoder.types:
                assert any(encoder.name in names and f"`{kind}`" in types for names, types in rows), (
                    encoder.name,
                    kind,
                )


def test_the_readmes_have_a_row_for_each_node_of_today():
    english, chinese = ((environment.ROOT / name).read_text("utf-8") for name in READMES)
    for name in NAMES:
        if not name.startswith("MZ_"):
            assert f"| **{NODE_DISPLAY_NAME_MAPPINGS[name]}** |" in english
            assert f"| **{TRANSLATED[name]['display_name']}** |" in chinese


def test_nodes_for_old_graphs_are_marked_and_stand_last_in_every_language():
    old = {name for name in NAMES if name.startswith("MZ_")}
    for mapping in (NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, TRANSLATED):
        assert set(list(mapping)[-4:]) == old
    for name in NAMES:
        assert NODE_DISPLAY_NAME_MAPPINGS[name].endswith("(old)") == (name in old)
        assert TRANSLATED[name]["display_name"].endswith("（旧）") == (name in old)
        assert getattr(NODE_CLASS_MAPPINGS[name], "DEPRECATED", False) == (name in old)


@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_in_chinese_too(name):
    translated = TRANSLATED[name]
    assert CHINESE.search(translated["display_name"])
    assert CHINESE.search(translated["description"])
    for text in (*translated["inputs"].values(), *translated["outputs"].values()):
        assert text["name"]
        assert CHINESE.search(text["tooltip"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_its_help_page_names_every_input(name, language):
    text = (environment.ROOT / "web" / "docs" / name / f"{language}.md").read_text("utf-8")
    assert text.startswith("# ")
    assert bool(CHINESE.search(text)) == (language == "zh")
    for given in inputs_of(name):
        assert f"`{given}`" in text, given


def test_the_english_locale_says_what_the_nodes_and_the_page_say():
    written = {path.name: json.loads(path.read_text("utf-8")) for path in english_locale.FOLDER.iterdir()}
    assert written == english_locale.english(), "run: python3 tools/english_locale.py"


def test_every_other_language_has_the_same_keys():
    for path in english_locale.FOLDER.iterdir():
        translated = json.loads((environment.ROOT / "locales/zh" / path.name).read_text("utf-8"))
        assert keys_of(translated) == keys_of(json.loads(path.read_text("utf-8"))), path.name


def keys_of(value):
    return {key: keys_of(inner) for key, inner in value.items()} if isinstance(value, dict) else None


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_holds_what_the_page_would_take_for_a_placeholder(language):
    """The page's translations are messages of vue-i18n: {name}, @:link and singular | plural."""
    for path in (environment.ROOT / "locales" / language).iterdir():
        for text in texts_of(json.loads(path.read_text("utf-8"))):
            assert not set(text) & set("{}@|"), text


def texts_of(value):
    return [text for inner in value.values() for text in texts_of(inner)] if isinstance(value, dict) else [value]


def test_every_setting_of_the_page_is_in_the_locale():
    script = (environment.ROOT / "web/flux_nf4.js").read_text("utf-8")
    ids = {name.replace(".", "_") for name in re.findall(r'"(FluxNF4\.\w+\.\w+)"', script)}
    assert ids
    assert {setting["id"] for setting in english_locale.settings_of(script)} == ids


def test_both_languages_of_the_bar_say_the_same_things():
    script = (environment.ROOT / "web/words.js").read_text("utf-8")
    english, chinese = script.split("const en = {")[1].split("const zh = {")
    keys = re.compile(r"^\s{2,6}(\w+):", re.M)
    assert keys.findall(english) == keys.findall(chinese)
