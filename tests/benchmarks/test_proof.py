"""The proof: rows are run by their benchmarks, here by stand-ins, and their figures held against the targets."""

import argparse
import functools
import importlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import proof
import proof_data
import pytest
import two_gpus
from cases import CASES
from contenders import CONTENDERS
from proof_figures import OURS, THEIRS, Figure
from proof_rows import FILES_GB, ROWS, Machine
from results import GIB, Results, Row
from turn import Difference, Figures
from worker import Loaded

BY_NAME = {row.name: row for row in ROWS}
ONE_GPU = Machine(Path("nowhere"), 1)


def write_compared(folder, ms, *, peak_gib=None, unequal=(), failures=None, stays=(7, 9)):
    """What `compare.py` writes. ``ms``: for each case the ms of each contender; the first is what others equal."""
    results = Results(folder, {})
    for case_name, times in ms.items():
        case = next(one for one in CASES if one.name == case_name)
        base = next(iter(times))
        for name, value in times.items():
            contender = next(one for one in CONTENDERS if one.name == name)
            row = Row(case, contender, loaded=Loaded(1.0, GIB, 2 * GIB, has_dynamic_vram=True))
            difference = None if name == base else Difference(base, name not in unequal, 0.0)
            peak = int((peak_gib or {}).get(name, 0.5) * GIB)
            kinds = dict(zip(("double", "single"), stays, strict=True)) if name == "streamed-auto" else {}
            row.add(Figures([value], peak_allocated=peak, resident=8 * GIB, stays=kinds, difference=difference))
            results.rows.append(row)
        for name, failure in (failures or {}).items():
            contender = next(one for one in CONTENDERS if one.name == name)
            results.rows.append(Row(case, contender, failure=failure))
    results.write()


def nf4_held(folder):
    write_compared(folder, {"1024": {"bnb-nf4": 100.0, "streamed-0-0": 101.0, "streamed-resident": 100.0}})


def starts(folder):
    times = {"load_s": 0.2, "ready_s": 0.1, "first_step_s": 0.4}
    rows = [{"contender": "streamed-0-0", **times}, {"contender": "gguf-q4", "failure": "no pack"}]
    (folder / "starts.json").write_text(json.dumps({"rows": rows}))


@dataclass
class Stand:
    """Benchmarks that write what they are told to: by the row, a function of its folder, or an exit code."""

    output: Path
    told: dict = field(default_factory=dict)
    commands: list = field(default_factory=list)

    def execute(self, command, log, timeout_s):
        self.commands.append(command)
        log.write_text("something\nno such GPU\n\n")
        told = self.told[log.parent.name]
        if isinstance(told, int):
            return told
        told(log.parent)
        return 0

    def run(self, *arguments):
        """The exit code of the proof: 0, or what it says."""
        sys.argv[1:] = ["--output", str(self.output), "--folder", str(self.output / "weights"), *arguments]
        try:
            proof.main()
        except SystemExit as ended:
            return ended.code
        return 0

    def verdicts(self):
        rows = json.loads((self.output / "proof.json").read_text())["rows"]
        return {name: [figure["verdict"] for figure in row["figures"]] for name, row in rows.items()}


@pytest.fixture
def stand(tmp_path, monkeypatch):
    made = Stand(tmp_path / "results", {"nf4": nf4_held, "first-step": starts})
    monkeypatch.setattr(sys, "argv", ["proof.py"])
    monkeypatch.setattr(proof, "execute", made.execute)
    monkeypatch.setattr(proof, "require_gpu", lambda: None)
    monkeypatch.setattr(proof, "machine_of", lambda _: ONE_GPU)
    monkeypatch.setattr(proof, "about", lambda: {"device": "a stand-in"})
    monkeypatch.setenv(proof.ALLOCATOR, "")
    return made


