"""The section of the report about devices: how busy they were, what they drew, where the time of the steps went."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from kitaeru.events import Devices, Reading
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan
from kitaeru.recipe.types import TrackSection
from kitaeru.report.chart import Chart, Series, figure
from kitaeru.report.history import History
from kitaeru.report.markup import bars, card, section, table
from kitaeru.report.usage import (
    Cost,
    Used,
    cost,
    device_text,
    devices_used,
    mfu,
    money_text,
    share_text,
    time_shares,
)
from kitaeru.report.wording import bytes_text, clean, count_text, number_text, percent_text

_Value = Callable[[Reading], float | None]


def usage(past: History, plan: Plan | None) -> str:
    """Devices, power, money and time; empty when nothing of it was measured."""
    shares = time_shares(past.steps)
    used = devices_used(past)
    if not shares and not used:
        return ""
    track = plan.recipe.track if plan else TrackSection()
    cards = "".join(_cards(past, shares, cost(past, track)))
    parts = [f'<div class="cards">{cards}</div>' if cards else ""]
    if shares:
        counts = {share_text(name): round(1000 * share) for name, share in shares.items()}
        parts.append(bars(tr("Where the time of the steps went"), counts, lambda value: percent_text(value / 1000)))
    if used:
        parts.append(f"<h3>{escape(tr('Devices'))}</h3>" + _table(used))
        parts.append(f'<div class="charts">{"".join(map(figure, _charts(past)))}</div>')
    return section(tr("Devices, power and time"), "".join(parts))


def _cards(past: History, shares: dict[str, float], spent: Cost | None) -> list[str]:
    found = []
    share = mfu(past)
    if share is not None:
        found.append(card("MFU", percent_text(share), tr("of the devices' peak, on what cannot be left out")))
    if shares:
        found.append(card(tr("Idle"), percent_text(1 - shares["passes"]), tr("of the step, mean of the devices")))
    if spent is not None:
        energy = f"{number_text(spent.kilowatt_hours)} kWh"
        found.append(card(tr("Energy"), energy, tr("{watts:.0f} W on average", watts=spent.watts)))
        rate = tr("tokens per joule")
        found.append(card(tr("Efficiency"), number_text(spent.tokens_per_joule), rate))
        if spent.per_million is not None and spent.whole is not None:
            whole = tr("{amount} for this run", amount=money_text(spent.whole, spent.currency))
            amount = money_text(spent.per_million, spent.currency)
            found.append(card(tr("A million tokens"), amount, whole))
    return found


def _table(used: list[Used]) -> str:
    several = len({one.host for one in used}) > 1
    head = (tr("device"), "", tr("busy"), tr("most memory"), tr("power"), tr("hottest"), tr("clock"), "PCIe")
    rows = []
    for one in used:
        name = device_text(one.device) + ("" if one.used else " " + tr("(not used)"))
        memory = "—" if one.memory_bytes is None else bytes_text(one.memory_bytes)
        held = "".join(f" ({clean(reason)} {percent_text(share)})" for reason, share in one.throttled.items())
        rows.append(
            [
                f"{clean(one.host)} {name}" if several else name,
                clean(one.name),
                "—" if one.utilisation is None else percent_text(one.utilisation),
                memory + (f" / {bytes_text(one.memory_total_bytes)}" if one.memory_total_bytes else ""),
                "—" if one.watts is None else f"{one.watts:.0f} W",
                "—" if one.celsius is None else f"{one.celsius:.0f} °C",
                ("—" if one.clock_share is None else percent_text(one.clock_share)) + held,
                "—" if one.pcie_bytes_s is None else f"{bytes_text(one.pcie_bytes_s)}/s",
            ]
        )
    return table(head, rows, numbers=range(2, 8), stack=True, labelled=True)


def _charts(past: History) -> list[Chart]:
    x = tr("seconds")
    kinds: list[tuple[str, _Value, Callable[[float], str], bool]] = [
        (tr("Busy"), lambda r: None if r.utilisation is None else 100 * r.utilisation, lambda v: f"{v:.0f} %", False),
        (tr("Memory in use"), lambda r: None if r.memory_bytes is None else float(r.memory_bytes), bytes_text, False),
        (tr("Power (W)"), lambda r: r.watts, count_text, True),
        (tr("Temperature (°C)"), lambda r: r.celsius, count_text, True),
    ]
    return [
        Chart(title, _series(past, value), write, x, from_zero=True, plain=plain)
        for title, value, write, plain in kinds
    ]


def _series(past: History, value: _Value) -> list[Series]:
    """A curve for each device; the GPUs' first, if there are any, else the host's."""
    looks = past.of(Devices)
    start = looks[0].time if looks else 0.0
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for look in looks:
        for reading in look.readings:
            read = value(reading)
            if read is not None:
                points.setdefault((look.host, reading.device), []).append((look.time - start, read))
    gpus = {key: found for key, found in points.items() if key[1] != "host"}
    shown = gpus or points
    looks_of_few = ("main", "other")
    return [
        Series(device_text(device), found, looks_of_few[number] if len(shown) < 3 else "raw")
        for number, ((_, device), found) in enumerate(shown.items())
    ]
