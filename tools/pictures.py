"""Draws every picture of this package: the icon, the banner, the examples' thumbnails and the README's.

    python3 tools/pictures.py

The page's pictures are taken of the real page in Debian's Chromium, before a real ComfyUI server on the CPU. The
checkpoint is a header of the real size over a hole, so the plan in them is real; no speed is shown.
"""

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import environment
import orderly

_ROOT = environment.ROOT
_IMAGES = _ROOT / "images"
_EXAMPLES = _ROOT / "example_workflows"
_CHECKPOINT = "flux1-dev-bnb-nf4-v2.safetensors"
_TRANSFORMER = "flux1-dev-nf4.safetensors"
_LISTED = (
    "diffusion_models/flux1-dev.safetensors",
    "diffusion_models/flux1-dev-fp8.safetensors",
    "diffusion_models/flux1-dev-int8-convrot.safetensors",
    "text_encoders/clip_l.safetensors",
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors",
    "vae/ae.safetensors",
    "vae/flux2-vae.safetensors",
    "loras/my_flux_lora.safetensors",
)
"""What the examples name beside our checkpoints: empty here, since the page only wants to see them listed."""
_DEV, _KLEIN = "FLUX.2-dev-bnb-4bit", "FLUX.2-klein-4B-bnb-4bit"
_NODE = "FluxNF4CheckpointLoaderStreamed"
_READY = "() => window.app?.graph && app.extensions?.some(({ name }) => name === 'FluxNF4.Plan')"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    environment.enter(None)
    from comfy_server import ComfyServer, drop_package, link_model
    from PIL import Image
    from playwright.sync_api import sync_playwright
    from sparse_checkpoint import make_sparse_checkpoint, make_sparse_shards

    _IMAGES.mkdir(exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="flux-nf4-"))
    try:
        drop_package(_ROOT, base)
        for name in (_CHECKPOINT, "flux1-kontext-dev-nf4.safetensors"):
            make_sparse_checkpoint(base / name)
            link_model(base / name, base, "checkpoints")
        make_sparse_checkpoint(base / _TRANSFORMER, is_all_in_one=False)
        link_model(base / _TRANSFORMER, base, "diffusion_models")
        for file, shapes in _flux2_files().items():
            (base / "models" / file).parent.mkdir(parents=True)
            make_sparse_shards(base / "models" / file, shapes)
        for file in _LISTED:
            (base / "models" / file).parent.mkdir(parents=True, exist_ok=True)
            (base / "models" / file).touch()
        (base / "input").mkdir()
        Image.new("RGB", (64, 48), "slategray").save(base / "input" / "example.png")
        with sync_playwright() as playwright:
            arguments = ["--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=environment.browser(), args=arguments)
            _draw_icon_and_banner(browser)
            frontend = ("--front-end-root", str(environment.new_frontend()))
            with ComfyServer(environment.CACHE / "comfyui-0.3.75", base, ("--cpu", *frontend)) as server:
                address = f"http://127.0.0.1:{server.port}"
                _take_thumbnails(browser, address)
                for language, suffix in (("en", ""), ("zh", ".zh")):
                    _take_node(browser, address, language, _IMAGES / f"node{suffix}.png")
            browser.close()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _flux2_files() -> dict[str, Any]:
    """Shapes of the tensors in each file of models that the examples of FLUX.2 name."""
    import checkpoint_layout as layout

    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    return {
        f"diffusion_models/{_DEV}/transformer/{shard}": layout.flux2_of_diffusers(6144, 15360, 8, 48, guidance=True),
        f"diffusion_models/{_KLEIN}/transformer/diffusion_pytorch_model.safetensors": layout.flux2_of_diffusers(
            3072, 7680, 5, 20, guidance=False
        ),
        f"text_encoders/{_DEV}/text_encoder/model-00001-of-00003.safetensors": layout.language_model(
            "language_model.model.", 40, 5120, 32, 32768, 131072
        ),
        f"text_encoders/{_KLEIN}/text_encoder/model.safetensors": layout.language_model(
            "model.", 36, 2560, 32, 9728, 151936, norms_of_heads=True
        ),
    }


def _draw_icon_and_banner(browser: Any) -> None:
    for name, width, height, title in (("icon", 400, 400, False), ("banner", 1260, 540, True)):
        svg = _logo(width, height, title)
        (_IMAGES / f"{name}.svg").write_text(svg, "utf-8")
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_content(f"<body style='margin:0'>{svg}</body>")
        page.screenshot(path=_IMAGES / f"{name}.png")
        page.close()


def _logo(width: int, height: int, title: bool) -> str:
    """Blocks as in the plan bar: high ones stay, low ones are streamed."""
    stays = (False, True, False, False, True, False, False, True, False)
    left, top = (width - 320) / 2, height / 2 - (120 if title else 100)
    shapes = []
    for i, resident in enumerate(stays):
        y, h = (top, 200) if resident else (top + 100, 100)
        colour = "#5b9bf0" if i < 5 else "#3fb59b"
        fill = colour if resident else "none"
        shapes.append(
            f'<rect x="{left + 36 * i:.0f}" y="{y:.0f}" width="28" height="{h}" rx="5" '
            f'fill="{fill}" stroke="{colour}" stroke-width="5"/>'
        )
    words = (
        f'<text x="{width / 2}" y="{top + 275:.0f}" text-anchor="middle" font-family="Liberation Sans, sans-serif" '
        f'font-size="44" font-weight="bold" fill="#e8e8e8">Flux NF4, streamed</text>'
        if title
        else ""
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<rect width="{width}" height="{height}" fill="#1c1d20"/>{"".join(shapes)}{words}</svg>\n'
    )


def _open(browser: Any, address: str, language: str, **options: Any) -> Any:
    page = browser.new_page(**options)
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": True,
        "Comfy.Locale": language,
        "Comfy.Minimap.Visible": False,
        "Comfy.Graph.CanvasInfo": False,
    }
    for key, value in settings.items():
        headers = {"content-type": "application/json"}
        page.request.post(f"{address}/api/settings/{key}", data=json.dumps(value), headers=headers)
    page.goto(address)
    page.wait_for_function(_READY)
    return page


