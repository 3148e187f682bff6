"""How fast a device and its links really are: what a profile measured, else the sheet's rate times a factor.

Each factor has its source and its bounds beside it: a plan from the table is a range, and a profile narrows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kitaeru.hardware import NETWORK_GB_S, Device, Hardware
from kitaeru.i18n import N_
from kitaeru.plan.calibrate import AttentionKind, DeviceProfile, Profile, cpu_key
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
EIGHT = {
    9: Factor(0.74, 0.60, 0.78, N_("H100, FP8, a Llama-3-8B layer with its adapters: 1,461 of 1,979 TFLOP/s")),
    8: Factor(0.56, 0.40, 0.70, N_("H100, the INT8 kernel of sm_86: 1,115 of 1,979 TOP/s; not measured on an sm_86")),
    7: Factor(0.30, 0.20, 0.40, N_("no fused layers before compute capability 8.0; estimate")),
}
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
CUDNN_FORWARD = Factor(0.50, 0.45, 0.56, N_("H100, cuDNN, rows of 2048 tokens: 480 to 520 of 989 TFLOP/s"))
CUDNN_BACKWARD = Factor(0.34, 0.30, 0.40, N_("H100, cuDNN, rows of 2048 tokens: 333 of 989 TFLOP/s"))
STREAM = Factor(0.87, 0.80, 0.92, N_("H100: 3.0 of 3.35 TB/s; published for RTX A5000: 660 of 768 GB/s"))
EAGER = Factor(0.65, 0.50, 0.80, N_("many small eager kernels; fitted to 5,157 tokens/s of an 8B QLoRA on an H100"))
DEQUANTISE = Factor(0.54, 0.45, 0.65, N_("H100, bitsandbytes: 14336 x 4096 to bf16 in 0.081 ms"))
PCIE = Factor(0.80, 0.60, 0.85, N_("published: 25 to 26 of 32 GB/s one way with PCIe 4.0 x16; H100: 55 of 64"))
PCIE_NO_P2P = Factor(0.31, 0.25, 0.40, N_("published: 8 to 12 of 32 GB/s through the host's memory"))
NVLINK = Factor(0.80, 0.65, 0.90, N_("published: 101.6 of 112.5 GB/s both ways for a pair of GA102"))
NETWORK = Factor(0.80, 0.50, 0.95, N_("an estimate: what a stream keeps of an interface's rate"))
# Seconds of the host for one operation of eager PyTorch, and for what surrounds a micro-batch and a step.
HOST_OPERATION = Factor(20e-6, 35e-6, 10e-6, N_("two machines with an H100: 20 and 26 microseconds"))
HOST_MICRO_BATCH = Factor(2e-3, 10e-3, 1e-3, N_("H100, fitted to 50 points of benchmarks/planner_grid.py"))
HOST_STEP = Factor(14e-3, 40e-3, 7e-3, N_("same measurement"))
HOST_MEMORY_GB_S = Factor(40.0, 25.0, 120.0, N_("two channels of DDR4 to eight; not probed"))
CPU_FLOPS_PER_CORE = {
    "fp32": Factor(60e9, 15e9, 130e9, N_("one core with AVX2 or AVX-512 in fp32; estimate")),
    "bf16": Factor(140e9, 20e9, 350e9, N_("EPYC, 2 cores, AVX-512: 3,000 tokens/s of the bundled model trained whole")),
}
CPU_PEAK_PER_CORE = 500e9
UNKNOWN_TFLOPS, UNKNOWN_GB_S = 40.0, 400.0
_LINK_NAMES = {"nvlink": "NVLink", "pcie": "PCIe", "network": "the network"}


@dataclass(frozen=True)
class Measured:
    """A device's measured rates as a plan uses them: in its arithmetic and in its 8 bits (`eight`, with its sheet's
    peak), off by `spread` in one case of its range, and the `share` of them that a process has.
    """

    profile: DeviceProfile
    arithmetic: str
    spread: float
    share: float = 1.0
    eight: str = ""
    eight_peak: float = math.inf

    def products(self, arithmetic: str, rows: float, found: Sequence[tuple[float, float]]) -> float:
        """TFLOP/s of products with so many `(weights, width)`, by the time each takes; 0 where not measured."""
        taken = [(weights, self.profile.product_tflops(arithmetic, rows, width)) for weights, width in found]
        if not taken or not all(rate for _, rate in taken):
            return 0.0
        return sum(weights for weights, _ in taken) / sum(weights / rate for weights, rate in taken)


@dataclass(frozen=True)
class Rates:
    """Rates of one device: FLOP/s by kind of work, bytes/s by kind of traffic, seconds of its host. `peak_flops` is the
    sheet's dense rate in the arithmetic of the plan, `peak_eight` that in 8 bits, `even` of attention over examples of
    one length. What was `measured` has rates by size
    (`sized`).
    """

    peak_flops: float
    peak_eight: float
    gemm: float
    eight: float
    skinny: float
    grouped: float
    attention_forward: float
    attention_backward: float
    even_forward: float
    even_backward: float
    stream: float
    eager: float
    dequantise: float
    host_copy: float
    host_memory: float
    operation: float
    micro_batch: float
    step: float
    measured: Measured | None = field(default=None, compare=False)

    def sized(
        self, rows: float, products: Iterable[tuple[float, float]], length: float, kind: AttentionKind = "attention"
    ) -> Rates:
        """The rates for products of `rows` with matrices of so many `(weights, width)`, the width that of a square one,
        and for attention of a kind over examples of `length` tokens. Where they were not measured by size, the same for
        all.
        """
        known = self.measured
        if known is None:
            if kind != "even":
                return self
            return replace(self, attention_forward=self.even_forward, attention_backward=self.even_backward)
        found = list(products)
        forward, backward = known.profile.attention_tflops(length, kind)
        rates = {"gemm": known.products(known.arithmetic, rows, found)}
        rates |= {"attention_forward": forward, "attention_backward": backward}
        changed: dict[str, Any] = _flops(rates, known, self.peak_flops)
        changed |= _flops({"eight": known.products(known.eight, rows, found)}, known, known.eight_peak)
        return replace(self, **changed)


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
        peak_eight=_eight_peak(device, peak),
        gemm=peak * GEMM.at(case),
        eight=_eight_peak(device, peak) * EIGHT[kind].at(case),
        skinny=peak * SKINNY.at(case),
        grouped=peak * GROUPED.at(case),
        attention_forward=peak * FLASH_FORWARD[kind].at(case),
        attention_backward=peak * FLASH_BACKWARD[kind].at(case),
        even_forward=peak * (CUDNN_FORWARD if kind == 9 else FLASH_FORWARD[kind]).at(case),
        even_backward=peak * (CUDNN_BACKWARD if kind == 9 else FLASH_BACKWARD[kind]).at(case),
        stream=bandwidth * STREAM.at(case),
        eager=bandwidth * EAGER.at(case),
        dequantise=bandwidth * DEQUANTISE.at(case),
        host_copy=bus * GIGA * PCIE.at(case),
        host_memory=HOST_MEMORY_GB_S.at(case) * GIGA,
        operation=HOST_OPERATION.at(case),
        micro_batch=HOST_MICRO_BATCH.at(case),
        step=HOST_STEP.at(case),
    )
    found = profile.device(device.name) if profile else None
    if found is None:
        return rates
    if not device.bf16_tflops and found.products:  # not in the table: no more than what was seen is known
        best = max(rate for table in found.products.values() for rate in table.values())
        rates = replace(rates, peak_flops=best * TERA)
    eight, eight_peak = "fp8" if 9.0 <= device.sm < 12.0 else "int8", _eight_peak(device, math.inf)
    return _measured(rates, Measured(found, precision, MEASURED_SPREAD[case], eight=eight, eight_peak=eight_peak))


def _peak(device: Device, precision: Precision) -> float:
    rate = device.fp16_tflops if precision == "fp16" else device.bf16_tflops or device.fp16_tflops
    return (rate or UNKNOWN_TFLOPS) * TERA / (8 if precision == "fp32" else 1)


def _eight_peak(device: Device, otherwise: float) -> float:
    """FLOP/s of products in 8 bits, FP8 or INT8, whichever the device trains in."""
    rate = device.fp8_tflops if device.sm >= 9 and device.fp8_tflops else device.int8_tops
    return rate * TERA if rate else otherwise


# A measured rate holds for the shapes that were measured, on a hot card: this much is left open.
MEASURED_SPREAD = {"likely": 1.0, "low": 0.92, "high": 1.06}
# What a rate without a size stands for: rows, width, length.
USUAL_SIZES = (8192.0, ((1.0, 4096.0),), 2048.0)


def _measured(rates: Rates, known: Measured) -> Rates:
    """The rates with those that were measured in their place."""
    profile = known.profile
    flops = {"skinny": profile.skinny_tflops, "grouped": profile.grouped_tflops}
    traffic = {
        "stream": profile.stream_gb_s,
        "eager": profile.eager_gb_s,
        "dequantise": profile.dequantise_gb_s,
        "host_copy": profile.host_copy_gb_s,
        "host_memory": profile.host_memory_gb_s,
    }
    changed: dict[str, Any] = _flops(flops, known, rates.peak_flops)
    changed |= {name: value * GIGA * known.spread * known.share for name, value in traffic.items() if value}
    if profile.operation_seconds:
        changed["operation"] = profile.operation_seconds / known.spread
    return replace(rates, **changed, measured=known).sized(*USUAL_SIZES)


def _flops(found: dict[str, float], known: Measured, peak: float) -> dict[str, float]:
    """TFLOP/s that were measured as FLOP/s, never above the sheet's."""
    scale = TERA * known.spread * known.share
    return {name: min(value * scale, peak) for name, value in found.items() if value}


