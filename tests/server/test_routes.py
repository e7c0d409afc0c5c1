"""The routes that the page asks, in the real server."""

import http.client
import json
import os
from pathlib import Path
from urllib.parse import quote

import pytest
from comfy_server import link_model
from paces import slowness
from sparse_checkpoint import make_sparse_checkpoint

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"


def ask(server, method, path, body=None):
    """Status and body of a request that is sent as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def plan(server, **query):
    return json.loads(server.get("/flux_nf4/plan", **{"folder": "checkpoints", "double": "7", "single": "7"} | query))


@pytest.fixture(scope="module")
def full_size(server, tmp_path_factory):
    """A full-size checkpoint, its weights a hole, in the server's folder."""
    path = tmp_path_factory.mktemp("full") / "flux1-full-size.safetensors"
    make_sparse_checkpoint(path)
    link_model(path, server.base, "checkpoints")
    return path.name


def test_the_plan_of_a_file_that_nobody_has_loaded(server, full_size):
    answer = plan(server, file=full_size)
    assert [block["kind"] for block in answer["blocks"]] == ["double"] * 19 + ["single"] * 38
    assert sum(block["is_resident"] for block in answer["blocks"]) == 14
    ahead = answer["host_bytes"] - sum(block["nbytes"] for block in answer["blocks"])
    assert 0.27 < ahead / answer["host_bytes"] < 0.28  # the modulation
    streamed = [block["nbytes"] for block in answer["blocks"] if not block["is_resident"]]
    assert answer["bytes_per_forward"] == pytest.approx(sum(streamed), rel=1e-3)  # but for biases and norms
    assert answer["advice"]["code"] == "not_measured"
    assert answer["compute_ms"] is None


def test_a_budget_and_no_word_at_all(server, full_size):
    answer = plan(server, file=full_size, double="-1", single="-1", budget="3")
    assert answer["device_bytes"] <= 3 * 2**30
    automatic = plan(server, file=full_size, double="-1", single="-1", budget="0")
    assert automatic["advice"]["code"] == "automatic"
    assert {block["is_resident"] for block in automatic["blocks"]} == {None}
    least = plan(server, file=full_size, double="-1", single="-1", budget="0.01")
    assert least["advice"]["code"] == "budget_too_small"
    assert least["advice"]["figures"]["gib"] == pytest.approx(least["least_device_bytes"] / 2**30)


def test_a_file_that_was_replaced_is_read_again(server, tmp_path):
    path = tmp_path / "flux1-replaced.safetensors"
    make_sparse_checkpoint(path, single_blocks=10)
    link_model(path, server.base, "checkpoints")
    assert len(plan(server, file=path.name)["blocks"]) == 29
    make_sparse_checkpoint(path, single_blocks=11)
    assert len(plan(server, file=path.name)["blocks"]) == 30
    path.write_bytes(b"GGUF" + bytes(100))
    assert "this is a GGUF file" in plan(server, file=path.name)["problem"]


@pytest.mark.parametrize(
    "name",
    ["../flux.safetensors", "../../../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "a\0b", "x" * 7000, "."],
)
def test_only_files_that_the_node_lists_are_looked_at(name, server):
    status, body = ask(server, "GET", f"/flux_nf4/plan?folder=checkpoints&file={quote(name)}")
    assert status == 404
    assert json.loads(body)["problem"].endswith("pick another.")


@pytest.mark.parametrize(
    "query",
    [
        "",
        "folder=checkpoints",
        "folder=custom_nodes&file=a",
        "folder=&file=a",
        "folder=..&file=a",
        "folder=checkpoints&file=a&double=many",
        "folder=checkpoints&file=a&double=-2",
        "folder=checkpoints&file=a&single=1000000000000",
        "folder=checkpoints&file=a&budget=nan",
        "folder=checkpoints&file=a&budget=inf",
        "folder=checkpoints&file=a&budget=-1",
    ],
)
def test_questions_that_make_no_sense_are_refused(query, server):
    status, body = ask(server, "GET", f"/flux_nf4/plan?{query}")
    assert status == 400
    assert json.loads(body)["problem"]


@pytest.mark.parametrize("route", ["plan", "nodes", "reports"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_are_refused(method, route, server):
    assert ask(server, method, f"/flux_nf4/{route}")[0] == 405


def test_a_body_is_refused_unread(server, full_size):
    query = f"/flux_nf4/plan?folder=checkpoints&file={full_size}"
    assert ask(server, "GET", query, bytes(64 << 20))[0] == 413
    assert ask(server, "GET", query)[0] == 200


def test_the_page_learns_our_nodes_and_the_words_that_find_them(server):
    nodes = json.loads(server.get("/flux_nf4/nodes"))
    ours = {
        name for name, info in json.loads(server.get("/object_info")).items() if "NF4" in (info["display_name"] or "")
    }
    assert ours <= nodes.keys()
    assert "low vram" in nodes[OLD_NODE]["aliases"]
    for name, node in nodes.items():
        inputs = json.loads(server.get(f"/object_info/{name}"))[name]["input"]
        plan = node["plan"] or {"file": None, "counts": {}, "budget": None}
        named = {plan["file"], plan["budget"], *plan["counts"].values()} - {None}
        assert named <= inputs["required"].keys() | inputs.get("optional", {}).keys()


def test_translations_and_help_are_where_the_page_looks(server):
    languages = json.loads(server.get("/i18n"))
    assert "流式传输" in languages["zh"]["nodeDefs"]["FluxNF4CheckpointLoaderStreamed"]["display_name"]
    assert "streamed" in languages["en"]["nodeDefs"]["FluxNF4CheckpointLoaderStreamed"]["display_name"]
    for language in ("en", "zh"):
        assert "FluxNF4_Bar_Show" in languages[language]["settings"]
        assert "Memory plan" in languages[language]["settingsCategories"]
    assert "显存" in server.get(f"/extensions/ComfyUI-Flux-NF4/docs/{OLD_NODE}/zh.md").decode()


def test_a_thousand_questions_cost_the_server_little(server, full_size):
    """It answers from what it has read of the file, in a millisecond. An answer that is made from the header each time
    takes 12 to 60 ms of the processors that a running prompt computes with."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    plan(server, file=full_size)  # reads the header
    before = cpu_seconds(server.pid)
    for question in range(1000):  # each another, as while a budget is dragged
        connection.request("GET", f"/flux_nf4/plan?folder=checkpoints&file={full_size}&budget={1 + question / 300}")
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()
    assert cpu_seconds(server.pid) - before < 4 * slowness()


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
