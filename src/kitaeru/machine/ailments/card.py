"""The health of a card."""

from __future__ import annotations

from collections.abc import Iterator

from kitaeru.i18n import tr
from kitaeru.machine.facts import Facts
from kitaeru.machine.findings import Finding
from kitaeru.machine.trials import Trials


def memory_errors(facts: Facts, _: Trials) -> Iterator[Finding]:
    """ECC errors that were not corrected, and rows that wait to be remapped."""
    for gpu in facts.gpus:
        if gpu.remap_failed:
            yield Finding(
                "memory-remap-failed",
                "failure",
                tr("{gpu} could not replace a defective row of its memory.", gpu=gpu.title),
                tr(
                    "It has no spare rows left where they are needed: results may be wrong. The card is to be "
                    "exchanged."
                ),
                f"nvidia-smi -i {gpu.index} -q -d ROW_REMAPPER",
            )
        elif gpu.remap_pending:
            yield Finding(
                "memory-remap-pending",
                "failure",
                tr("{gpu} has a defective memory row that is replaced at the next reset.", gpu=gpu.title),
                tr("Until then it is in use, and results may be wrong."),
                f"sudo nvidia-smi -i {gpu.index} --gpu-reset",
            )
        if gpu.ecc_uncorrected:
            yield Finding(
                "memory-errors",
                "failure",
                tr(
                    "{gpu} has had {count} memory errors that could not be corrected since it was started.",
                    gpu=gpu.title,
                    count=gpu.ecc_uncorrected,
                ),
                tr("Programs on it are ended, or compute with wrong numbers."),
                f"nvidia-smi -i {gpu.index} -q -d ECC ; sudo nvidia-smi -i {gpu.index} --gpu-reset",
            )


def power_limited(facts: Facts, _: Trials) -> Iterator[Finding]:
    """A power limit well below the card's own."""
    for gpu in facts.usable:
        limit, usual = gpu.watts_limit, gpu.watts_default
        if limit and usual and limit < 0.9 * usual:
            yield Finding(
                "power-limit",
                "warning",
                tr("{gpu} may take {limit:.0f} W of its {usual:.0f} W.", gpu=gpu.title, limit=limit, usual=usual),
                tr(
                    "Its clock falls under load. If it is meant to be quiet or cool, leave it so: watts fall faster "
                    "than speed."
                ),
                f"sudo nvidia-smi -i {gpu.index} -pl {usual:.0f}",
            )


def too_hot(facts: Facts, _: Trials) -> Iterator[Finding]:
    """Held down by heat, or close to it."""
    for gpu in facts.usable:
        near = gpu.celsius is not None and gpu.celsius_slowdown and gpu.celsius >= gpu.celsius_slowdown - 5
        if near or "thermal" in gpu.throttles:
            yield Finding(
                "too-hot",
                "warning",
                tr(
                    "{gpu} is {celsius} °C hot; it slows down at {limit} °C.",
                    gpu=gpu.title,
                    celsius=gpu.celsius if gpu.celsius is not None else "?",
                    limit=gpu.celsius_slowdown or "?",
                ),
                tr("A hot card lowers its clock by a third or more. Clean the fans, leave a slot free between cards."),
                f"nvidia-smi -i {gpu.index} -q -d TEMPERATURE,PERFORMANCE",
            )


def power_brake(facts: Facts, _: Trials) -> Iterator[Finding]:
    """The power supply asks the card to slow down."""
    for gpu in facts.usable:
        if "power brake" in gpu.throttles or ("hardware" in gpu.throttles and "thermal" not in gpu.throttles):
            yield Finding(
                "power-brake",
                "warning",
                tr("{gpu} is held at a low clock by its power supply.", gpu=gpu.title),
                tr(
                    "A cable is missing or shared, or the supply is too weak for all cards: they run at a fraction of "
                    "their speed."
                ),
                f"nvidia-smi -i {gpu.index} -q -d PERFORMANCE,POWER",
            )


def persistence_off(facts: Facts, _: Trials) -> Iterator[Finding]:
    """The driver is unloaded between programs."""
    if facts.gpus and not facts.contained and any(gpu.persistence is False for gpu in facts.gpus):
        yield Finding(
            "persistence-off",
            "note",
            tr("Persistence mode is off."),
            tr("Each start of a program waits a second or more until the driver has woken the cards."),
            "sudo nvidia-smi -pm 1",
        )
