"""Debian's Chromium before a ComfyUI server with the package dropped in, with the frontend of 0.3.75 and the newest."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import environment
import pytest
from axe_playwright_python.sync_playwright import Axe
from comfy_server import ComfyServer, drop_package, link_model
from make_checkpoint import Recipe, cached_checkpoint
from playwright.sync_api import TimeoutError, sync_playwright
from sparse_checkpoint import make_sparse_checkpoint

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
FULL_SIZE = "flux1-dev-bnb-nf4-v2.safetensors"
UNET_ONLY = "flux1-dev-nf4-unet.safetensors"
PICTURES = environment.CACHE / "pictures" / "browser"


@pytest.fixture(scope="session")
def checkpoint():
    """A checkpoint with one block of each kind, which can be run."""
    return cached_checkpoint(environment.CACHE / "checkpoints", Recipe())


@pytest.fixture(scope="session")
def models(tmp_path_factory, checkpoint):
    """Checkpoints of the real size for their headers, one that can be run, one that the node cannot load."""
    folder = tmp_path_factory.mktemp("models")
    make_sparse_checkpoint(folder / FULL_SIZE)
    make_sparse_checkpoint(folder / UNET_ONLY, is_all_in_one=False)
    return [folder / FULL_SIZE, folder / UNET_ONLY, checkpoint]


@pytest.fixture(scope="session", params=["frontend-of-0.3.75", "newest-frontend"])
def server(request, tmp_path_factory, comfyui, models):
    base = tmp_path_factory.mktemp("comfyui")
    drop_package(environment.ROOT, base)
    shutil.copy(Path(__file__).parent / "streams_on_cpu.py", base / "custom_nodes" / "zz_streams_on_cpu.py")
    for model in models:
        link_model(model, base, "checkpoints")
    arguments = ["--cpu"]
    if request.param == "newest-frontend":
        arguments += ["--front-end-root", str(environment.new_frontend())]
    with ComfyServer(comfyui, base, tuple(arguments)) as server:
        server.frontend = request.param
        yield server


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=environment.browser(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["canvas", "vue"])
def renderer(request):
    return request.param


@pytest.fixture(scope="session")
def opened(server, chromium, renderer):
    """ComfyUI's page, opened once for all tests of a frontend and a renderer."""
    page = Page(server, chromium.new_page(viewport={"width": 1400, "height": 900}))
    page.open({"Comfy.VueNodes.Enabled": renderer == "vue"})
    yield page
    page.page.close()


@pytest.fixture
def page(opened, request):
    """The page with an empty graph and the usual settings. Nothing in our scripts may complain."""
    opened.reset()
    yield opened
    PICTURES.mkdir(parents=True, exist_ok=True)
    opened.page.screenshot(path=PICTURES / f"{request.node.name.replace('/', '-')}.png")
    assert not opened.faults


class Page:
    """ComfyUI's page. ``faults`` are errors and warnings that came from our scripts."""

    SETTINGS: ClassVar = {
        "Comfy.TutorialCompleted": True,
        "Comfy.ColorPalette": "dark",
        "Comfy.Minimap.Visible": False,
        "FluxNF4.Bar.Show": True,
        "FluxNF4.Budget.Default": 0,
    }

    def __init__(self, server, page):
        self.faults = []
        self.server, self.page = server, page
        page.on("pageerror", lambda error: "flux" in str(error.stack).lower() and self.faults.append(str(error)))
        page.on("console", self._hear)

    def open(self, settings):
        address = f"http://127.0.0.1:{self.server.port}"
        for key, value in (self.SETTINGS | settings).items():
            self.page.request.post(
                f"{address}/api/settings/{key}",
                data=json.dumps(value),
                headers={"content-type": "application/json"},
            )
        self.page.goto(address)
        ready = "window.app?.graph && app.extensionManager && document.querySelector('canvas')"
        self.page.wait_for_function(f"() => {ready} && app.extensions.some(({{ name }}) => name === 'FluxNF4.Plan')")

    def reset(self):
        self.faults.clear()
        self.page.keyboard.press("Escape")
        self.set(**self.SETTINGS)
        self.page.evaluate("() => app.graph.clear()")

    def set(self, **settings):
        self.page.evaluate(
            """async (settings) => {
              const { setting } = app.extensionManager;
              for (const [id, value] of Object.entries(settings)) {
                if (setting.get(id) !== value) await setting.set(id, value);
              }
            }""",
            settings,
        )

    def _hear(self, message):
        if message.type in ("error", "warning") and "flux_nf4" in f"{message.text} {message.location}":
            self.faults.append(message.text)

    def add_node(self, node=OLD_NODE, **widgets):
        """Add a node to the middle of the page, as a script; returns its id."""
        return self.page.evaluate(
            """([type, widgets]) => {
              const node = LiteGraph.createNode(type);
              node.pos = [120, 140];
              app.graph.add(node);
              for (const widget of node.widgets) if (widget.name in widgets) widget.value = widgets[widget.name];
              app.canvas.ds.scale = 1;
              app.canvas.ds.offset = [100, 40];
              node.setSize([420, node.size[1]]);
              app.graph.setDirtyCanvas(true, true);
              return node.id;
            }""",
            [node, widgets],
        )

    def load(self, graph):
        self.page.evaluate("graph => app.loadGraphData(graph)", graph)

    @property
    def bar(self):
        return self.page.locator(".flux-nf4-content").first

    def wait_for_bar(self, text, seconds=30):
        """Wait until the bar says ``text``; returns all that it says, on one line."""
        says = "document.querySelector('.flux-nf4-content')?.innerText.replace(/\\s+/g, ' ')"
        found = f"(text) => {{ const said = {says}; return said?.includes(text) && said; }}"
        try:
            return self.page.wait_for_function(found, arg=text, timeout=1000 * seconds).json_value()
        except TimeoutError:
            raise AssertionError(f"the bar says {self.page.evaluate(f'() => {says}')!r}, not {text!r}") from None

    def widget(self, name, node):
        find = "([id, name]) => app.graph.getNodeById(id).widgets.find((widget) => widget.name === name).value"
        return self.page.evaluate(find, [node, name])

    def run_axe(self):
        return Axe().run(self.page, context=".flux-nf4-plan")
