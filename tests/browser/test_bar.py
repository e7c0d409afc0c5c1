"""The plan bar, in both renderers of two frontends."""

import json

import environment
import pytest

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
FULL_SIZE = "flux1-dev-bnb-nf4-v2.safetensors"
UNET_ONLY = "flux1-dev-nf4-unet.safetensors"
OLD_GRAPH = json.loads((environment.ROOT / "tests/support/old_graph.json").read_text("utf-8"))


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_plan_is_shown_before_anything_is_loaded(theme, page):
    page.set(**{"Comfy.ColorPalette": theme})
    page.add_node(ckpt_name=FULL_SIZE)
    said = page.wait_for_bar("Bus, each step 3.51 GB")
    assert "7 / 19 double 7 / 38 single in VRAM" in said
    assert "VRAM 1.60 GiB RAM 6.21 GiB RAM in total 11.06 GiB Bus, each step 3.51 GB" in said
    picture = page.bar.get_by_role("img")
    assert picture.get_attribute("aria-label") == (
        "7 of 19 double blocks in VRAM, 12 streamed; 7 of 38 single blocks in VRAM, 31 streamed"
    )
    assert page.run_axe().response["violations"] == []
    page.bar.focus()
    assert page.bar.evaluate("(bar) => document.activeElement === bar"), "the keyboard reaches it"


def test_the_bar_follows_a_widget_that_is_changed_with_the_mouse(page, renderer):
    node = page.add_node(ckpt_name=FULL_SIZE)
    before = page.wait_for_bar("7 / 19 double")
    if renderer == "vue":
        increment(page, "double_blocks_cuda_size")
    else:
        drag_on_canvas(page, node, "double_blocks_cuda_size", by=60)
    changed = page.widget("double_blocks_cuda_size", node)
    assert changed > 7
    after = page.wait_for_bar(f"{changed} / 19 double")
    assert after != before


def increment(page, name):
    widget = page.page.locator(f".lg-node-widget:has-text('{name}')")
    widget.locator(".p-inputnumber-increment-button, [data-testid='increment']").click()


def drag_on_canvas(page, node, name, by):
    """Press on the widget and move to the right, as one does to change a number."""
    x, y = page.page.evaluate(
        """([id, name]) => {
          const node = app.graph.getNodeById(id);
          const widget = node.widgets.find((widget) => widget.name === name);
          const { scale, offset } = app.canvas.ds;
          const canvas = app.canvas.canvas.getBoundingClientRect();
          const at = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
          return [canvas.x + (at[0] + offset[0]) * scale, canvas.y + (at[1] + offset[1]) * scale];
        }""",
        [node, name],
    )
    mouse = page.page.mouse
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + by, y, steps=12)
    mouse.up()


def test_a_file_that_the_node_cannot_load_is_named_with_the_right_loader(page):
    page.add_node(ckpt_name=UNET_ONLY)
    said = page.wait_for_bar(UNET_ONLY)
    assert "it has the Flux transformer but no CLIP-L, no T5-XXL, no VAE" in said
    assert "UNet" in said
    assert page.bar.get_by_role("img").count() == 0
    assert page.run_axe().response["violations"] == []
    bottom = page.page.evaluate("() => app.graph._nodes[0].size[1]")
    assert bottom > page.bar.evaluate("(bar) => bar.offsetHeight"), "the node grew with its text"


def test_an_old_graph_opens_without_a_warning_and_is_queued_as_it_was(page):
    page.load(OLD_GRAPH)
    page.wait_for_bar("7 / 19 double")
    assert page.page.get_by_role("dialog").count() == 0
    saved = page.page.evaluate("() => app.graph.serialize().nodes.find((node) => node.id === 1).widgets_values")
    assert saved == [FULL_SIZE, 7, 7]
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert prompt["1"]["inputs"] == {
        "ckpt_name": FULL_SIZE,
        "double_blocks_cuda_size": 7,
        "single_blocks_cuda_size": 7,
    }


def test_the_bar_can_be_switched_off_and_on(page):
    page.set(**{"FluxNF4.Bar.Show": False})
    page.add_node(ckpt_name=FULL_SIZE)
    page.bar.wait_for(state="attached")
    page.draw()
    assert not page.bar.is_visible()
    page.set(**{"FluxNF4.Bar.Show": True})
    page.wait_for_bar("7 / 19 double")
    page.bar.wait_for(state="visible")
    page.set(**{"FluxNF4.Bar.Show": False})
    page.bar.wait_for(state="hidden")


