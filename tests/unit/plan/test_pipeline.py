"""The pipeline simulator against closed formulas, and schedules against what a schedule must be."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kitaeru.plan.pipeline import Pass, balanced_cuts, in_flight, in_one_process, orders, simulate

RANKS, MICRO_BATCHES = (2, 3, 4, 8), (1, 2, 3, 8, 16)
FORWARD, BACKWARD = 1.0, 2.0
CASES = [("gpipe", p, m, 1) for p in RANKS for m in MICRO_BATCHES]
CASES += [("1f1b", p, m, 1) for p in RANKS for m in MICRO_BATCHES]
CASES += [("interleaved", p, p * k, v) for p in RANKS for k in (1, 2, 4) for v in (2, 3)]
UNEVEN = [("interleaved", p, m, v) for p in RANKS for m in (1, 3, 5, 11) for v in (2, 3) if m % p]


@pytest.mark.parametrize(("schedule", "p", "m", "v"), CASES)
def test_equal_stages_idle_as_the_formula_says(schedule: str, p: int, m: int, v: int) -> None:
    """(p - 1) / (v m + p - 1) of the time: gpipe and 1F1B with v = 1 (Narayanan et al., arXiv 2104.04473)."""
    found = simulate(orders(schedule, p, m, v), [FORWARD / v] * p * v, [BACKWARD / v] * p * v)
    assert found.seconds == pytest.approx((FORWARD + BACKWARD) * (m + (p - 1) / v))
    for idle in found.idle:
        assert idle == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("schedule", "p", "m", "v"), [*CASES, *UNEVEN])
def test_each_rank_does_every_pass_once(schedule: str, p: int, m: int, v: int) -> None:
    for rank, passes in enumerate(orders(schedule, p, m, v)):
        stages = range(rank, p * v, p)
        assert sorted((x.kind, x.stage, x.micro_batch) for x in passes) == sorted(
            (kind, stage, j) for kind in "BF" for stage in stages for j in range(m)
        )


@pytest.mark.parametrize(("schedule", "p", "m", "v"), CASES)
def test_what_is_kept_at_once_is_counted(schedule: str, p: int, m: int, v: int) -> None:
    for rank, passes in enumerate(orders(schedule, p, m, v)):
        kept = most = 0
        for now in passes:
            kept += 1 if now.kind == "F" else -1
            most = max(most, kept)
        assert in_flight(schedule, rank, p, m, v) == most


@pytest.mark.parametrize(("schedule", "p", "m", "v"), UNEVEN)
def test_a_last_round_may_be_short(schedule: str, p: int, m: int, v: int) -> None:
    order = orders(schedule, p, m, v)
    full = simulate(orders(schedule, p, -(-m // p) * p, v), [1.0] * p * v, [2.0] * p * v)
    assert simulate(order, [1.0] * p * v, [2.0] * p * v).seconds <= full.seconds
    for rank, passes in enumerate(order):
        kept = [sum(1 if now.kind == "F" else -1 for now in passes[: i + 1]) for i in range(len(passes))]
        assert max(kept) <= in_flight(schedule, rank, p, m, v)


@pytest.mark.parametrize(("schedule", "p", "m", "v"), [*CASES, *UNEVEN])
def test_one_process_finds_everything_it_needs(schedule: str, p: int, m: int, v: int) -> None:
    order = orders(schedule, p, m, v)
    passes, done = in_one_process(order), set()
    assert sorted(passes, key=str) == sorted((now for each in order for now in each), key=str)
    for now in passes:
        if now.kind == "F" and now.stage:
            assert Pass("F", now.stage - 1, now.micro_batch) in done
        if now.kind == "B":
            behind = (
                Pass("B", now.stage + 1, now.micro_batch)
                if now.stage < p * v - 1
                else Pass("F", now.stage, now.micro_batch)
            )
            assert behind in done
        done.add(now)


def test_the_slowest_stage_sets_the_beat() -> None:
    times = [simulate(orders("1f1b", 3, m), [1, 1, 5], [1, 1, 5]).seconds for m in (8, 9, 10)]
    assert [b - a for a, b in pairwise(times)] == [10, 10]


def test_transfers_cost_time_between_ranks_only() -> None:
    assert simulate(orders("1f1b", 2, 1), [1, 1], [1, 1], transfer=0.5).seconds == pytest.approx(5.0)
    assert simulate(orders("1f1b", 1, 4), [1.0], [2.0], transfer=9.0).seconds == pytest.approx(12.0)


def test_interleaving_hides_more_than_it_adds() -> None:
    plain = simulate(orders("1f1b", 4, 8), [2.0] * 4, [4.0] * 4)
    finer = simulate(orders("interleaved", 4, 8, 2), [1.0] * 8, [2.0] * 8)
    assert finer.seconds < plain.seconds


def test_a_schedule_that_waits_for_itself_is_told() -> None:
    with pytest.raises(ValueError, match="waits"):
        simulate([[Pass("B", 0, 0), Pass("F", 0, 0)]], [1.0], [1.0])


@pytest.mark.parametrize(
    ("layers", "times", "extra"), [(32, [1, 1], [0, 3]), (48, [1, 2, 1], [0, 0, 5]), (7, [3, 1, 1], [0, 0, 0])]
)
def test_cuts_are_the_best_of_all(layers: int, times: list[float], extra: list[float]) -> None:
    def slowest(cuts: tuple[int, ...]) -> float:
        return max(n * t + e for n, t, e in zip(cuts, times, extra, strict=True))

    def every(left: int, parts: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(left,)]
        return [(n, *rest) for n in range(1, left - parts + 2) for rest in every(left - n, parts - 1)]

    cuts = balanced_cuts(layers, times, extra)
    assert sum(cuts) == layers
    assert min(cuts) >= 1
    assert slowest(cuts) == min(map(slowest, every(layers, len(times))))
