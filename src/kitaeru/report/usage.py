"""What a run used: devices, power, money, and where the time of its steps went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

from kitaeru.events import Devices, Reading, Step
from kitaeru.i18n import tr
from kitaeru.recipe.types import TrackSection
from kitaeru.report.history import History
from kitaeru.report.wording import bytes_text, percent_text

# Two looks further apart than so many usual intervals had a pause between them (a run that was resumed).
_PAUSE = 5.0


@dataclass(frozen=True)
class Used:
    """One device over a run: means, and the highest memory and temperature. None: not known."""

    host: str
    device: str
    name: str
    used: bool
    utilisation: float | None
    memory_bytes: float | None
    memory_total_bytes: int | None
    watts: float | None
    celsius: float | None
    clock_share: float | None
    pcie_bytes_s: float | None
    throttled: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Energy of a run. `watts` is the mean power that was counted; money is None without a price."""

    watts: float
    joules: float
    tokens: int
    per_million: float | None
    whole: float | None
    currency: str

    @property
    def kilowatt_hours(self) -> float:
        """The energy, as it is paid for."""
        return self.joules / 3.6e6

    @property
    def tokens_per_joule(self) -> float:
        """How far a joule goes."""
        return self.tokens / self.joules if self.joules else 0.0


def device_text(device: str) -> str:
    """What a device is called.

    >>> device_text("0"), device_text("host")
    ('GPU 0', 'CPU')
    """
    return "CPU" if device == "host" else f"GPU {device}"


def reading_text(reading: Reading) -> str:
    """A reading on one line: what is known of it.

    >>> reading_text(Reading(device="0", name="A", utilisation=0.97, memory_bytes=20 * 10**9, watts=225.0))
    '97 % · 20.0 GB · 225 W'
    """
    parts = []
    if reading.utilisation is not None:
        parts.append(f"{100 * reading.utilisation:.0f} %")
    if reading.memory_bytes is not None:
        whole = f" / {bytes_text(reading.memory_total_bytes)}" if reading.memory_total_bytes else ""
        parts.append(bytes_text(reading.memory_bytes) + whole)
    if reading.watts is not None:
        parts.append(f"{reading.watts:.0f} W")
    if reading.celsius is not None:
        parts.append(f"{reading.celsius:.0f} °C")
    if reading.clock_share is not None:
        parts.append(tr("clock {share}", share=f"{100 * reading.clock_share:.0f} %"))
    traffic = [v for v in (reading.pcie_to_bytes_s, reading.pcie_from_bytes_s) if v is not None]
    if traffic:
        parts.append(f"PCIe {bytes_text(sum(traffic))}/s")
    return " · ".join([*parts, *reading.throttles]) or "—"


def devices_used(past: History) -> list[Used]:
    """Each device of each host, in the order they were first seen."""
    found: dict[tuple[str, str], list[Reading]] = {}
    for look in past.of(Devices):
        for reading in look.readings:
            found.setdefault((look.host, reading.device), []).append(reading)
    return [_used(host, readings) for (host, _), readings in found.items()]