def test_a_new_node_begins_with_the_budget_of_the_settings(page):
    page.set(**{"FluxNF4.Budget.Default": 4})
    node = page.add_node("FluxNF4CheckpointLoaderStreamed", ckpt_name=FULL_SIZE)
    assert page.widget("vram_budget_gb", node) == 4
    said = page.wait_for_bar("/ 19 double")
    assert 3.5 < float(said.split("VRAM ")[2].split()[0]) <= 4


def test_an_automatic_budget_says_the_range_and_guesses_nothing(page):
    page.add_node("FluxNF4CheckpointLoaderStreamed", ckpt_name=FULL_SIZE)
    said = page.wait_for_bar("Automatic: ComfyUI's free VRAM decides")
    assert "19 double 38 single blocks" in said
    assert "GiB to 6.24 GiB" in said
    assert "Bus, each step" not in said


def test_a_node_without_a_file_shows_no_report_of_another_graph(page):
    push(page, report(page.add_node(ckpt_name=FULL_SIZE)))
    page.page.evaluate("() => app.graph.clear()")
    page.add_node("StreamModelBlocks")
    page.wait_for_bar("shown here once it has run")


def test_undo_is_followed_too(page):
    node = page.add_node(ckpt_name=FULL_SIZE)
    page.wait_for_bar("7 / 19 double")
    page.page.evaluate("(id) => { app.graph.getNodeById(id).widgets[1].value = 3 }", node)  # calls nobody back
    page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    page.wait_for_bar("3 / 19 double")


def report(node, **changes):
    """What the server pushes while a node's model runs, where all blocks of `FULL_SIZE` were to stay."""
    kinds = ["double"] * 19 + ["single"] * 38
    everything = list(range(len(kinds)))
    cost = {
        "copied_bytes": 0,
        "pinned_bytes": 0,
        "refetched": 0,
        "total_ms": 176.4,
        "stall_ms": 2.4,
        "picture": [1024, 768],
    }
    return {
        "node_id": str(node),
        "kinds": kinds,
        "wanted": everything,
        "resident": everything,
        "streamed": [],
        "device_bytes": 6 << 30,
        "host_bytes": 6 << 30,
        "pinned_bytes": 6 << 30,
        "link_gbps": 54.5,
        "cost": cost,
        "is_lowered": False,
    } | changes


def push(page, report):
    event = "(detail) => app.api.dispatchEvent(new CustomEvent('flux_nf4.report', { detail }))"
    page.page.evaluate(event, report)


def test_what_a_run_has_shown_takes_the_place_of_the_plan_until_a_widget_changes(page):
    node = page.add_node(ckpt_name=FULL_SIZE)
    push(page, {"node_id": str(node)})  # the page stays, and knows what an earlier test's node of this number has shown
    page.wait_for_bar("7 / 19 double")
    stays = [index for index in range(57) if index % 4 == 1]
    streamed = [index for index in range(57) if index % 4 != 1]
    wanted = page.page.evaluate(
        """async (file) => {
          const query = new URLSearchParams({ folder: "checkpoints", file, double: 7, single: 7 });
          const answer = await (await app.api.fetchApi(`/flux_nf4/plan?${query}`)).json();
          return answer.blocks.flatMap(({ is_resident }, index) => (is_resident ? [index] : []));
        }""",
        FULL_SIZE,
    )
    push(page, report(node, wanted=wanted, resident=stays, streamed=streamed, pinned_bytes=3 << 30))
    said = page.wait_for_bar("176 ms, of which 2.4 ms waiting (1024x768)")
    assert "5 / 19 double 9 / 38 single" in said
    assert "VRAM 6.00 GiB RAM 6.00 GiB, 50 % pinned RAM in total 11.06 GiB" in said
    assert "Bus 54.5 GB/s" in said
    page.page.evaluate("(id) => { const w = app.graph.getNodeById(id).widgets[1]; w.value = 3; w.callback(3) }", node)
    said = page.wait_for_bar("3 / 19 double")
    assert "176 ms, of which 2.4 ms" not in said


def test_it_asks_for_what_was_measured_at_the_size_of_the_graphs_pictures(page):
    """Where the graph has one: with two, or none, it asks for no size."""
    asked = []
    page.page.on("request", lambda request: asked.append(request.url) if "/flux_nf4/plan?" in request.url else None)
    page.add_node(ckpt_name=FULL_SIZE)
    page.wait_for_bar("RAM in total 11.06 GiB")
    wait_until(lambda: asked, page)
    assert "width" not in asked[-1]
    page.add_node("EmptySD3LatentImage", width=1152, height=896)
    page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    wait_until(lambda: "width=1152&height=896" in asked[-1], page)
    page.add_node("EmptyLatentImage", width=512, height=512)
    page.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    wait_until(lambda: "width" not in asked[-1], page)


def wait_until(holds, page):
    for _ in range(1200):
        if holds():
            return
        page.page.wait_for_timeout(100)
    raise AssertionError("it did not come to hold in two minutes")