def cpu_rates(
    hardware: Hardware, precision: Precision, case: str = "likely", processes: int = 1, profile: Profile | None = None
) -> Rates:
    """The rates of a CPU, shared by several processes, a profile's where it has this CPU."""
    cores = max(1.0, hardware.cpu_cores / processes)
    flops = cores * CPU_FLOPS_PER_CORE["bf16" if precision == "bf16" else "fp32"].at(case)
    memory = HOST_MEMORY_GB_S.at(case) * GIGA * hardware.hosts / processes / 2
    rates = Rates(
        peak_flops=cores * CPU_PEAK_PER_CORE,
        peak_eight=cores * CPU_PEAK_PER_CORE,
        gemm=flops,
        eight=flops / 20,
        skinny=flops / 2,
        grouped=flops / 2,
        attention_forward=flops,
        attention_backward=flops,
        even_forward=flops,
        even_backward=flops,
        stream=memory,
        eager=memory,
        dequantise=memory / 10,
        host_copy=memory,
        host_memory=memory,
        operation=HOST_OPERATION.at(case) / 2,
        micro_batch=HOST_MICRO_BATCH.at(case),
        step=HOST_STEP.at(case),
    )
    found = profile.device(cpu_key(hardware.cpu_name, hardware.cpu_cores)) if profile else None
    return (
        rates if found is None else _measured(rates, Measured(found, precision, MEASURED_SPREAD[case], 1 / processes))
    )


