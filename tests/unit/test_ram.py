"""What a container may use counts, not what its machine has."""

import psutil
import pytest

from flux_nf4.offload import ram

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A function: this process is in a control group of this path, and these have a limit; in a machine of 64 GiB."""
    memory = type("Memory", (), {"total": 64 * GIB, "available": 32 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(ram, "_GROUPS", tmp_path)
    monkeypatch.setattr(ram, "_GROUP_OF_THIS_PROCESS", tmp_path / "cgroup")

    def make(path, groups):
        (tmp_path / "cgroup").write_text(f"12:cpu:/x\n0::/{path}\n")
        for name, (limit, current, of_files) in groups.items():
            group = tmp_path / name
            group.mkdir(parents=True, exist_ok=True)
            (group / "memory.max").write_text(f"{limit}\n")
            (group / "memory.current").write_text(f"{current}\n")
            (group / "memory.stat").write_text(f"anon 5\nactive_file {of_files - GIB}\ninactive_file {GIB}\n")

    return make


def test_without_groups_it_is_the_machines(groups):
    assert (ram.ram_bytes(), ram.free_ram_bytes()) == (64 * GIB, 32 * GIB)


def test_a_group_without_a_limit_is_the_machines(groups):
    groups("a/b", {"a/b": ("max", 5 * GIB, GIB)})
    assert (ram.ram_bytes(), ram.free_ram_bytes()) == (64 * GIB, 32 * GIB)


def test_what_files_take_is_free(groups):
    groups("a/b", {"a/b": (16 * GIB, 12 * GIB, 7 * GIB)})
    assert (ram.ram_bytes(), ram.free_ram_bytes()) == (16 * GIB, 11 * GIB)


@pytest.mark.parametrize("at", ["a", "."])
def test_the_limits_of_what_a_group_is_in_count(at, groups):
    groups("a/b", {"a/b": (16 * GIB, GIB, GIB), at: (8 * GIB, 4 * GIB, GIB)})
    assert (ram.ram_bytes(), ram.free_ram_bytes()) == (8 * GIB, 5 * GIB)


def test_a_container_sees_its_own_group_at_the_root(groups):
    groups("docker/0123", {".": (8 * GIB, 4 * GIB, GIB)})
    assert (ram.ram_bytes(), ram.free_ram_bytes()) == (8 * GIB, 5 * GIB)


def test_less_than_nothing_is_nothing(groups):
    groups("a", {"a": (8 * GIB, 10 * GIB, GIB)})
    assert ram.free_ram_bytes() == 0
