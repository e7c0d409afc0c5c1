"""Our nodes in ComfyUI's page: found by search, queued, failing with advice, quick."""

import copy
import json
import random
import re

import environment
import pytest
from paces import slowness

LOADER = "FluxNF4CheckpointLoaderStreamed"
OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
FULL_SIZE = "flux1-dev-bnb-nf4-v2.safetensors"
UNET_ONLY = "flux1-dev-nf4-unet.safetensors"
EXAMPLES = environment.ROOT / "example_workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
WORKFLOW = json.loads((EXAMPLES / "flux_nf4_text_to_image.json").read_text("utf-8"))


def test_a_node_is_found_by_another_word_for_it(page, frontend):
    page.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.page.locator("input:focus").wait_for()
    # The old page looks at names only.
    page.page.keyboard.type("block swap" if frontend == "newest-frontend" else "stream model")
    page.page.get_by_role("option").filter(has_text="Stream Model Blocks").first.click()
    page.page.wait_for_function("() => app.graph._nodes.some(({ type }) => type === 'StreamModelBlocks')")
    page.wait_for_bar("shown here once it has run")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_and_its_api_form_are_the_same_workflow(name, page):
    page.load(json.loads((EXAMPLES / f"{name}.json").read_text("utf-8")))
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in prompt.values():
        node.pop("_meta", None)
    assert prompt == json.loads((EXAMPLES / "api" / f"{name}.json").read_text("utf-8"))


def test_a_node_stays_as_wide_as_in_its_graph(page):
    """Or wider: the old page enlarges a graph by a fifth as it opens it for Vue."""
    page.load(WORKFLOW)
    page.wait_for_bar("19 double")
    assert page.page.evaluate("() => app.graph.getNodeById(1).size[0]") >= WORKFLOW["nodes"][0]["size"][0]


def test_an_error_shows_its_advice(page):
    graph = copy.deepcopy(WORKFLOW)
    graph["nodes"][0]["widgets_values"][0] = UNET_ONLY
    page.load(graph)
    page.wait_for_bar(UNET_ONLY)
    page.set(**{"FluxNF4.Bar.Show": False})  # which says the same
    page.page.evaluate("() => app.queuePrompt(0)")
    details = page.page.get_by_role("button", name="View details")
    advice = page.page.get_by_text("it has the Flux transformer but no CLIP-L").locator("visible=true")
    details.or_(page.page.get_by_role("dialog")).first.wait_for()
    if details.count():
        details.first.click()
    advice.first.wait_for()


def test_fifty_bars_cost_less_than_half_a_millisecond_a_frame(page, frontend, renderer):
    """While the canvas is panned and a node is dragged; one widget changes, so that our code does run.

    It takes 60 to 150 us, and a millisecond where the height of each bar is measured at each frame.
    """
    page.page.evaluate(
        """([type, file]) => {
          for (let i = 0; i < 50; i++) {
            const node = LiteGraph.createNode(type);
            node.pos = [(i % 10) * 460, Math.floor(i / 10) * 400];
            app.graph.add(node);
            node.widgets[0].value = file;
          }
          app.canvas.ds.scale = 0.25;
          app.canvas.ds.offset = [300, 300];
          app.graph.setDirtyCanvas(true, true);
        }""",
        [OLD_NODE, FULL_SIZE],
    )
    page.wait_for_bar("7 / 19 double")
    page.page.wait_for_function("() => document.querySelectorAll('.flux-nf4-content path').length >= 200")
    client = page.page.context.new_cdp_session(page.page)
    client.send("Profiler.enable")
    client.send("Profiler.setSamplingInterval", {"interval": 100})
    client.send("Profiler.startPreciseCoverage", {"callCount": True})  # samples may miss a short call, counts do not
    client.send("Profiler.start")
    frames = page.page.evaluate(
        """async () => {
          let frames = 0;
          const end = performance.now() + 60_000;
          while (frames < 30 && performance.now() < end) {
            await new Promise(requestAnimationFrame);
            app.canvas.ds.offset[0] += 2;
            app.graph._nodes[0].pos[0] += 1;
            if (!frames) app.graph._nodes[0].widgets[1].callback((app.graph._nodes[0].widgets[1].value = 3));
            app.graph.setDirtyCanvas(true, true);
            frames += 1;
          }
          return frames;
        }"""
    )
    profile = client.send("Profiler.stop")["profile"]
    scripts = client.send("Profiler.takePreciseCoverage")["result"]
    client.detach()
    address = "/extensions/ComfyUI-Flux-NF4/"
    functions = [function for script in scripts if address in script["url"] for function in script["functions"]]
    calls = sum(function["ranges"][0]["count"] for function in functions)
    ours = {n["id"] for n in profile["nodes"] if address in n["callFrame"]["url"]}
    # Times are by the clock: a sample that took longer is of a process that had to wait for a processor.
    samples = zip(profile["samples"], profile["timeDeltas"], strict=True)
    spent = sum(min(us, 500) for node, us in samples if node in ours)
    print(f"{frontend} {renderer}: {frames} frames, {calls} calls, {spent / frames:.1f} us of ours in each")
    assert frames > 10
    assert calls > 0
    assert spent / frames < 500 * slowness()


