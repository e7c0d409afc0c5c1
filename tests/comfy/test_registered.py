"""Other packages with our nodes' names, and folders that ComfyUI does not serve: said, with what to do."""

import logging
import sys
import types

import pytest

from flux_nf4 import nodes
from flux_nf4.page import registered, routes

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"
PARTIAL = "MZ_Flux1PartialLoad_Patch"


class Server:
    """As much of ComfyUI's server as the routes need."""

    client_id = None

    def __init__(self):
        self.handlers, self.prompt_handlers = {}, []
        self.routes = types.SimpleNamespace(get=lambda path: lambda handler: self.handlers.update({path: handler}))

    def add_on_prompt_handler(self, handler):
        self.prompt_handlers.append(handler)

    def send_sync(self, *_):
        pass


@pytest.fixture
def all_nodes(monkeypatch):
    """ComfyUI's table of nodes, empty."""
    comfy_nodes = types.ModuleType("nodes")
    comfy_nodes.NODE_CLASS_MAPPINGS = {}
    monkeypatch.setitem(sys.modules, "nodes", comfy_nodes)
    monkeypatch.setattr(routes, "observers", [])
    monkeypatch.setattr(registered, "FOLDER", "flux-nf4")
    return comfy_nodes.NODE_CLASS_MAPPINGS


def node_of(folder):
    return type("Node", (), {"RELATIVE_PYTHON_MODULE": f"custom_nodes.{folder}"})


def test_a_package_that_was_loaded_before_is_named_with_ours(all_nodes, caplog):
    all_nodes |= {OLD_NODE: node_of("FluxExt"), PARTIAL: node_of("FluxExt"), "KSampler": node_of("comfy")}
    with caplog.at_level(logging.WARNING):
        routes.register(Server())
    (line,) = caplog.messages
    assert f"custom_nodes/FluxExt has registered {OLD_NODE}, {PARTIAL} already" in line
    assert "the nodes of custom_nodes/flux-nf4 take their place" in line


def test_alone_nothing_is_said(all_nodes, caplog):
    server = Server()
    with caplog.at_level(logging.WARNING):
        routes.register(server)
        all_nodes |= nodes.NODE_CLASS_MAPPINGS
        server.prompt_handlers[0]({})
    assert caplog.messages == []
    assert registered.replaced() == {}


def test_a_package_that_is_loaded_later_is_named_when_the_first_prompt_comes(all_nodes, caplog):
    server = Server()
    with caplog.at_level(logging.WARNING):
        routes.register(server)
        all_nodes |= nodes.NODE_CLASS_MAPPINGS | {OLD_NODE: node_of("fluxext-mz")}
        assert caplog.messages == []
        prompt = {"prompt": {}}
        assert server.prompt_handlers[0](prompt) is prompt
        server.prompt_handlers[0](prompt)
    (line,) = caplog.messages
    assert f"custom_nodes/fluxext-mz was loaded after custom_nodes/flux-nf4 and has registered {OLD_NODE}" in line
    assert "remove or disable custom_nodes/fluxext-mz and restart" in line


def test_the_page_learns_who_has_a_node_and_plans_nothing_for_it(all_nodes):
    all_nodes |= nodes.NODE_CLASS_MAPPINGS | {OLD_NODE: node_of("fluxext-mz")}
    taken = registered.replaced()
    theirs = routes._describe(OLD_NODE, nodes.NODE_CLASS_MAPPINGS[OLD_NODE], taken)
    assert theirs == {"aliases": [], "plan": None, "taken_by": "fluxext-mz"}
    ours = routes._describe(PARTIAL, nodes.NODE_CLASS_MAPPINGS[PARTIAL], taken)
    assert ours["plan"]
    assert ours["taken_by"] is None


@pytest.mark.parametrize("name", ["flux nf4", "flux%20nf4", "flux#1", "节点", "flux[1]"])
def test_a_folder_that_comfyui_does_not_serve_is_said(name, all_nodes, monkeypatch, caplog):
    monkeypatch.setattr(registered, "FOLDER", name)
    routes.register(Server())
    assert f"ComfyUI serves no files of a folder that is called '{name}'" in caplog.text
    assert "Rename the folder" in caplog.text


@pytest.mark.parametrize("name", ["ComfyUI-Flux-NF4", "flux_nf4.1", "flux(1)", "flux+nf4"])
def test_a_folder_that_comfyui_serves_is_not(name, all_nodes, monkeypatch, caplog):
    monkeypatch.setattr(registered, "FOLDER", name)
    routes.register(Server())
    assert "folder" not in caplog.text
