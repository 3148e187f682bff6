"""What joins the cards with the host and with each other."""

from __future__ import annotations

from collections.abc import Iterator

from kitaeru.hardware import pcie_gb_s
from kitaeru.i18n import tr
from kitaeru.machine.facts import Facts
from kitaeru.machine.findings import DOCKER_RUN, Finding, Level
from kitaeru.machine.trials import Sum, Trials

# A link at less than this share of its sheet rate (one direction) is held back by something.
_LINK_SHARE = 0.45


def narrow_link(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """Fewer lanes than the card has, or an older generation while copying (an idle link sleeps)."""
    loads = {load.gpu: load for load in trials.loads if not load.error}
    for gpu in facts.usable:
        load = loads.get(gpu.usable if gpu.usable is not None else -1)
        width = load.width if load and load.width else gpu.pcie_width
        generation = load.generation if load else 0
        if 0 < width < gpu.pcie_width_most:
            yield Finding(
                "pcie-width",
                "warning",
                tr(
                    "{gpu} is connected with {width} of its {most} PCIe lanes.",
                    gpu=gpu.title,
                    width=width,
                    most=gpu.pcie_width_most,
                ),
                tr(
                    "Copies to it take as many times longer. Another slot, a seated card or the firmware's "
                    "bifurcation mend it."
                ),
                "sudo lspci -vv | grep -E 'NVIDIA|LnkSta:'",
            )
        if 0 < generation < gpu.pcie_generation_most:
            yield Finding(
                "pcie-generation",
                "warning",
                tr(
                    "{gpu} copies over PCIe {generation}.0; it and its slot can do {most}.0.",
                    gpu=gpu.title,
                    generation=generation,
                    most=gpu.pcie_generation_most,
                ),
                tr("Each generation doubles the speed. A riser cable or a firmware setting holds it back."),
                "sudo lspci -vv | grep -E 'NVIDIA|LnkSta:'",
            )


def slow_link(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """A link whose lanes and generation are right and which is slow all the same."""
    for load in trials.loads:
        sheet = pcie_gb_s(load.generation, load.width) / 2
        measured = min(load.to_gb_s, load.from_gb_s)
        if not load.error and sheet and measured < _LINK_SHARE * sheet:
            yield Finding(
                "pcie-slow",
                "warning",
                tr(
                    "GPU {gpu} copies {measured:.1f} GB/s over a link of {sheet:.0f} GB/s.",
                    gpu=load.gpu,
                    measured=measured,
                    sheet=sheet,
                ),
                tr(
                    "Another device shares the link, the memory lies at another socket, or the CPU sleeps between "
                    "copies."
                ),
                "nvidia-smi topo -m ; sudo cpupower frequency-set -g performance",
            )


def bad_signal(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Packets that had to be sent again."""
    for gpu in facts.gpus:
        if gpu.pcie_replays > 1000:
            yield Finding(
                "pcie-errors",
                "warning",
                tr("{gpu}: {count} PCIe packets had to be sent again.", gpu=gpu.title, count=gpu.pcie_replays),
                tr("The signal is bad: a riser cable or a slot. Copies are slower, and the card may fall off the bus."),
                f"nvidia-smi -i {gpu.index} -q | grep -i replay ; sudo dmesg | grep -i aer",
            )


def nvlink_down(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Some links of a bridge are up and others are not."""
    for gpu in facts.gpus:
        if gpu.nvlinks_up and gpu.nvlinks_down:
            yield Finding(
                "nvlink-down",
                "warning",
                tr(
                    "{gpu}: {down} of {all} NVLinks are down.",
                    gpu=gpu.title,
                    down=gpu.nvlinks_down,
                    all=gpu.nvlinks_up + gpu.nvlinks_down,
                ),
                tr("The bridge is not seated well, or its partner is reset: the cards exchange data that much slower."),
                f"nvidia-smi nvlink -s -i {gpu.index}",
            )


def no_direct_copies(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Pairs whose direct copies the driver refuses for a reason that lies in the machine, not in the cards."""
    places = {1: tr("the chipset"), 3: tr("the way between the sockets"), 4: tr("a setting of the driver")}
    usable = {gpu.index for gpu in facts.usable}
    for (a, b), status in facts.p2p.items():
        if status in places and {a, b} <= usable:
            yield Finding(
                "no-p2p",
                "note",
                tr("GPU {a} and GPU {b} cannot copy directly: {place} does not allow it.", a=a, b=b,
                   place=places[status]),
                tr("They exchange data through the host's memory, at about a third of the speed of the link."),
                "nvidia-smi topo -m   # " + tr("two slots of one CPU are best")
                if status != 4
                else "grep -rn NVreg_RegistryDwords /etc/modprobe.d",
            )  # fmt: skip


def copies_redirected(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """ACS on a bridge, or an IOMMU that translates: P2P copies go astray or hang (nccl 2079, nccl 631)."""
    if len(facts.usable) < 2:
        return
    direct = [s for s in trials.sums if s.transport == "p2p"]
    harmless = bool(direct) and all(s.good for s in direct) and all(c.gb_s > 0 or c.error for c in trials.copies)
    level: Level = "note" if harmless else "warning"
    if facts.acs_bridges:
        yield Finding(
            "acs",
            level,
            tr("{count} PCIe bridges send copies between cards up to the CPU (ACS).", count=len(facts.acs_bridges)),
            tr("Direct copies become slow, or hang for ever in the first all-reduce."),
            "for b in "
            + " ".join(facts.acs_bridges)
            + "; do sudo setpci -s $b ECAP_ACS+6.w=0000; done   # "
            + tr("for good: switch ACS off in the firmware"),
        )
    if facts.translated:
        yield Finding(
            "iommu",
            level,
            tr("The IOMMU translates the addresses of {count} GPU(s).", count=len(facts.translated)),
            tr("Direct copies between cards become slow, or arrive with wrong content."),
            "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&iommu=pt /' /etc/default/grub && sudo update-grub && sudo reboot",
        )


def copies_wrong(_: Facts, trials: Trials) -> Iterator[Finding]:
    """A direct copy that arrives changed, or does not end."""
    for copy in trials.copies:
        if copy.wrong or copy.hung:
            pair = f"GPU {copy.a} → GPU {copy.b}"
            way = tr("direct") if copy.direct else tr("through the host")
            what = tr("The copy {pair} ({way}) does not end.", pair=pair, way=way)
            if copy.wrong:
                what = tr("The copy {pair} ({way}) arrives with wrong content.", pair=pair, way=way)
            yield Finding(
                "copy-hangs" if copy.hung else "copy-wrong",
                "failure",
                what,
                tr(
                    "Training over it hangs, or learns from wrong numbers. An IOMMU or ACS in between is the usual "
                    "cause."
                ),
                "export NCCL_P2P_DISABLE=1" if copy.direct else "sudo dmesg | grep -iE 'xid|iommu|dmar'",
            )


def direct_copies_slow(_: Facts, trials: Trials) -> Iterator[Finding]:
    """P2P "works" and is slower than the way around through the host (ml-engineering 1)."""
    around = {(c.a, c.b): c.gb_s for c in trials.copies if not c.direct and not c.error}
    slow = [c for c in trials.copies if c.direct and c.gb_s and not c.wrong and c.gb_s < around.get((c.a, c.b), 0.0)]
    if slow:
        copy = slow[0]
        yield Finding(
            "p2p-slow",
            "warning",
            tr(
                "GPU {a} → GPU {b}: {direct:.1f} GB/s directly, {around:.1f} GB/s through the host.",
                a=copy.a,
                b=copy.b,
                direct=copy.gb_s,
                around=around[copy.a, copy.b],
            ),
            tr("NCCL takes the direct way because it exists, and every step waits for it."),
            "export NCCL_P2P_DISABLE=1",
        )


def sums_fail(_: Facts, trials: Trials) -> Iterator[Finding]:
    """An all-reduce that hangs, fails or is wrong: a failure where NCCL would take that way, or none works."""
    good = [s for s in trials.sums if s.good and s.backend == "nccl"]
    for tried in trials.sums:
        if tried.good:
            continue
        own = tried.transport in ("default", "cpu") or not good
        name = f"{tried.backend} ({tried.transport})"
        yield Finding(
            "allreduce-hangs" if tried.hung else "allreduce-wrong" if tried.wrong else "allreduce-fails",
            "failure" if own else "note",
            _sum_fault(tried, name),
            tr("Training on several devices does this after every step."),
            _sum_remedy(tried, good),
        )


def _sum_fault(tried: Sum, name: str) -> str:
    if tried.hung:
        return tr("An all-reduce over {name} does not end.", name=name)
    if tried.wrong:
        return tr("An all-reduce over {name} gives a wrong sum.", name=name)
    return tr("An all-reduce over {name} fails: {reason}", name=name, reason=tried.error)


def _sum_remedy(tried: Sum, good: list[Sum]) -> str:
    if tried.transport in ("p2p", "default") and good:
        return "export NCCL_P2P_DISABLE=1"
    if tried.transport == "shm":
        return DOCKER_RUN
    if tried.backend == "gloo":
        return "export GLOO_SOCKET_IFNAME=lo"
    return "NCCL_DEBUG=INFO kitaeru doctor ; sudo dmesg | grep -iE 'xid|iommu'"


def better_environment(_: Facts, trials: Trials) -> Iterator[Finding]:
    """Another transport than NCCL's own choice proved clearly faster."""
    own = next((s for s in trials.sums if s.transport == "default" and s.good), None)
    best = trials.fastest
    if own and best and trials.environment and best.gb_s > 1.1 * own.gb_s:
        yield Finding(
            "nccl-choice",
            "warning",
            tr(
                "NCCL's own choice moves {own:.1f} GB/s; {transport} moves {best:.1f} GB/s.",
                own=own.gb_s,
                transport=best.transport,
                best=best.gb_s,
            ),
            tr("Every step on several devices waits for it."),
            "export " + " ".join(f"{k}={v}" for k, v in trials.environment.items()),
        )


def left_over_environment(facts: Facts, trials: Trials) -> Iterator[Finding]:
    """Variables that were the remedy of another day."""
    reasons = {
        "CUDA_LAUNCH_BLOCKING": tr("The CPU waits for every single kernel: for debugging only."),
        "NCCL_SHM_DISABLE": tr("Cards exchange data over sockets where they cannot do so directly."),
        "TORCH_NCCL_BLOCKING_WAIT": tr("The CPU waits for every collective, and nothing overlaps."),
    }
    for name, why in reasons.items():
        if facts.environment.get(name, "0") not in ("", "0"):
            yield Finding(
                "environment",
                "warning",
                tr("{name} is set in the environment.", name=f"{name}={facts.environment[name]}"),
                why,
                f"unset {name}",
            )
    direct = [s for s in trials.sums if s.transport in ("p2p", "default") and "P2P" in s.used and s.good]
    around = max((s.gb_s for s in trials.sums if s.transport == "shm" and s.good), default=0.0)
    if facts.environment.get("NCCL_P2P_DISABLE", "0") not in ("", "0") and direct and direct[0].gb_s > 1.1 * around:
        yield Finding(
            "p2p-switched-off",
            "warning",
            tr("NCCL_P2P_DISABLE is set, and direct copies work here."),
            tr(
                "They move {direct:.1f} GB/s instead of {around:.1f} GB/s.",
                direct=direct[0].gb_s,
                around=around,
            ),
            "unset NCCL_P2P_DISABLE",
        )