def test_the_info_button_opens_the_help_page(page):
    node = page.add_node(ckpt_name=FULL_SIZE)
    page.wait_for_bar("double")
    page.page.evaluate("(id) => app.canvas.selectNode(app.graph.getNodeById(id))", node)
    page.page.get_by_test_id("info-button").locator("visible=true").first.click()
    page.page.get_by_text("Each block is as wide as it weighs").wait_for()


def small_prompt(checkpoint, steps, **loader):
    """The example in its API form with a tiny picture of a prompt without padding, for quick steps."""
    prompt = json.loads((EXAMPLES / "api" / "flux_nf4_text_to_image.json").read_text("utf-8"))
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    inputs[LOADER] |= {"ckpt_name": checkpoint.name} | loader
    inputs["EmptySD3LatentImage"] |= {"width": 32, "height": 32}
    inputs["KSampler"] |= {"seed": random.getrandbits(30), "steps": steps}
    options = {"clip": inputs["CLIPTextEncode"]["clip"], "min_padding": 0, "min_length": 0}
    prompt["9"] = {"class_type": "T5TokenizerOptions", "inputs": options}
    inputs["CLIPTextEncode"] |= {"clip": ["9", 0], "text": "a lighthouse"}
    return prompt


def wait_until_idle(page):
    is_idle = page.page.evaluate(
        """async () => {
          for (const end = performance.now() + 120_000; performance.now() < end; ) {
            const { queue_running, queue_pending } = await (await fetch("/queue")).json();
            if (queue_running.length + queue_pending.length === 0) return true;
            await new Promise(requestAnimationFrame);
          }
          return false;
        }"""
    )
    assert is_idle


def test_a_prompt_is_queued_and_its_figures_appear(page, checkpoint):
    counts = {"double_blocks": 0, "single_blocks": 0}
    page.load_api(small_prompt(checkpoint, steps=3, **counts))  # the second forward is timed
    page.wait_for_bar("0 / 2 double")
    page.page.evaluate(
        """() => {
          window.progressed = new Set();
          app.api.addEventListener("progress", ({ detail }) => window.progressed.add(detail.value));
          app.queuePrompt(0);
        }"""
    )
    said = page.wait_for_bar(" GB/s Step ")
    assert "0 / 2 double 0 / 1 single" in said
    assert re.search(r"Step \d+(\.\d)? ms, of which \d+(\.\d)? ms waiting", said)
    assert re.search(r"Bus \d+\.\d GB/s", said)
    page.page.wait_for_function("() => window.progressed.size > 1")
    wait_until_idle(page)
    assert page.wait_for_bar(" GB/s Step ")


@pytest.mark.parametrize("renderer", ["canvas"], indirect=True)  # what says it is no part of a node
def test_a_toast_says_that_a_run_had_too_little_memory(page, checkpoint):
    counts = {"double_blocks": 2, "single_blocks": 1}
    prompt = small_prompt(checkpoint, steps=1, **counts)
    prompt["10"] = {"class_type": "TestOutOfMemoryTwice", "inputs": {"model": ["1", 0]}}
    prompt["6"]["inputs"]["model"] = ["10", 0]
    page.load_api(prompt)
    page.wait_for_bar("/ 2 double")
    page.page.evaluate("() => { app.queuePrompt(0) }")  # not awaited: a toast lives for ten seconds
    text = "The GPU has room for 0 of 3 blocks"
    page.beside_the_bar(text).first.wait_for()
    assert "0 / 2 double 0 / 1 single" in page.wait_for_bar(text)
    assert page.run_axe().response["violations"] == []
    wait_until_idle(page)
    history = json.loads(page.server.get("/history"))
    assert list(history.values())[-1]["status"]["status_str"] == "success"
