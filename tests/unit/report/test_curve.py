from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kitaeru.report.curve import smooth, smooth_past, sparkline, thin, ticks, whole_ticks

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1))
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    slack = 1e-9 * max(1.0, *map(abs, values))
    for line in (smooth(values), smooth_past(values)):
        assert len(line) == len(values)
        assert all(min(values) - slack <= v <= max(values) + slack for v in line)


def test_smoothing_passes_over_what_is_not_finite() -> None:
    assert smooth([2.0, math.nan, math.inf, 2.0]) == [2.0, 2.0, 2.0, 2.0]
    assert math.isnan(smooth([math.nan])[0])


@given(st.lists(finite, min_size=1, max_size=3000), st.integers(4, 500))
def test_thinning_keeps_the_extremes_and_the_order(values: list[float], limit: int) -> None:
    kept = thin(list(enumerate(values)), limit)
    assert len(kept) <= max(limit, 2)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert {min(values), max(values)} <= {y for _, y in kept}


def test_thinning_leaves_out_what_is_not_finite() -> None:
    assert thin([(1, math.nan), (2, 3.0), (3, math.inf)]) == [(2, 3.0)]


@given(finite, finite)
def test_ticks_enclose_the_range_and_are_few(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-6 * max(abs(low), abs(high)):
        return  # below what a label could tell apart
    found = ticks(low, high)
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_ticks_of_steps_are_whole_and_inside(a: int, b: int) -> None:
    low, high = min(a, b), max(a, b)
    assert all(low <= tick <= max(high, low + 1) for tick in whole_ticks(low, high))
    assert len(whole_ticks(low, high)) <= 8


@given(st.lists(st.floats(), max_size=300), st.integers(1, 40))
def test_sparkline_fits(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) <= width
