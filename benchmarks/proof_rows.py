"""The rows of the proof: what each shows, which benchmark measures it, and what it takes."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import proof_figures as figures
from proof_figures import NATIVE, OURS, THEIRS, Figure

FILES_GB = {
    "flux-nf4.safetensors": 6.7,
    "flux-nf4-v1.safetensors": 6.2,
    "flux-int8.safetensors": 12.0,
    "flux-w4a8.safetensors": 6.9,
    "flux-nvfp4.safetensors": 7.0,
    "flux-float8_e4m3fn.safetensors": 11.9,
    "flux-bfloat16.safetensors": 23.8,
    "flux-q4_0.gguf": 7.0,
    "flux-nf4-all-in-one.safetensors": 12.3,
    "flux-other-bf16.safetensors": 2.6,
    "flux2-dev-nf4.safetensors": 18.2,
    "flux2-klein-4b-nf4.safetensors": 2.3,
    "flux2-nf4.safetensors": 18.2,
    "mistral3/mistral3-nf4.safetensors": 10.7,
}
"""What the benchmarks make in their folder, in 1e9 bytes."""

NF4, V1, DENSE, ALL_IN_ONE = (f"flux-{name}.safetensors" for name in ("nf4", "nf4-v1", "bfloat16", "nf4-all-in-one"))
MAKING_S_A_GB = 0.8


@dataclass(frozen=True)
class Machine:
    """What decides which rows can run: the ComfyUI tree, and how many GPUs PyTorch sees."""

    comfyui: Path
    gpus: int

    def lacks(self, path: str, word: str = "") -> bool:
        """Whether the tree has no such file, or not this word in it."""
        file = self.comfyui / path
        return not file.is_file() or word not in file.read_text("utf-8")


def anything(_: Machine) -> str:
    return ""


def two_gpus(machine: Machine) -> str:
    return "needs two GPUs" if machine.gpus < 2 else ""


def two_gpus_and_split(machine: Machine) -> str:
    lacks = machine.lacks("comfy/multigpu.py")
    return two_gpus(machine) or ("needs a ComfyUI with MultiGPU CFG Split (0.33)" if lacks else "")


def klein(machine: Machine) -> str:
    lacks = machine.lacks("comfy/text_encoders/flux.py", "klein")
    return "needs a ComfyUI that knows FLUX.2 klein (0.9.2)" if lacks else ""


def flux2(machine: Machine) -> str:
    lacks = machine.lacks("comfy/supported_models.py", "class Flux2")
    return "needs a ComfyUI that knows FLUX.2 (0.3.72)" if lacks else ""


@dataclass(frozen=True)
class Row:
    """One row, which one run of a benchmark measures.

    Attributes:
        name: What ``--rows`` calls it.
        what: What it shows.
        script: The benchmark, whose JSON has its name.
        arguments: Its arguments.
        read: The figures, from its JSON.
        seconds: What it takes on an H200 with its files made.
        files: Which of `FILES_GB` it reads.
        takes: Options of the proof that are handed on to it.
        missing: Why it cannot run on this machine; "" if it can.
    """

    name: str
    what: str
    script: str
    arguments: tuple[str, ...]
    read: Callable[[dict[str, Any]], Iterable[Figure]]
    seconds: int
    files: tuple[str, ...]
    takes: tuple[str, ...] = ("rounds",)
    missing: Callable[[Machine], str] = anything

    @property
    def gb(self) -> float:
        return sum(FILES_GB[name] for name in self.files)


_COMPARE = ("rounds", "gguf_pack")
_SHORT = ("--calls", "6", "--seconds", "1.5", "--rounds", "2")
_OF_CARDS = (
    NF4,
    *(f"flux-{kind}.safetensors" for kind in NATIVE),
    "flux-float8_e4m3fn.safetensors",
    "flux-q4_0.gguf",
)


def _card(gib: int) -> Row:
    cases = ("--cases", f"1024-cap{gib}", f"1024-lora16-cap{gib}")
    return Row(
        f"card-{gib}",
        f"a card of {gib} GiB: NF4 here; INT8 ConvRot, W4A8, NVFP4, fp8 and GGUF Q4 by ComfyUI; INT8, W4A8 and NVFP4 "
        "streamed here; each without and with a LoRA of rank 16",
        "compare.py",
        (*cases, "--apart", *_SHORT, "--only", *OURS, *THEIRS),
        functools.partial(figures.card, gib=gib),
        seconds=330,
        files=_OF_CARDS,
        takes=_COMPARE,
    )


ROWS = (
    Row(
        "nf4",
        "NF4 against bitsandbytes' own modules, 1024x1024",
        "compare.py",
        ("--cases", "1024", "--only", "bnb-nf4", "streamed-0-0", "streamed-resident"),
        figures.nf4,
        seconds=75,
        files=(NF4,),
        takes=_COMPARE,
    ),
    *(_card(gib) for gib in (4, 6, 8)),
    Row(
        "card-12",
        "a card of 12 GiB, without LoRA",
        "compare.py",
        ("--cases", "1024-cap12", "--apart", *_SHORT, "--only", *OURS, *THEIRS),
        figures.card_12,
        seconds=190,
        files=_OF_CARDS,
        takes=_COMPARE,
    ),
    Row(
        "lora",
        "what a LoRA of rank 16 costs on 4, 6 and 8 GiB: NF4 here; INT8, W4A8 and NVFP4 streamed here",
        "compare.py",
        (
            *("--cases", *(f"1024{lora}-cap{gib}" for gib in (4, 6, 8) for lora in ("", "-lora16"))),
            *("--apart", "--calls", "6", "--seconds", "1.5", "--rounds", "3", "--only", *OURS),
        ),
        figures.lora,
        seconds=280,
        files=(NF4, *(f"flux-{kind}.safetensors" for kind in NATIVE)),
        takes=_COMPARE,
    ),
    Row(
        "first-step",
        "from Queue to the first step, page cache warm; ComfyUI's INT8 ConvRot and GGUF Q4 beside",
        "starts.py",
        ("--rounds", "3"),
        figures.first_step,
        seconds=130,
        files=(NF4, "flux-int8.safetensors", "flux-q4_0.gguf"),
        takes=_COMPARE,
    ),
    Row(
        "new-prompt",
        "a new prompt on 8 GiB, from Queue to the picture, 20 steps, against the whole card",
        "workflow.py",
        ("--caps", "8", "--rounds", "2"),
        figures.new_prompt,
        seconds=120,
        files=(ALL_IN_ONE, "flux-other-bf16.safetensors"),
    ),
    Row(
        "v1",
        "files with nested absmax (v1) against bitsandbytes' own modules",
        "compare.py",
        ("--cases", "1024", "--only", "bnb-nf4-v1", "streamed-v1-*"),
        figures.v1,
        seconds=120,
        files=(NF4, V1),
        takes=_COMPARE,
    ),
    Row(
        "int8",
        "int8 where faster against exact, the whole model",
        "int8_model.py",
        (),
        figures.int8,
        seconds=150,
        files=(NF4,),
        takes=(),
    ),
    Row(
        "flux2",
        "FLUX.2 dev on 8 GiB, klein 4B on 4 GiB",
        "flux2.py",
        ("--models", "dev", "klein-4b"),
        figures.flux2,
        seconds=90,
        files=("flux2-dev-nf4.safetensors", "flux2-klein-4b-nf4.safetensors"),
        takes=(),
        missing=klein,
    ),
    Row(
        "flux2-encoders",
        "FLUX.2's text encoder streamed, and two prompts on 8 GiB",
        "text_encoder.py",
        ("--rounds", "2"),
        figures.flux2_encoders,
        seconds=110,
        files=("flux2-nf4.safetensors", "mistral3/mistral3-nf4.safetensors"),
        missing=flux2,
    ),
    Row(
        "compiled",
        "compiled blocks at 0/0 against dense bf16, resident",
        "compare.py",
        ("--cases", "1024", "--only", "comfy-bf16", "streamed-0-0-compiled"),
        figures.compiled,
        seconds=120,
        files=(NF4, DENSE),
        takes=_COMPARE,
    ),
    Row(
        "soak",
        "prompts over formats, sizes, LoRAs and budgets of a text encoder",
        "soak.py",
        ("--prompts", "40", "--encoder"),
        figures.soak,
        seconds=120,
        files=(NF4, V1, "flux-int8.safetensors", "mistral3/mistral3-nf4.safetensors"),
        takes=("prompts",),
    ),
    Row(
        "soak-small",
        "200 prompts of small models over files, sizes, LoRAs and budgets of a text encoder",
        "soak.py",
        ("--dry-run", "--prompts", "200", "--encoder"),
        figures.soak,
        seconds=60,
        files=(),
        takes=(),
    ),
    Row(
        "cfg-split",
        "CFG split between two GPUs",
        "two_gpus.py",
        ("--rounds", "2"),
        figures.cfg_split,
        seconds=150,
        files=(NF4,),
        missing=two_gpus_and_split,
    ),
    Row(
        "two-workers",
        "two workers, each on its own GPU, that share a file",
        "file_memory.py",
        ("--part", "processes", "--ways", "file"),
        figures.two_workers,
        seconds=100,
        files=(NF4,),
        missing=two_gpus,
    ),
)
