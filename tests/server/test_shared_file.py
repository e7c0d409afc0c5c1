"""Two servers on one machine that use the same file: the system has its weights in RAM once."""

import sys
from pathlib import Path

import pytest
from comfy_server import ComfyServer

from flux_nf4.nf4_loader.checkpoint.catalogue import read_catalogue

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what processes share")


def memory_of(server, path):
    """Bytes that a server has in RAM of a mapped file, and its share of them: a page that n processes have is 1/n."""
    found, is_of_file = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{server.pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            is_of_file = line.endswith(str(path))
        elif is_of_file and name[:-1] in found:
            found[name[:-1]] += 1024 * int(rest[0])
    return found["Rss"], found["Pss"]


def set_free_ram(server, nbytes):
    server.run({"1": {"class_type": "TestSetFreeRam", "inputs": {"nbytes": nbytes}}})


def test_two_servers_have_the_weights_of_a_file_in_ram_once(server, comfyui, checkpoint, workflow, dropped, tmp_path):
    catalogue = read_catalogue(checkpoint)
    others = [entry for part in (catalogue.text_encoders, catalogue.vae) for entry in part.values()]
    too_little = catalogue.transformer_ram + sum(entry.nbytes for entry in others) - 1
    packed = sum(part.nbytes for part in catalogue.parts)
    server.free()
    with ComfyServer(comfyui, dropped(tmp_path), ("--cpu",)) as second:
        pictures = []
        for each in (server, second):
            # There is no GPU that could copy from the file; with too little RAM, the CPU computes from it.
            set_free_ram(each, too_little)
            history = each.run(workflow(steps=1))
            assert history["status"]["status_str"] == "success", history["status"]
            pictures += each.images(history)
        assert pictures[0] == pictures[1]
        (one, mine), (other, theirs) = (memory_of(each, checkpoint.resolve()) for each in (server, second))
    set_free_ram(server, 0)
    print(f"in RAM of {checkpoint.name}: {one:,} and {other:,} bytes; their shares: {mine:,} and {theirs:,}")
    assert min(one, other) > 0.8 * packed  # the rest is in no block, or made from what the file has
    assert mine + theirs < 1.05 * max(one, other)
