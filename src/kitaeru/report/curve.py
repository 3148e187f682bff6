"""The arithmetic of curves: smoothing, thinning, ticks. No drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start so that the first values are not pulled to zero.

    Values that are not finite are passed over: the average stays where it was.

    >>> [round(v, 3) for v in smooth([4.0, 2.0, 2.0], 0.5)]
    [4.0, 2.667, 2.286]
    """
    result: list[float] = []
    total, mass = 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            mass = weight * mass + (1 - weight)
        result.append(total / mass if mass else math.nan)
    return result


def smooth_past(values: Sequence[float]) -> list[float]:
    """Smoothing for looking back: the mean of averages from both ends, which lags behind neither fall nor rise.

    >>> [round(v, 2) for v in smooth_past([3.0, 2.0, 1.0])]
    [2.71, 2.0, 1.29]
    """
    weight = smoothing_weight(len(values))
    forward, backward = smooth(values, weight), smooth(values[::-1], weight)[::-1]
    return [(a + b) / 2 for a, b in zip(forward, backward, strict=True)]


def smoothing_weight(count: int) -> float:
    """A weight that averages over about a fortieth of the run: enough to see through noise, never hiding a turn.

    >>> round(smoothing_weight(40), 2), round(smoothing_weight(4000), 2)
    (0.5, 0.98)
    """
    return 1 - 1 / min(max(count / 40, 2), 60)


def thin(points: Sequence[Point], limit: int = 500) -> list[Point]:
    """At most `limit` of `points` (ordered by x): the lowest and the highest of each stretch, so no spike is lost."""
    finite = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if len(finite) <= limit:
        return finite
    stretches = max(1, limit // 2)
    kept: list[Point] = []
    for i in range(stretches):
        part = finite[i * len(finite) // stretches : (i + 1) * len(finite) // stretches]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, from `low` or below to `high` or above; 1, 2, 2.5 or 5 times a power of ten apart.

    >>> ticks(0, 97), ticks(1.92, 3.4)
    ([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [1.5, 2.0, 2.5, 3.0, 3.5])
    """
    if not high - low > 1e-300:  # no range, or one whose logarithm does not exist
        pad = abs(low) / 2 if abs(low) > 1e-300 else 0.5
        low, high = (0.0, 2 * low) if low > 1e-300 else (low - pad, low + pad)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def whole_ticks(low: int, high: int, count: int = 6) -> list[int]:
    """About `count` round whole numbers within [low, high], for an axis of steps.

    >>> whole_ticks(1, 400), whole_ticks(0, 3)
    ([100, 200, 300, 400], [0, 1, 2, 3])
    """
    within = {round(tick) for tick in ticks(low, max(high, low + 1), count) if tick == round(tick)}
    return sorted(tick for tick in within if low <= tick <= max(high, low + 1))


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as a line of `width` block characters at most; values that are not finite are gaps.

    >>> sparkline([3, 2, 1], 8)
    '█▄▁'
    """
    bars = "▁▂▃▄▅▆▇█"
    size = max(1, math.ceil(len(values) / max(1, width)))
    groups = [[v for v in values[i : i + size] if math.isfinite(v)] for i in range(0, len(values), size)]
    means = [sum(group) / len(group) if group else math.nan for group in groups]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    # Halves, because the difference of two huge values would be infinite.
    low, span = min(finite) / 2, (max(finite) / 2 - min(finite) / 2) or 1.0
    return "".join(bars[int((m / 2 - low) / span * 7)] if math.isfinite(m) else " " for m in means)