def _used(host: str, readings: Sequence[Reading]) -> Used:
    last = readings[-1]
    traffic = [
        sum(v for v in (r.pcie_to_bytes_s, r.pcie_from_bytes_s) if v is not None)
        for r in readings
        if r.pcie_to_bytes_s is not None or r.pcie_from_bytes_s is not None
    ]
    reasons = {reason for reading in readings for reason in reading.throttles}
    return Used(
        host=host,
        device=last.device,
        name=last.name,
        used=any(r.used for r in readings),
        utilisation=_mean(r.utilisation for r in readings),
        memory_bytes=max((r.memory_bytes for r in readings if r.memory_bytes is not None), default=None),
        memory_total_bytes=last.memory_total_bytes,
        watts=_mean(r.watts for r in readings),
        celsius=max((r.celsius for r in readings if r.celsius is not None), default=None),
        clock_share=_mean(r.clock_share for r in readings),
        pcie_bytes_s=_mean(traffic),
        throttled={reason: mean(reason in r.throttles for r in readings) for reason in sorted(reasons)},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return mean(told) if told else None


def cost(past: History, track: TrackSection) -> Cost | None:
    """What the steps took, in energy and in money; None when nobody could tell the power.

    Power is the sum over the devices that can be asked, between two looks their mean, on all hosts; `machine_watts` of
    the recipe comes on top for each host. The time is that of the steps.
    """
    by_host: dict[str, list[Devices]] = {}
    for look in past.of(Devices):
        by_host.setdefault(look.host, []).append(look)
    powers = [watts for looks in by_host.values() if (watts := _mean_watts(looks)) is not None]
    hosts = max(1, len(by_host))
    watts = sum(powers) + hosts * track.machine_watts
    seconds = sum(step.seconds for step in past.steps)
    if not watts or not seconds or not past.tokens:
        return None
    joules = watts * seconds
    money = None if track.power_price is None else joules / 3.6e6 * track.power_price
    per_million = None if money is None else money / past.tokens * 1e6
    return Cost(watts, joules, past.tokens, per_million, money, track.currency)


def _mean_watts(looks: Sequence[Devices]) -> float | None:
    """The mean over time, pauses left out."""
    told = [(look.time, look.watts) for look in looks if look.watts is not None]
    if len(told) < 2:
        return told[0][1] if told else None
    gaps = [b[0] - a[0] for a, b in pairwise(told)]
    usual = median(gaps)
    joules = seconds = 0.0
    for ((_, first), (_, second)), gap in zip(pairwise(told), gaps, strict=True):
        if 0 < gap <= _PAUSE * usual:
            joules += gap * (first + second) / 2
            seconds += gap
    return joules / seconds if seconds else told[-1][1]


def money_text(amount: float, currency: str) -> str:
    """An amount with its currency.

    >>> money_text(12.345, "JPY"), money_text(0.0123, "USD"), money_text(1234.5, "EUR")
    ('¥12.3', '$0.0123', '€1,234')
    """
    sign = {"JPY": "¥", "USD": "$", "EUR": "€", "GBP": "£"}.get(currency.upper(), f"{currency} ")
    return sign + (f"{amount:,.0f}" if amount >= 1000 else f"{amount:.3g}")


def mfu(past: History) -> float | None:
    """The share of the devices' peak spent on arithmetic that training cannot do without; None where not known."""
    rate = past.started.mfu_of_rate if past.started else 0.0
    return rate * past.tokens_per_second if rate and past.steps else None


def time_shares(steps: Sequence[Step]) -> dict[str, float]:
    """Where the steps' time went, as shares that sum to one: own passes (the mean of the ranks), data, waiting for the
    gradients of others, and the rest (the update, the clock's own). Empty where it was not measured.
    """
    told = [step for step in steps if step.rank_seconds and step.seconds > 0]
    whole = sum(step.seconds for step in told)
    if not whole:
        return {}
    own = sum(mean(step.rank_seconds) for step in told) / whole
    data = min(sum(step.data_seconds for step in told) / whole, max(0.0, 1 - own))
    wait = min(sum(step.wait_seconds for step in told) / whole, max(0.0, 1 - own - data))
    return {"passes": own, "data": data, "wait": wait, "rest": max(0.0, 1 - own - data - wait)}


def share_text(name: str) -> str:
    """A part of the time, in words."""
    return {
        "passes": tr("forward and backward passes"),
        "data": tr("putting data together"),
        "wait": tr("waiting for other devices"),
        "rest": tr("update and the rest"),
    }[name]


def waits_text(step: Step) -> str:
    """Data and waiting of one step, for a small display."""
    return tr(
        "data {data}, others {others}",
        data=percent_text(step.data_seconds / step.seconds),
        others=percent_text(step.wait_seconds / step.seconds),
    )
