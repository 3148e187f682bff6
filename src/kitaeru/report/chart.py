"""Curves as inline SVG with HTML labels: sharp at any width, readable on a phone, complete without JavaScript.

The drawing area is stretched to the figure (strokes are not), and the labels are ordinary text placed in per cent, so
that one chart serves a desk, a phone and paper.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from kitaeru.report.curve import Point, thin, ticks, whole_ticks

# The inner coordinate system of every drawing area.
_WIDTH, _HEIGHT = 1000, 400


@dataclass(frozen=True)
class Series:
    """One curve: (x, y) points, ordered by x. `look` is a CSS class: raw, main, other, second (dots) or limit."""

    name: str
    points: Sequence[Point]
    look: str = "main"


@dataclass(frozen=True)
class Chart:
    """A figure: its title, its curves, how a y value is written, and what the x axis counts.

    `marks` are points with a label of their own, such as the best validation. The axis of `plain` numbers has the same
    decimals at every tick; others (bytes, rates) are written by `write` there too.
    """

    title: str
    series: Sequence[Series]
    write: Callable[[float], str]
    x_label: str
    from_zero: bool = False
    plain: bool = True
    marks: Sequence[tuple[float, float, str]] = field(default=())


@dataclass(frozen=True)
class _Frame:
    """The visible range: x is in steps."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def figure(chart: Chart) -> str:
    """The chart as an HTML figure; an empty string when there is nothing to draw."""
    series = [Series(s.name, thin(s.points), s.look) for s in chart.series]
    series = [s for s in series if s.points]
    if not series:
        return ""
    frame, y_ticks = _frame(chart, series)
    x_ticks = whole_ticks(round(frame.left), round(frame.right))
    return "".join(
        (
            f'<figure class="chart" data-chart="{escape(_hover_data(chart, series, frame))}">',
            f"<figcaption><b>{escape(chart.title)}</b>{_legend(series)}</figcaption>",
            '<div class="plot">',
            _svg(chart, series, frame, y_ticks, x_ticks),
            *(
                f'<span class="y" style="bottom:{_percent(frame.y(tick))}">{escape(text)}</span>'
                for tick, text in zip(y_ticks, _tick_texts(chart, y_ticks), strict=True)
            ),
            *(f'<span class="x" style="left:{_percent(frame.x(t))}">{t:,}</span>' for t in x_ticks),
            *(_mark_label(mark, frame) for mark in chart.marks),
            f'</div><div class="axis">{escape(chart.x_label)}</div></figure>',
        )
    )


def _frame(chart: Chart, series: Sequence[Series]) -> tuple[_Frame, list[float]]:
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    y_ticks = ticks(0.0 if chart.from_zero else min(ys), max(ys), 4)
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return _Frame(min(xs), right, y_ticks[0], y_ticks[-1]), y_ticks


def _tick_texts(chart: Chart, y_ticks: Sequence[float]) -> list[str]:
    if not chart.plain:
        return [re.sub(r"\.(\d*?)0+(?= )", lambda m: f".{m[1]}" if m[1] else "", chart.write(t)) for t in y_ticks]
    step = y_ticks[1] - y_ticks[0]
    decimals = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [f"{t:,.{decimals}f}" for t in y_ticks]


def _svg(chart: Chart, series: Sequence[Series], frame: _Frame, y_ticks: list[float], x_ticks: list[int]) -> str:
    lines = [_path("grid", [(0, frame.y(t)), (1, frame.y(t))]) for t in y_ticks]
    lines += [_path("tick", [(frame.x(t), 0), (frame.x(t), 0.02)]) for t in x_ticks]
    # The quiet curves first, so that the main one lies on top.
    for item in sorted(series, key=lambda s: ("limit", "raw", "main", "other", "second").index(s.look)):
        places = [(frame.x(x), frame.y(y)) for x, y in item.points]
        lines.append(_path(item.look, places))
        if item.look == "second" or len(places) == 1:
            lines.append(_dots(item.look, places))
    lines += [_dots("best", [(frame.x(x), frame.y(y))]) for x, y, _ in chart.marks]
    label = escape(chart.title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        + "".join(lines)
        + "</svg>"
    )


def _path(look: str, places: Sequence[Point]) -> str:
    steps = "L".join(_place(x, y) for x, y in places)
    return f'<path class="{look}" d="M{steps}"/>'


def _dots(look: str, places: Sequence[Point]) -> str:
    # A line of no length with round ends is a dot that stays round when the drawing is stretched.
    return f'<path class="{look} dot" d="{"".join(f"M{_place(x, y)}h0" for x, y in places)}"/>'


def _place(x: float, y: float) -> str:
    return f"{x * _WIDTH:.1f} {(1 - y) * _HEIGHT:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _mark_label(mark: tuple[float, float, str], frame: _Frame) -> str:
    x, y, label = mark
    side = "end" if frame.x(x) > 0.75 else "start"
    place = f"left:{_percent(frame.x(x))};bottom:{_percent(frame.y(y))}"
    return f'<span class="mark {side}" style="{place}">{escape(label)}</span>'


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    return "".join(f'<span class="key"><i class="{s.look}"></i>{escape(s.name)}</span>' for s in series)


def _hover_data(chart: Chart, series: Sequence[Series], frame: _Frame) -> str:
    """What the tooltip shows: for each curve its places (0 to 1), steps and written values."""
    curves = [
        {
            "name": s.name,
            "look": s.look,
            "step": [round(x) for x, _ in s.points],
            "at": [round(frame.x(x), 4) for x, _ in s.points],
            "text": [chart.write(y) for _, y in s.points],
        }
        for s in series
        if s.look != "limit"
    ]
    return json.dumps({"x": chart.x_label, "curves": curves}, ensure_ascii=False, separators=(",", ":"))