def test_a_target_that_is_missed_is_said(stand, capsys):
    stand.told["nf4"] = lambda folder: write_compared(
        folder,
        {"1024": {"bnb-nf4": 100.0, "streamed-0-0": 102.4, "streamed-resident": 101.0}},
        peak_gib={"streamed-0-0": 0.8},
        unequal=("streamed-0-0",),
    )
    assert stand.run("--rows", "nf4") == "not all of it holds"
    said = capsys.readouterr().out
    assert "| nf4 | 0/0 of bitsandbytes' own modules, resident | 1.024 | at most 1.020 | missed |" in said
    assert "| nf4 | peak at 0/0 | 0.80 GiB | at most 0.75 GiB | missed |" in said
    assert "| nf4 | outputs that are not bit-equal to bitsandbytes' | 1 | at most 0 | missed |" in said
    assert "0 held, 3 missed, 0 not measured, 1 beside" in said
    assert stand.verdicts() == {"nf4": ["missed", "missed", "missed", "beside"]}


def test_a_run_that_holds_ends_well(stand):
    assert stand.run("--rows", "nf4") == 0
    assert "missed" not in stand.verdicts()["nf4"]


def test_a_run_that_is_cut_keeps_what_it_has(stand, capsys):
    def is_cut(folder):
        rows = [{"pixels": 512, "blocks": "all", "ratios": [1.0, 1.05, 1.1]}]
        (folder / "int8_model.json").write_text(json.dumps({"rows": rows}))
        raise KeyboardInterrupt

    stand.told["int8"] = is_cut
    with pytest.raises(KeyboardInterrupt):
        stand.run("--rows", "nf4,int8")
    assert list(stand.verdicts()) == ["nf4"]
    assert "| nf4 | peak at 0/0 | 0.50 GiB | at most 0.75 GiB | held |" in capsys.readouterr().out
    assert stand.run("--table") == "not all of it holds"
    line = "| int8 | int8 where faster of exact, 512, all blocks stay | 1.050 | at most 1.010 | missed |"
    assert line in capsys.readouterr().out
    assert stand.verdicts()["int8"] == ["missed", *["not measured"] * 5]


def test_runs_of_other_rows_give_one_table(stand, capsys):
    stand.run("--rows", "first-step")
    stand.run("--rows", "nf4")
    said = capsys.readouterr().out.rsplit("| row |", 1)[1]
    assert "| first-step | until the first step can begin, 0/0 | 0.30 s | at most 0.50 s | held |" in said
    assert "| first-step | until it is done, gguf-q4 | – (no pack) |  | not measured |" in said
    assert "| nf4 | peak at 0/0 |" in said
    rows = json.loads((stand.output / "proof.json").read_text())["rows"]
    assert [(name, row["about"], row["code"]) for name, row in rows.items()] == [
        ("nf4", {"device": "a stand-in"}, 0),
        ("first-step", {"device": "a stand-in"}, 0),
    ]


def test_a_benchmark_that_fails_is_said_and_its_figures_of_before_are_gone(stand, capsys):
    stand.run("--rows", "nf4")
    stand.told["nf4"] = 1
    assert stand.run("--rows", "nf4,first-step") == "not all of it holds"
    assert f"| nf4 | {BY_NAME['nf4'].what} | – (no such GPU) |  | not measured |" in capsys.readouterr().out
    assert stand.verdicts()["first-step"] == ["held", "beside", "not measured"]


def test_rows_that_this_machine_cannot_run_are_left_out(stand, capsys):
    stand.told["soak"] = starts
    stand.run("--rows", "two-*,flux2,nf4")
    said = capsys.readouterr().out
    assert "two-workers: left out: needs two GPUs" in said
    assert "flux2: left out: needs a ComfyUI that knows FLUX.2 klein (0.9.2)" in said
    assert list(stand.verdicts()) == ["nf4"]


