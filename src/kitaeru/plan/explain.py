"""Every number of a candidate with how it came about: items of memory, RAM, seconds of a step."""

from __future__ import annotations

from dataclasses import dataclass

from kitaeru.hardware import Device
from kitaeru.i18n import N_, tr
from kitaeru.plan import rates
from kitaeru.plan.host import HOST_ITEMS
from kitaeru.plan.memory import ITEMS
from kitaeru.plan.speed import PARTS
from kitaeru.plan.types import Candidate

FORMULAS: dict[str, str] = {
    "weights": N_("parameters x bytes as stored: 0.5 in 4 bits, 1 in 8, 2 in 16, 4 where they are trained"),
    "quantization": N_("1 byte for 64 weights and 4 for 16,384 (NF4); 4 a row (INT8)"),
    "weight_casts": N_("2 bytes for each weight of a trained 32-bit linear layer"),
    "adapter": N_("4 bytes x r x (inputs + outputs) of each adapted layer"),
    "gradients": N_("4 bytes x trained parameters; where weights change in the backward pass, of the largest one"),
    "optimizer": N_(
        "AdamW: 8 bytes x trained parameters, 4 with moments in 16 bits (ZeRO: 4 more for a copy of weights)"
    ),
    "activations": N_(
        "tokens x what each operation keeps, layer by layer; x micro-batches under way in a pipeline; of a layer that "
        "is computed again the input, or all but three of them in RAM"
    ),
    "head": N_("512 rows of logits in 32 bits, up to 3 copies, and the gradient of what the head reads"),
    "workspace": N_("gradients of one layer while its backward pass runs, and one unpacked weight"),
    "graphs": N_(
        "tokens x what a layer holds in a pass without gradients, or the head in its; and 32 MiB more for cuBLAS"
    ),
    "libraries": N_("on sm_90 32 MiB for each of two threads, elsewhere less"),
    "gathered": N_("two layers and the tables put together from all devices, or two layers that come from RAM"),
    "communication": N_("five buckets of 32 MiB of gradients, or what stages hand over"),
    "process": N_("measured: Python, torch and transformers imported"),
    "processes": N_("3 GB a process"),
    "loading": N_("one file of weights, at most 5 GB; FSDP: the whole model for each process"),
    "pinned": N_("1 GB a device; in full training two layers' gradients for each"),
}

# Of the machine's RAM, where it is another than a device's.
HOST_FORMULAS: dict[str, str] = {
    "activations": N_("tokens x 2 bytes (4 where all is trained) x width x (layers - 1), in pinned pieces of 16 MiB"),
}

# Of the seconds of a step; names are those of `speed.PARTS`.
SPEED_FORMULAS: dict[str, str] = {
    "matrix_products": N_("2 FLOP x weights x tokens x passes / the rate below"),
    "attention": N_("4 FLOP x width x tokens seen forward, 10 backward / the rates below"),
    "small_kernels": N_("bytes that norms, activations, casts and sums read and write / the rates below"),
    "unpacking": N_("2.5 bytes x 4-bit weights x passes / the rate below"),
    "optimizer": N_(
        "40 bytes x trained parameters moved (AdamW) / the rate of one large kernel; in RAM 20 (16 bits) or 36 bytes / "
        "its rate"
    ),
    "communication": N_("bytes between devices / the rate of the link, as far as computing does not hide it"),
    "host": N_(
        "operations x seconds an operation (with CUDA graphs one launch), as far as computing does not hide it; and a "
        "time for each step"
    ),
    "bubble": N_("simulated pass by pass"),
    "offload": N_(
        "bytes to and from RAM / the rate of copies; a layer's input down and up; as far as computing does not hide it"
    ),
}


# Items of a device's memory, by what they are for: the parts of a bar.
MEMORY_GROUPS: dict[str, tuple[str, ...]] = {
    "weights": ("weights", "quantization", "gathered", "process"),
    "trained": ("adapter", "gradients", "optimizer", "weight_casts"),
    "activations": ("activations",),
    "work": ("head", "workspace", "graphs", "libraries", "communication"),
}


@dataclass(frozen=True)
class Line:
    """One number: its name, its value in bytes or seconds, what it is, and its formula."""

    name: str
    value: float
    what: str
    formula: str


def memory_lines(items: dict[str, int]) -> list[Line]:
    """The items of a device."""
    return [Line(name, size, tr(ITEMS[name]), _formula(name)) for name, size in items.items()]


def host_lines(candidate: Candidate) -> list[Line]:
    """The items of the machine's RAM."""
    own = {name: tr(formula) for name, formula in HOST_FORMULAS.items()}
    return [
        Line(name, size, tr(HOST_ITEMS[name]), own.get(name) or _formula(name)) for name, size in candidate.host.items()
    ]


def speed_lines(candidate: Candidate) -> list[Line]:
    """The seconds of a step."""
    parts = candidate.speed.parts if candidate.speed else {}
    return [Line(name, seconds, tr(PARTS[name]), tr(SPEED_FORMULAS[name])) for name, seconds in parts.items()]


def _formula(name: str) -> str:
    return tr(FORMULAS[name]) if name in FORMULAS else ""


def factor_lines(device: Device | None) -> list[tuple[str, str, str]]:
    """The shares of the sheet's rates that are taken, with where each is known from."""
    if device is None:
        core = rates.CPU_FLOPS_PER_CORE.items()
        return [(tr("a core of the CPU"), f"{f.likely / 1e9:.0f} GFLOP/s {name}", tr(f.source)) for name, f in core]
    kind = 9 if device.sm >= 9 else 8 if device.sm >= 8 else 7
    named = (
        (tr("matrix products"), rates.GEMM),
        (tr("attention, forward"), rates.FLASH_FORWARD[kind]),
        (tr("attention, backward"), rates.FLASH_BACKWARD[kind]),
        (tr("one large kernel"), rates.STREAM),
        (tr("small kernels"), rates.EAGER),
        (tr("unpacking"), rates.DEQUANTISE),
        (tr("copies over PCIe"), rates.PCIE if device.p2p else rates.PCIE_NO_P2P),
    )
    return [(name, f"{f.likely:.0%} ({f.low:.0%}–{f.high:.0%})", tr(f.source)) for name, f in named]
