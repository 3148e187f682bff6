"""The plots of advice as inline SVG lanes with HTML labels, in the style of `report.chart`: complete without a script.

A lane is one stretched drawing between its name and its value; on a phone the name stands above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kitaeru.i18n import N_, tr
from kitaeru.plan.explain import MEMORY_GROUPS
from kitaeru.plan.timeline import Day
from kitaeru.report.curve import ticks

WIDTH = 1000
GROUP_NAMES: dict[str, str] = {
    "weights": N_("weights"),
    "trained": N_("what is trained"),
    "activations": N_("activations"),
    "work": N_("head and work space"),
    "margin": N_("margin"),
}
SPAN_NAMES: dict[str, str] = {
    "forward": N_("forward"),
    "backward": N_("backward"),
    "waiting": N_("waiting for data"),
    "optimizer": N_("optimizer"),
    "idle": N_("idle"),
}


@dataclass(frozen=True)
class Lane:
    """A name, rectangles `(look, from, to)` with places between 0 and 1, a value; `line` is a range drawn over it."""

    name: str
    parts: Sequence[tuple[str, float, float]]
    value: str
    line: tuple[float, float] | None = None
    look: str = ""


def groups(items: Mapping[str, int]) -> dict[str, int]:
    """A device's memory by what it is for."""
    return {name: sum(items.get(item, 0) for item in held) for name, held in MEMORY_GROUPS.items()}


def memory_lane(name: str, items: Mapping[str, int], needed: int, size: int, scale: int, value: str) -> Lane:
    """A device's memory: its parts, the margin, and what is free of `size`; `scale` is the largest size drawn."""
    parts, at = [], 0.0
    for group, taken in groups(items).items():
        parts.append((group, at / scale, (at + taken) / scale))
        at += taken
    if needed > at:
        parts.append(("margin", at / scale, needed / scale))
    parts.insert(0, ("room", 0.0, size / scale))
    return Lane(name, parts, value)


def day_lanes(name: str, found: Day, devices: int, longest: float, value: str) -> list[Lane]:
    """One step, a lane for each device."""
    lanes = []
    for rank in range(devices):
        parts = [("room", 0.0, found.seconds / longest)]
        parts += [(s.kind, s.start / longest, s.end / longest) for s in found.spans if s.rank == rank]
        label = f"{name} · GPU {rank}" if rank == 0 else f"GPU {rank}"
        lanes.append(Lane(label, parts, value if rank == 0 else "", look="" if rank == 0 else "more"))
    return lanes


def lanes(drawn: Iterable[Lane], legend: Mapping[str, str], axis: tuple[float, str] | None = None) -> str:
    """Lanes below one another with a legend; `axis` is the value at the right end and its unit."""
    keys = "".join(
        f'<span class="key"><i class="{look}"></i>{escape(tr(name))}</span>' for look, name in legend.items()
    )
    rows = "".join(
        f'<span class="name {lane.look}">{escape(lane.name)}</span>{_svg(lane)}'
        f'<span class="count">{escape(lane.value)}</span>'
        for lane in drawn
    )
    return f'<div class="keys">{keys}</div><div class="lanes">{rows}{_axis(axis) if axis else ""}</div>'


def _svg(lane: Lane) -> str:
    shapes = "".join(
        f'<rect class="{look}" x="{WIDTH * left:.1f}" y="0" width="{WIDTH * max(0.0, right - left):.1f}" height="10"/>'
        for look, left, right in lane.parts
    )
    if lane.line:
        low, high = (f"{WIDTH * place:.1f}" for place in lane.line)
        shapes += f'<path class="range" d="M{low} 5H{high}M{low} 2.5V7.5M{high} 2.5V7.5"/>'
    label = escape(f"{lane.name}: {lane.value}" if lane.value else lane.name)
    return (
        f'<svg class="lane" viewBox="0 0 {WIDTH} 10" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{shapes}</svg>"
    )


def _axis(axis: tuple[float, str]) -> str:
    right, unit = axis
    places = [tick for tick in ticks(0.0, right, 4) if tick <= right * 1.0001]
    step = places[1] - places[0] if len(places) > 1 else 1.0
    decimals = next((d for d in range(4) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 3)
    marks = "".join(f'<span style="left:{100 * tick / right:.2f}%">{tick:,.{decimals}f}</span>' for tick in places)
    return f'<span class="name"></span><div class="scale">{marks}</div><span class="count">{escape(unit)}</span>'