def test_a_row_that_takes_too_long_is_not_begun(stand, capsys):
    stand.run("--rows", "nf4,first-step", "--minutes", "1.4")  # files: 5 s for one, 21 s for the other
    said = capsys.readouterr().out
    assert len(stand.commands) == 1
    assert "first-step: left out: it takes longer than the 1.4 minutes" in said


def test_options_are_handed_on_to_those_that_take_them(stand):
    stand.told |= {"soak": starts, "flux2": starts}
    stand.run("--rows", "nf4,soak", "--rounds", "9", "--prompts", "7", "--gguf-pack", "pack")
    nf4, soak = stand.commands
    assert nf4[-8:-4] == ["--rounds", "9", "--gguf-pack", "pack"]
    assert soak[2:7] == ["--prompts", "40", "--encoder", "--prompts", "7"]
    assert nf4[-4:-2] == ["--output", str(stand.output / "nf4")]


def test_the_list_says_what_each_row_takes(stand, capsys):
    (stand.output / "weights").mkdir(parents=True)
    (stand.output / "weights" / "flux-nf4.safetensors").touch()
    stand.run("--list", "--rows", "nf4,v1,cfg-split")
    said = capsys.readouterr().out
    assert f"| nf4 | 75 | 6.7 | 0.0 | {BY_NAME['nf4'].what} |" in said
    assert "| v1 | 125 | 12.9 | 6.2 |" in said
    assert "(needs two GPUs) |" in said


@pytest.mark.parametrize("name", BY_NAME)
def test_the_benchmark_takes_its_command(name, monkeypatch, tmp_path):
    given = argparse.Namespace(rounds=1, prompts=3, gguf_pack=tmp_path, output=tmp_path, folder=tmp_path)
    row, begun = BY_NAME[name], []

    class Begun(Exception):  # noqa: N818
        pass

    def begin(parsed):
        begun.append(parsed)
        raise Begun

    module = importlib.import_module(Path(row.script).stem)
    monkeypatch.setattr(module, "begin", begin)
    monkeypatch.setattr(two_gpus, "require_two_gpus", lambda: None)
    monkeypatch.setenv(proof.ALLOCATOR, "")
    monkeypatch.setattr(sys, "argv", proof.command_of(row, given)[1:])
    with pytest.raises(Begun):
        module.main()
    assert begun[0].output == tmp_path / name
    assert begun[0].folder == tmp_path
    assert getattr(begun[0], "rounds", 1) == 1 or "rounds" not in row.takes
    assert set(row.files) <= set(FILES_GB)


def is_alive(number):
    state = Path(f"/proc/{number}/stat")
    return state.exists() and ") Z " not in state.read_text()


def test_a_command_that_takes_too_long_is_ended_with_its_processes(tmp_path):
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    assert proof.execute([sys.executable, "-c", script], log, 3.0) == 124
    number, *_, last = log.read_text().split("\n", 1)
    assert "not done after 3 s" in last
    until = time.monotonic() + 20
    while is_alive(number) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(number)
    assert proof.last_line(log) == "not done after 3 s"