def _take_thumbnails(browser: Any, address: str) -> None:
    from PIL import Image

    page = _open(browser, address, "en", viewport={"width": 1600, "height": 900})
    for graph in sorted(_EXAMPLES.glob("*.json")):
        page.evaluate("(graph) => app.loadGraphData(graph)", json.loads(graph.read_text("utf-8")))
        page.keyboard.press("Escape")  # what is said of files that this machine does not have
        page.wait_for_timeout(1500)
        shown = page.evaluate(
            """() => {
              const boxes = app.graph._nodes.map((node) => [...node.pos, ...node.size]);
              const left = Math.min(...boxes.map(([x]) => x)) - 30;
              const top = Math.min(...boxes.map(([, y]) => y)) - 60;
              const right = Math.max(...boxes.map(([x, , width]) => x + width)) + 30;
              const bottom = Math.max(...boxes.map(([, y, , height]) => y + height)) + 30;
              const scale = 1400 / Math.max(right - left, (bottom - top) * 2);
              app.canvas.ds.scale = scale;
              app.canvas.ds.offset = [100 / scale - left, 100 / scale - top];
              app.graph.setDirtyCanvas(true, true);
              return { x: 100, y: 100, width: (right - left) * scale, height: (bottom - top) * scale };
            }"""
        )
        page.wait_for_timeout(1000)
        picture = Image.open(io.BytesIO(page.screenshot(clip=shown))).convert("RGB")
        picture.thumbnail((800, 800))
        picture.save(graph.with_suffix(".jpg"), quality=85)
    page.close()


def _take_node(browser: Any, address: str, language: str, path: Path) -> None:
    page = _open(browser, address, language, viewport={"width": 900, "height": 700}, device_scale_factor=2)
    page.evaluate(
        """([type, file]) => {
          app.graph.clear();
          const node = LiteGraph.createNode(type);
          node.pos = [0, 0];
          app.graph.add(node);
          node.widgets[0].value = file;
          node.widgets[1].value = 4;
          node.setSize([460, node.size[1]]);
          app.canvas.ds.scale = 1.2;
          app.canvas.ds.offset = [120, 120];
          app.graph.setDirtyCanvas(true, true);
        }""",
        [_NODE, _CHECKPOINT],
    )
    page.locator(".flux-nf4-content path").first.wait_for()
    page.wait_for_timeout(1000)
    page.locator("[data-node-id]").first.screenshot(path=path)
    page.close()


if __name__ == "__main__":
    orderly.run(main)
