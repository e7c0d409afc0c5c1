"""Debian's Chromium before a ComfyUI server with the package dropped in, with the frontend of 0.3.75 and the newest.

Both end with the tests of this package: they need 2 GB of RAM.
"""

import json
import shutil
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlparse

import environment
import pytest
from axe_playwright_python.sync_playwright import Axe
from comfy_server import ComfyServer, drop_package, link_model
from make_checkpoint import cached_checkpoint
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from small_recipe import small_recipe
from sparse_checkpoint import make_sparse_checkpoint

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
FULL_SIZE = "flux1-dev-bnb-nf4-v2.safetensors"
KONTEXT = "flux1-kontext-dev-nf4.safetensors"
UNET_ONLY = "flux1-dev-nf4-unet.safetensors"
SECONDS = 120
"""How long the page may take for anything: on a slow machine that has other things to do, its first opening is long."""
PICTURES = environment.CACHE / "pictures" / "browser"


@pytest.fixture(scope="package")
def checkpoint():
    """A small checkpoint with blocks of each kind, which can be run."""
    return cached_checkpoint(environment.CACHE / "checkpoints", small_recipe(double_blocks=2))


@pytest.fixture(scope="package")
def models(tmp_path_factory, checkpoint):
    """Checkpoints of the real size for their headers, one that can be run, one that the node cannot load."""
    folder = tmp_path_factory.mktemp("models")
    make_sparse_checkpoint(folder / FULL_SIZE)
    make_sparse_checkpoint(folder / KONTEXT)
    make_sparse_checkpoint(folder / UNET_ONLY, is_all_in_one=False)
    return [folder / FULL_SIZE, folder / KONTEXT, folder / UNET_ONLY, checkpoint]


@pytest.fixture(scope="package")
def server(tmp_path_factory, comfyui, models):
    base = tmp_path_factory.mktemp("comfyui")
    drop_package(environment.ROOT, base)
    for nodes in (Path(__file__).parent / "streams_on_cpu.py", environment.ROOT / "tests/support/small_flux.py"):
        shutil.copy(nodes, base / "custom_nodes")
    for model in models:
        link_model(model, base, "checkpoints")
    (base / "input").mkdir()
    Image.new("RGB", (64, 64), "teal").save(base / "input" / "example.png")  # of the Kontext example
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        yield server


@pytest.fixture(scope="package")
def chromium():
    with sync_playwright() as playwright:
        # A page that `serve_from` answers for comes from no address, so Chromium would not let it reach 127.0.0.1.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-features=LocalNetworkAccessChecks"]
        browser = playwright.chromium.launch(executable_path=environment.browser(), args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package", params=["frontend-of-0.3.75", "newest-frontend"])
def frontend(request):
    return request.param


@pytest.fixture(scope="package")
def opened(server, chromium, frontend):
    """ComfyUI's page, opened once for all tests of a frontend."""
    page = Page(server, chromium.new_page(viewport={"width": 1400, "height": 900}))
    page.page.set_default_timeout(SECONDS * 1000)
    if frontend == "newest-frontend":
        serve_from(page.page, environment.new_frontend())
    page.open()
    yield page
    page.page.close()


def serve_from(page, folder):
    """Have ``page`` get a frontend's files from ``folder``, all else from the server: as ``--front-end-root`` does."""

    def file_of(url):
        return folder / (urlparse(url).path.lstrip("/") or "index.html")

    page.route(lambda url: file_of(url).is_file(), lambda route: route.fulfill(path=file_of(route.request.url)))


@pytest.fixture(scope="package", params=["canvas", "vue"])
def renderer(request):
    return request.param


@pytest.fixture
def page(opened, renderer, request):
    """The page with an empty graph and the usual settings. Nothing in our scripts may complain."""
    opened.reset(renderer)
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

    def open(self):
        address = f"http://127.0.0.1:{self.server.port}"
        for key, value in self.SETTINGS.items():
            self.page.request.post(
                f"{address}/api/settings/{key}",
                data=json.dumps(value),
                headers={"content-type": "application/json"},
            )
        self.page.goto(address)
        ready = "window.app?.graph && app.extensionManager && app.api.clientId && document.querySelector('canvas')"
        self.page.wait_for_function(f"() => {ready} && app.extensions.some(({{ name }}) => name === 'FluxNF4.Plan')")

    def reset(self, renderer):
        self.faults.clear()
        self.page.keyboard.press("Escape")
        self.page.evaluate(
            """() => {
              app.graph.clear();
              const { sidebarTab } = app.extensionManager;
              if (sidebarTab.activeSidebarTabId) sidebarTab.toggleSidebarTab(sidebarTab.activeSidebarTabId);
            }"""
        )
        self.set(**self.SETTINGS, **{"Comfy.VueNodes.Enabled": renderer == "vue"})
        self.page.wait_for_function("(isVue) => Boolean(LiteGraph.vueNodesMode) === isVue", arg=renderer == "vue")

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
        said = f"{message.text} {message.location}"
        is_no_file = "status of 404" in said and "/flux_nf4/plan" in said  # of an example: the bar says so
        if message.type in ("error", "warning") and "flux_nf4" in said and not is_no_file:
            self.faults.append(said)

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

    def draw(self):
        """Wait until all that is to be shown now has been drawn."""
        self.page.evaluate("async () => { for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame) }")

    def load_api(self, prompt):
        self.page.evaluate("(prompt) => app.loadApiJson(prompt, 'test')", prompt)

    def load(self, graph):
        self.page.evaluate("graph => app.loadGraphData(graph)", graph)

    @property
    def bar(self):
        return self.page.locator(".flux-nf4-content").first

    def beside_the_bar(self, text):
        """What says ``text`` in the page, but for the bar: a toast."""
        return self.page.get_by_text(text).and_(self.page.locator(":not(.flux-nf4-content *)"))

    def wait_for_bar(self, text, seconds=SECONDS):
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
