"""What can be wrong with a machine: one table of checks, each a pure function from facts and trials to findings.

A new ailment is a function and a row in `AILMENTS`. Sources of the causes and remedies: NVIDIA's NCCL documentation
(troubleshooting, environment variables), the driver's README, and the threads named in the docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kitaeru.i18n import tr
from kitaeru.machine.ailments import card, host, link, software
from kitaeru.machine.facts import Facts
from kitaeru.machine.findings import Finding, Unseen
from kitaeru.machine.trials import Trials

Check = Callable[[Facts, Trials], Iterator[Finding]]

AILMENTS: tuple[Check, ...] = (
    software.driver_missing,
    software.driver_mismatch,
    software.nouveau_loaded,
    software.card_lost,
    software.cards_hidden,
    software.torch_broken,
    software.torch_without_cuda,
    software.torch_newer_than_driver,
    software.torch_without_kernels,
    software.cuda_does_not_start,
    software.exclusive_mode,
    software.mig_on,
    software.cards_in_use,
    card.memory_errors,
    card.power_limited,
    card.too_hot,
    card.power_brake,
    card.persistence_off,
    link.narrow_link,
    link.slow_link,
    link.bad_signal,
    link.nvlink_down,
    link.no_direct_copies,
    link.copies_redirected,
    link.copies_wrong,
    link.direct_copies_slow,
    link.sums_fail,
    link.better_environment,
    link.left_over_environment,
    host.small_shared_memory,
    host.small_memlock,
    host.few_files,
    host.memory_capped,
    host.little_memory,
    host.few_cores,
    host.strict_overcommit,
    host.few_processes,
    host.sleepy_cpu,
    host.no_localhost,
    host.little_disk,
    host.unwritable_folders,
    host.wrong_libraries,
    host.slow_bf16,
    host.unequal_cards,
)


def findings(facts: Facts, trials: Trials) -> list[Finding]:
    """Everything that is wrong, failures first, else in the order of `AILMENTS`."""
    found = [finding for check in AILMENTS for finding in check(facts, trials)]
    return sorted(found, key=lambda finding: ("failure", "warning", "note").index(finding.level))


def unseen(facts: Facts, trials: Trials) -> list[Unseen]:
    """What could not be looked at here, and why."""
    found = []
    usable = len(facts.usable)
    if not facts.gpus:
        reason = facts.driver_error or tr("the driver knows no card")
        found.append(Unseen(tr("GPUs: memory errors, power, heat, PCIe links"), reason))
    if usable < 2:
        reason = tr("it takes two usable GPUs; here are {count}", count=usable)
        found.append(Unseen(tr("copies between cards, NCCL"), reason))
    if usable > 1 and facts.acs_bridges is None:
        found.append(Unseen(tr("ACS of the PCIe bridges"), tr("only root may read it: run `sudo kitaeru doctor`")))
    found += [
        Unseen(tr("PCIe link of GPU {gpu} at load", gpu=load.gpu), load.error) for load in trials.loads if load.error
    ]
    found += [
        Unseen(tr("direct copy between GPU {a} and GPU {b}", a=copy.a, b=copy.b), copy.error)
        for copy in trials.copies
        if copy.error and copy.direct and copy.a < copy.b
    ]
    if facts.shm_bytes is None:
        found.append(Unseen("/dev/shm", tr("it is not mounted")))
    return found