def link_rates(hardware: Hardware, count: int, case: str = "likely", profile: Profile | None = None) -> LinkRates:
    """What a ring of the first `count` devices runs at: as measured, else as its slowest link between neighbours.

    >>> from kitaeru.hardware import parse_gpus
    >>> [round(link_rates(parse_gpus(text), 2).bytes_s / 1e9) for text in ("2x RTX A5000", "2x RTX A5000, nvlink")]
    [26, 45]
    """
    if hardware.hosts > 1:  # a ring is as slow as what joins its hosts, and they were not measured together
        network = (hardware.network_gb_s or NETWORK_GB_S) / 2 * GIGA * NETWORK.at(case)
        return LinkRates(network, 60e-6, _LINK_NAMES["network"])
    ring = f"{'cuda' if hardware.devices else 'cpu'}-{count}"
    if profile and profile.rings.get(ring):
        name = hardware.links[0].kind if hardware.links else "RAM"
        bytes_s = profile.rings[ring] * GIGA * MEASURED_SPREAD[case]
        return LinkRates(bytes_s, profile.latencies.get(ring) or 20e-6, _LINK_NAMES.get(name, name), measured=True)
    slowest: LinkRates | None = None
    for link in hardware.links:
        if link.b >= count or link.b - link.a not in (1, count - 1):
            continue
        measured = profile.link(link.a, link.b) if profile else None
        if measured:
            now = LinkRates(measured * GIGA * MEASURED_SPREAD[case], 20e-6, _LINK_NAMES[link.kind], measured=True)
        elif link.kind == "nvlink":
            now = LinkRates(link.gb_s / 2 * GIGA * NVLINK.at(case), 15e-6, "NVLink")
        else:
            p2p = hardware.devices[link.a].p2p and hardware.devices[link.b].p2p
            factor = PCIE if p2p else PCIE_NO_P2P
            now = LinkRates((link.gb_s or 32.0) / 2 * GIGA * factor.at(case), 30e-6, "PCIe")
        if slowest is None or now.bytes_s < slowest.bytes_s:
            slowest = now
    return slowest or LinkRates(HOST_MEMORY_GB_S.at(case) / 4 * GIGA, 100e-6, "RAM")