def test_room_is_made_by_removing_files_of_other_rows(tmp_path, monkeypatch):
    for name in ("flux-nf4.safetensors", "flux-bfloat16.safetensors", "flux-q4_0.gguf", "mine.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "123.flux-q4_0.gguf").touch()
    sizes = {path: size * 1e9 for path, size in FILES_GB.items()}

    def usage(folder):
        used = sum(sizes.get(path.name, 0) for path in folder.iterdir())
        return argparse.Namespace(free=38e9 - used - (20e9 if (folder / "flux2-nf4.safetensors").exists() else 0))

    monkeypatch.setattr(proof.shutil, "disk_usage", usage)
    proof.make_room(BY_NAME["nf4"], tmp_path)  # all that it reads is there
    assert len(list(tmp_path.iterdir())) == 4
    proof.make_room(BY_NAME["v1"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "flux-nf4.safetensors",
        "flux-q4_0.gguf",
        "mine.safetensors",
    }
    (tmp_path / "flux2-nf4.safetensors").touch()
    proof.make_room(BY_NAME["flux2-encoders"], tmp_path)  # for its other file there is no room whatever goes
    assert {path.name for path in tmp_path.iterdir()} == {"flux2-nf4.safetensors", "mine.safetensors"}


def figures_of(name, folder, write):
    (folder / name).mkdir()
    write(folder / name)
    return {figure.name: figure for figure in proof.read(BY_NAME[name], folder)}


def test_a_card_has_the_fastest_of_each_side(tmp_path):
    plain = dict.fromkeys((*OURS, *THEIRS), 300.0) | {"streamed-auto": 190.0, "comfy-w4a8": 200.0}
    lora = plain | {"streamed-auto": 209.0, "comfy-fp8": 180.0}
    del plain["gguf-q4"], lora["gguf-q4"]
    ms = {"1024-cap6": plain, "1024-lora16-cap6": lora}
    found = figures_of("card-6", tmp_path, lambda folder: write_compared(folder, ms, failures={"gguf-q4": "no pack"}))

    def told(name):
        return found[name].shown, found[name].verdict

    assert told("NF4 here of the fastest by ComfyUI") == ("0.950 (comfy-w4a8)", "held")
    assert told("NF4 here of the fastest by ComfyUI, with a LoRA") == ("1.161 (comfy-fp8)", "missed")
    assert told("w4a8 streamed of w4a8 by ComfyUI") == ("1.500", "missed")
    assert told("int8 streamed of int8 by ComfyUI, with a LoRA") == ("1.000", "held")
    assert told("blocks that stay") == ("7 + 9", "beside")
    assert told("peak VRAM") == ("0.50 GiB", "beside")
    assert told("streamed-auto") == ("190.0 ms", "beside")
    assert told("gguf-q4") == ("– (gguf-q4: no pack)", "not measured")


def test_a_lora_is_held_against_none_on_the_same_card(tmp_path):
    plain, lora = {"streamed-auto": 190.0, "comfy-int8-streamed": 180.0}, {"streamed-auto": 209.0}
    ms = {"1024-cap4": {"streamed-auto": 100.0}, "1024-cap6": plain, "1024-lora16-cap6": lora}
    found = figures_of("lora", tmp_path, lambda folder: write_compared(folder, ms))
    verdicts = {name: figure.verdict for name, figure in found.items() if figure.verdict != "not measured"}
    assert verdicts == {"streamed-auto on 6 GiB, with a LoRA of without": "missed"}
    assert found["streamed-auto on 6 GiB, with a LoRA of without"].shown == "1.100"
    assert len(found) == 3 * len(OURS)


def test_all_resident_is_held_against_its_target_where_all_are(tmp_path):
    def write(folder, stays):
        write_compared(folder, {"1024-cap8": {"streamed-auto": 190.0}}, peak_gib={"streamed-auto": 5.03}, stays=stays)

    for stays, verdict in (((19, 38), "missed"), ((19, 37), None)):
        (tmp_path / str(stays)).mkdir()
        found = figures_of("card-8", tmp_path / str(stays), functools.partial(write, stays=stays))
        figure = found.get("peak with all of Flux.1 resident")
        assert (None if figure is None else figure.verdict) == verdict


def test_the_tables_of_the_texts_are_made_of_what_is_written(stand):
    for gib, times in ((6, {"streamed-auto": 195.6}), (8, {"streamed-auto": 190.4, "comfy-int8": 266.0})):
        stand.told[f"card-{gib}"] = functools.partial(write_compared, ms={f"1024-cap{gib}": times})
    stand.run("--rows", "card-6,card-8")
    table = proof_data.your_card(proof_data.condensed(json.loads((stand.output / "proof.json").read_text())))
    columns = {series["name"]["en"]: series["values"] for series in table["series"]}
    assert table["groups"] == ["6 GB", "8 GB"]
    assert columns == {
        "blocks that stay in VRAM": ["7 + 9"] * 2,
        "peak VRAM": [0.5] * 2,
        "this package": [196, 190],
        "ComfyUI, int8": [None, 266],
    }


def test_a_new_prompt_is_counted_from_its_text_to_its_picture(tmp_path):
    def row(cap, after, encode):
        return {"cap_gib": cap, "after": after, "encode": encode, "sample": 4.0, "decode": 1.0, "latent": cap / 16}

    rows = [row(cap, after, encode) for cap, encode in ((0, 0.0), (8, 1.0)) for after in ("nothing", "itself")]

    def write(folder):
        (folder / "workflow.json").write_text(json.dumps({"rows": rows, "ram_gib": 12.3}))

    found = figures_of("new-prompt", tmp_path, write)
    assert found["a new prompt, 8 GiB of the whole card"] == Figure(
        "a new prompt, 8 GiB of the whole card", 1.2, most=1.05, note="6.00 s"
    )
    assert found["latents that are not those of the whole card"].verdict == "missed"
    assert found["RAM in total"].shown == "12.30 GiB"


def test_growth_is_held_against_what_the_soak_allows(tmp_path):
    told = {"done": [1, 2], "other_pictures": [1], "grown": {"device": 2**27, "pinned": 0}}
    told |= {"slack": {"device": 2**26, "pinned": 0}, "encodes": True}
    found = figures_of("soak", tmp_path, lambda folder: (folder / "soak.json").write_text(json.dumps(told)))
    assert [figure.verdict for figure in found.values()] == ["beside", "missed", "missed", "held"]
    assert found["growth, device"].shown == "128 MiB"
    assert found["prompts"].shown == "2 (with a text encoder)"
    (tmp_path / "soak" / "soak.json").write_text(json.dumps(told | {"grown": {}}))  # it was cut
    assert [figure.verdict for figure in proof.read(BY_NAME["soak"], tmp_path)][2:] == ["not measured"] * 2


@pytest.mark.parametrize(
    ("name", "told", "verdicts"),
    [
        (
            "cfg-split",
            {"rows": [{"resident": "0/0", "pixels": x, "ratio": x / 1000, "host_busy": 1} for x in (600, 700)]},
            ["held", "missed"],
        ),
        ("two-workers", {"processes": {"file": {"grown_gib_ratio": 1.04}}}, ["held"]),
        ("flux2-encoders", {"rows": [{"budget_gib": 1.0, "ratio": 0.98}]}, ["held", "not measured"]),
        (
            "flux2-encoders",
            {"rows": [{"budget_gib": 1.0, "ratio": 1.2}], "workflow": {"moved": 1}},
            ["missed", "missed"],
        ),
        (
            "flux2",
            {"models": {"dev": [{"setting": "automatic on 8 GiB", "ratio": 1.06, "peak_gib": 5.9}]}},
            ["missed", "beside", "not measured", "not measured"],
        ),
    ],
)
def test_figures_of_the_other_benchmarks(name, told, verdicts, tmp_path):
    file = proof.result_name(BY_NAME[name])
    found = figures_of(name, tmp_path, lambda folder: (folder / file).write_text(json.dumps(told)))
    assert [figure.verdict for figure in found.values()] == verdicts


def test_a_file_that_was_cut_in_the_middle_is_no_figure(tmp_path):
    found = figures_of("flux2", tmp_path, lambda folder: (folder / "flux2.json").write_text('{"models": {"de'))
    ((_, figure),) = found.items()
    assert figure.verdict == "not measured"
    assert "cannot be read" in figure.note


def test_a_figure_that_is_just_above_its_target_shows_by_how_much():
    assert Figure("", 1.0101, most=1.01).shown == "1.0101"
    assert Figure("", 1.0099, most=1.01).shown == "1.010"
    assert Figure("", 1.02, most=1.01).shown == "1.020"
    assert Figure("", None, most=1.01, note="why").shown == "– (why)"