def test_after_a_run_the_bar_of_an_automatic_node_says_what_to_do_next(page):
    node = page.add_node("FluxNF4CheckpointLoaderStreamed", ckpt_name=FULL_SIZE)
    push(page, {"node_id": str(node)})
    page.wait_for_bar("Automatic: ComfyUI's free VRAM decides")
    stays = list(range(0, 57, 2))
    run = report(node, resident=stays, wanted=stays, streamed=list(range(1, 57, 2)))
    push(page, run | {"advice": {"code": "more_vram", "figures": {"gbps": 12.3, "percent": 31.4}, "kept": {}}})
    said = page.wait_for_bar("The bus is the limit (12 GB/s)")
    assert "waiting for it takes 31 % of a step: let more blocks stay" in said
    assert "Automatic" not in said
    push(page, run | {"advice": {"code": "keeps_up", "figures": {"gbps": 54.5, "percent": 1.0}, "kept": {}}})
    page.wait_for_bar("The bus keeps up (55 GB/s)")
    assert page.run_axe().response["violations"] == []
    push(page, {"node_id": str(node)})  # the page stays, and must not know it in the next test


def test_a_toast_says_when_less_stays_than_was_asked_for(page):
    node = page.add_node(ckpt_name=FULL_SIZE, double_blocks_cuda_size=16, single_blocks_cuda_size=37)
    page.wait_for_bar("16 / 19 double")
    wanted = [index for index in range(57) if index not in (0, 1, 2, 56)]
    lowered = report(node, wanted=wanted, resident=[3, 4], streamed=[0], is_lowered=True)
    push(page, lowered)
    toasts = page.beside_the_bar("The GPU has room for 2 of 53 blocks")
    toasts.first.wait_for()
    page.draw()
    before = toasts.count()
    push(page, lowered)
    page.draw()
    assert toasts.count() <= before, "once, not at every forward"


@pytest.mark.parametrize(("width", "columns"), [(200, 1), (400, 2), (900, 2)])
def test_no_figure_is_broken_whatever_the_width_of_the_node(width, columns, page):
    lines, found = page.page.evaluate(
        """async ([file, width]) => {
          const { PlanBar } = await import("/extensions/ComfyUI-Flux-NF4/plan_bar.js");
          const query = new URLSearchParams({ folder: "checkpoints", file, double: 7, single: 7 });
          const answer = await (await app.api.fetchApi(`/flux_nf4/plan?${query}`)).json();
          const bar = new PlanBar("en");
          bar.element.style.cssText = `position: fixed; width: ${width}px`;
          document.body.append(bar.element);
          bar.show({ ...answer, run: null }, false, String(query));
          const boxes = [...bar.element.querySelectorAll("dl > div")].map((row) => row.getBoundingClientRect().x);
          const lines = [...bar.element.querySelectorAll("dd")].map((value) => {
            const range = document.createRange();
            range.selectNodeContents(value);
            return range.getClientRects().length;
          });
          bar.element.remove();
          return [lines, new Set(boxes).size];
        }""",
        [FULL_SIZE, width],
    )
    assert lines == [1] * len(lines)
    assert len(lines) == 4
    assert found == columns


def test_the_bar_speaks_chinese(page):
    said, after_a_run, pinned, slow = page.page.evaluate(
        """async (file) => {
          const { PlanBar } = await import("/extensions/ComfyUI-Flux-NF4/plan_bar.js");
          const { viewOf } = await import("/extensions/ComfyUI-Flux-NF4/plan_view.js");
          const query = new URLSearchParams({ folder: "checkpoints", file, double: 7, single: 7 });
          const answer = await (await app.api.fetchApi(`/flux_nf4/plan?${query}`)).json();
          const bar = new PlanBar("zh-TW");
          bar.show(viewOf({ ...answer, advice: { code: "all_resident", figures: {} } }, null), false, query);
          const said = [bar.element.textContent];
          for (const code of ["more_vram", "not_pinned", "slow_link"]) {
            const advice = { code, figures: { gbps: 8, percent: 31 } };
            bar.show({ ...answer, advice: null, run: { advice } }, false, query);
            said.push(bar.element.querySelector("[role=status]").textContent);
          }
          return said;
        }""",
        FULL_SIZE,
    )
    assert "内存总计11.06 GiB" in said
    assert after_a_run.startswith("瓶颈是总线（8 GB/s），等待占每步的 31 %：请让更多块常驻")
    assert "等待占每步的 31 %" in pinned
    assert "总线较慢（8.0 GB/s），等待占每步的 31 %" in slow
    assert "每步传输3.51 GB" in said
    assert "所有块都常驻显存" in said
