"""The drop-in node in the real server."""

import json

OLD_NODE = "MZ_Flux1CheckpointLoaderNF4_cpuDynOffload"


def test_the_node_has_the_contract_of_the_original(server):
    info = json.loads(server.get(f"/object_info/{OLD_NODE}"))[OLD_NODE]
    required = info["input"]["required"]
    assert list(required) == ["ckpt_name", "double_blocks_cuda_size", "single_blocks_cuda_size"]
    assert not info["input"].get("optional")
    double, single = required["double_blocks_cuda_size"], required["single_blocks_cuda_size"]
    assert (double[0], double[1]["default"], double[1]["min"], double[1]["max"]) == ("INT", 7, 0, 16)
    assert (single[0], single[1]["default"], single[1]["min"], single[1]["max"]) == ("INT", 7, 0, 37)
    assert info["output"] == ["MODEL", "CLIP", "VAE"]
    assert info["display_name"] == "Load Flux NF4 Checkpoint (old)"
    assert info["description"]
    assert all(options[1]["tooltip"] for options in required.values())
    assert len(info["output_tooltips"]) == 3


def test_only_the_nodes_for_old_graphs_are_deprecated(server):
    """ComfyUI leaves these out of its menu and its search."""
    nodes = json.loads(server.get("/object_info"))
    ours = {name: nodes[name] for name in json.loads(server.get("/flux_nf4/nodes"))}
    deprecated = {name for name, info in ours.items() if info.get("deprecated")}
    assert deprecated == {name for name in ours if name.startswith("MZ_")}
    assert len(deprecated) == 4
    assert all(info["display_name"].endswith("(old)") == (name in deprecated) for name, info in ours.items())


def test_every_file_of_the_checkpoints_folder_is_listed(server, checkpoint):
    info = json.loads(server.get(f"/object_info/{OLD_NODE}"))[OLD_NODE]
    assert checkpoint.name in info["input"]["required"]["ckpt_name"][0]


def test_a_second_run_and_other_block_counts_give_the_same_picture(workflow, picture):
    first = picture(workflow(seed=5))
    assert picture(workflow(seed=6)) != first
    assert picture(workflow(seed=5)) == first
    for double, single in ((0, 0), (16, 37), (1, 0)):
        again = workflow(seed=5, double_blocks_cuda_size=double, single_blocks_cuda_size=single)
        assert picture(again) == first


def test_block_counts_above_the_depth_are_clamped_and_logged(server, workflow, picture):
    picture(workflow(double_blocks_cuda_size=16, single_blocks_cuda_size=37))
    log = server.log.read_text("utf-8")
    assert "16 double blocks requested, the model has 1" in log
    assert "37 single blocks requested, the model has 1" in log


def test_an_interrupted_prompt_leaves_the_next_picture_right(server, workflow, picture):
    expected = picture(workflow(seed=7))

    def interrupt(message):
        if message["type"] == "progress" and message["data"]["node"] == "6":
            server.post("/interrupt", {})

    history = server.run(workflow(seed=8, steps=10_000), interrupt)
    kinds = [kind for kind, _ in history["status"]["messages"]]
    assert "execution_interrupted" in kinds
    server.free(models=False)  # forgets cached outputs
    assert picture(workflow(seed=7)) == expected
