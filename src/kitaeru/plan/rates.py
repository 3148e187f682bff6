"""How fast a device and its links really are: what a profile measured, else the sheet's rate times a factor.

Each factor has its source and its bounds beside it: a plan from the table is a range, and a profile narrows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kitaeru.hardware import Device, Hardware
from kitaeru.i18n import N_
from kitaeru.plan.calibrate import DeviceProfile, Profile
from kitaeru.plan.types import Precision

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Factor:
    """A share of the sheet's rate that this kind of work reaches: likely, at worst, at best; and where that is known
    from.
    """

    likely: float
    low: float
    high: float
    source: str

    def at(self, case: str) -> float:
        """The factor in the case `likely`, `low` or `high`."""
        return {"likely": self.likely, "low": self.low, "high": self.high}[case]


# "H100" is one H100 SXM with torch 2.11, medians at 8192 tokens; "published" are others' measurements on that card.
GEMM = Factor(0.70, 0.60, 0.80, N_("H100: 677 to 801 of 989 TFLOP/s; published for RTX A5000: at least 75 %"))
SKINNY = Factor(0.15, 0.10, 0.25, N_("an adapter's rank of 16 fills a sixteenth of a tile; estimate"))
GROUPED = Factor(0.35, 0.20, 0.60, N_("experts' grouped GEMM; estimate"))
FLASH_FORWARD = {
    9: Factor(0.31, 0.28, 0.35, N_("H100, SDPA flash, 2048 tokens: 308 of 989 TFLOP/s")),
    8: Factor(0.70, 0.55, 0.76, N_("published for RTX A5000: 81 to 84 of 111 TFLOP/s")),
    7: Factor(0.30, 0.15, 0.45, N_("no flash kernel before compute capability 8.0; estimate")),
}
FLASH_BACKWARD = {
    9: Factor(0.21, 0.18, 0.25, N_("H100, SDPA flash, 2048 tokens: 228 TFLOP/s forward and backward")),
    8: Factor(0.55, 0.45, 0.69, N_("published for RTX A5000: 53 to 77 of 111 TFLOP/s")),
    7: Factor(0.25, 0.12, 0.40, N_("no flash kernel before compute capability 8.0; estimate")),
}
STREAM = Factor(0.87, 0.80, 0.92, N_("H100: 3.0 of 3.35 TB/s; published for RTX A5000: 660 of 768 GB/s"))
EAGER = Factor(0.65, 0.50, 0.80, N_("many small eager kernels; fitted to 5,157 tokens/s of an 8B QLoRA on an H100"))
DEQUANTISE = Factor(0.54, 0.45, 0.65, N_("H100, bitsandbytes: 14336 x 4096 to bf16 in 0.081 ms"))
PCIE = Factor(0.80, 0.60, 0.85, N_("published: 25 to 26 of 32 GB/s one way with PCIe 4.0 x16; H100: 55 of 64"))
PCIE_NO_P2P = Factor(0.31, 0.25, 0.40, N_("published: 8 to 12 of 32 GB/s through the host's memory"))
NVLINK = Factor(0.80, 0.65, 0.90, N_("published: 101.6 of 112.5 GB/s both ways for a pair of GA102"))
# Seconds of the host for one operation of eager PyTorch, and for what surrounds a micro-batch and a step.
HOST_OPERATION = Factor(
    30e-6, 45e-6, 12e-6, "fitted to 160 ms for a step of two micro-batches of an 8-layer model, H100"
)
HOST_MICRO_BATCH = Factor(10e-3, 20e-3, 4e-3, N_("same measurement"))
HOST_STEP = Factor(40e-3, 70e-3, 15e-3, N_("same measurement"))
HOST_MEMORY_GB_S = Factor(40.0, 25.0, 120.0, N_("two channels of DDR4 to eight; not probed"))
CPU_FLOPS_PER_CORE = {
    "fp32": Factor(60e9, 15e9, 130e9, N_("one core with AVX2 or AVX-512 in fp32; estimate")),
    "bf16": Factor(140e9, 20e9, 350e9, N_("EPYC, 2 cores, AVX-512: 3,000 tokens/s of the bundled model trained whole")),
}
CPU_PEAK_PER_CORE = 500e9
UNKNOWN_TFLOPS, UNKNOWN_GB_S = 40.0, 400.0


@dataclass(frozen=True)
class Rates:
    """Rates of one device: FLOP/s by kind of work, bytes/s by kind of traffic, seconds of its host. `peak_flops` is the
    sheet's dense rate in the arithmetic of the plan.
    """

    peak_flops: float
    gemm: float
    skinny: float
    grouped: float
    attention_forward: float
    attention_backward: float
    stream: float
    eager: float
    dequantise: float
    host_copy: float
    host_memory: float
    operation: float
    micro_batch: float
    step: float
    measured: bool = False


@dataclass(frozen=True)
class LinkRates:
    """What joins the devices of a plan: bytes/s one way, seconds before the first byte."""

    bytes_s: float
    latency: float
    name: str
    measured: bool = False


def device_rates(device: Device, precision: Precision, case: str = "likely", profile: Profile | None = None) -> Rates:
    """The rates of a GPU in one case (`likely`, `low`, `high`), a profile's where it has the device."""
    peak = _peak(device, precision)
    bandwidth = (device.bandwidth_gb_s or UNKNOWN_GB_S) * GIGA
    kind = 9 if device.sm >= 9 else 8 if device.sm >= 8 else 7
    bus = 2.0 ** (device.pcie_generation - 4) * 2 * (device.pcie_width or 16) if device.pcie_generation else 16.0
    rates = Rates(
        peak_flops=peak,
        gemm=peak * GEMM.at(case),
        skinny=peak * SKINNY.at(case),
        grouped=peak * GROUPED.at(case),
        attention_forward=peak * FLASH_FORWARD[kind].at(case),
        attention_backward=peak * FLASH_BACKWARD[kind].at(case),
        stream=bandwidth * STREAM.at(case),
        eager=bandwidth * EAGER.at(case),
        dequantise=bandwidth * DEQUANTISE.at(case),
        host_copy=bus * GIGA * PCIE.at(case),
        host_memory=HOST_MEMORY_GB_S.at(case) * GIGA,
        operation=HOST_OPERATION.at(case),
        micro_batch=HOST_MICRO_BATCH.at(case),
        step=HOST_STEP.at(case),
    )
    measured = profile.device(device.name) if profile else None
    return rates if measured is None else _measured(rates, measured, precision, case)


def _peak(device: Device, precision: Precision) -> float:
    rate = device.fp16_tflops if precision == "fp16" else device.bf16_tflops or device.fp16_tflops
    return (rate or UNKNOWN_TFLOPS) * TERA / (8 if precision == "fp32" else 1)


# A measured rate holds for the shapes that were measured, on a hot card: this much is left open.
MEASURED_SPREAD = {"likely": 1.0, "low": 0.92, "high": 1.06}


def _measured(rates: Rates, profile: DeviceProfile, precision: Precision, case: str) -> Rates:
    spread = MEASURED_SPREAD[case]
    flops = {"bf16": profile.gemm_bf16_tflops, "fp16": profile.gemm_fp16_tflops, "fp32": profile.gemm_fp32_tflops}
    found = {
        "gemm": flops[precision] * TERA,
        "attention_forward": profile.attention_forward_tflops * TERA,
        "attention_backward": profile.attention_backward_tflops * TERA,
        "stream": profile.stream_gb_s * GIGA,
        "eager": profile.eager_gb_s * GIGA,
        "dequantise": profile.dequantise_gb_s * GIGA,
        "host_copy": profile.host_copy_gb_s * GIGA,
        "host_memory": profile.host_memory_gb_s * GIGA,
    }
    changed = {name: value * spread for name, value in found.items() if value}
    for name in ("gemm", "attention_forward", "attention_backward"):
        if name in changed:
            changed[name] = min(changed[name], rates.peak_flops)
    if profile.operation_seconds:
        changed["operation"] = profile.operation_seconds / spread
    return replace(rates, **changed, measured=True)


def cpu_rates(hardware: Hardware, precision: Precision, case: str = "likely", processes: int = 1) -> Rates:
    """The rates of a CPU, shared by several processes."""
    cores = max(1.0, hardware.cpu_cores / processes)
    flops = cores * CPU_FLOPS_PER_CORE["bf16" if precision == "bf16" else "fp32"].at(case)
    memory = HOST_MEMORY_GB_S.at(case) * GIGA / processes / 2
    return Rates(
        peak_flops=cores * CPU_PEAK_PER_CORE,
        gemm=flops,
        skinny=flops / 2,
        grouped=flops / 2,
        attention_forward=flops,
        attention_backward=flops,
        stream=memory,
        eager=memory,
        dequantise=memory / 10,
        host_copy=memory,
        host_memory=memory,
        operation=HOST_OPERATION.at(case) / 2,
        micro_batch=HOST_MICRO_BATCH.at(case),
        step=HOST_STEP.at(case),
    )


def link_rates(hardware: Hardware, count: int, case: str = "likely", profile: Profile | None = None) -> LinkRates:
    """The slowest link between neighbours of the first `count` devices, which is what a ring of them runs at.

    >>> from kitaeru.hardware import parse_gpus
    >>> [round(link_rates(parse_gpus(text), 2).bytes_s / 1e9) for text in ("2x RTX A5000", "2x RTX A5000, nvlink")]
    [26, 45]
    """
    slowest: LinkRates | None = None
    for link in hardware.links:
        if link.b >= count or link.b - link.a not in (1, count - 1):
            continue
        measured = profile.link(link.a, link.b) if profile else None
        if measured:
            now = LinkRates(measured * GIGA * MEASURED_SPREAD[case], 20e-6, link.kind, measured=True)
        elif link.kind == "nvlink":
            now = LinkRates(link.gb_s / 2 * GIGA * NVLINK.at(case), 15e-6, "NVLink")
        else:
            p2p = hardware.devices[link.a].p2p and hardware.devices[link.b].p2p
            factor = PCIE if p2p else PCIE_NO_P2P
            now = LinkRates((link.gb_s or 32.0) / 2 * GIGA * factor.at(case), 30e-6, "PCIe")
        if slowest is None or now.bytes_s < slowest.bytes_s:
            slowest = now
    return slowest or LinkRates(HOST_MEMORY_GB_S.at(case) / 4 * GIGA, 100e-6, "RAM")
