"""Devices, energy, money and time, from made-up readings whose sums are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kitaeru.events import Devices, Event, Reading, Step
from kitaeru.plan.types import Plan
from kitaeru.recipe.types import TrackSection
from kitaeru.report.history import History
from kitaeru.report.page import page, write_page
from kitaeru.report.usage import cost, devices_used, mfu, reading_text, time_shares
from kitaeru.report.usage_page import usage


def look(at: float, *watts: float | None, host: str = "a", **changes: Any) -> Devices:
    readings = [
        Reading(
            device=str(n),
            name="RTX A5000",
            utilisation=0.5,
            memory_bytes=10 * 10**9,
            memory_total_bytes=25 * 10**9,
            watts=w,
            celsius=60.0 + at,
            **changes,
        )
        for n, w in enumerate(watts)
    ]
    return Devices(
        time=at, step=1, host=host, readings=(*readings, Reading(device="host", name="8 threads", used=False))
    )


def step(number: int, **changes: Any) -> Step:
    values = {"seconds": 2.0, "data_seconds": 0.2, "wait_seconds": 0.4, "rank_seconds": (1.0, 1.4)}
    return Step(
        time=float(number), step=number, loss=2.0, tokens=1000, trained_tokens=900, tokens_per_second=500.0,
        learning_rate=1e-4, grad_norm=1.0, peak_bytes=10**9, epoch=0.1, **{**values, **changes},
    )  # fmt: skip


def past(*events: Event) -> History:
    return History(events)


def test_each_device_of_each_host() -> None:
    used = devices_used(past(look(0, 100, 200), look(2, 120, 200), look(1, 90, host="b")))
    assert [(u.host, u.device, u.watts, u.celsius) for u in used] == [
        ("a", "0", 110, 62),
        ("a", "1", 200, 62),
        ("a", "host", None, None),
        ("b", "0", 90, 61),
        ("b", "host", None, None),
    ]
    assert [u.used for u in used] == [True, True, False, True, False]


def test_throttling_is_a_share_of_the_looks() -> None:
    hot = [look(n, 100, throttles=("thermal",) if n < 1 else ()) for n in range(4)]
    assert devices_used(past(*hot))[0].throttled == {"thermal": 0.25}


def test_what_a_million_tokens_cost() -> None:
    # 300 W for 10 steps of 2 s are 6 kJ for 10,000 tokens: 600 kJ, or 1/6 kWh, for a million.
    run = past(*(look(n, 100, 200) for n in range(5)), *(step(n) for n in range(1, 11)))
    spent = cost(run, TrackSection(power_price=30))
    assert spent is not None
    assert (spent.watts, spent.joules) == (300, 6000)
    assert spent.per_million == pytest.approx(5.0)
    assert spent.whole == pytest.approx(0.05)
    assert spent.tokens_per_joule == pytest.approx(10 / 6)
    with_machine = cost(run, TrackSection(power_price=30, machine_watts=300))
    assert with_machine is not None
    assert with_machine.per_million == pytest.approx(10.0)
    without_price = cost(run, TrackSection())
    assert without_price is not None
    assert (without_price.per_million, without_price.joules) == (None, 6000)


def test_power_is_a_mean_over_time_without_pauses() -> None:
    looks = [look(0, 100), look(1, 100), look(2, 300), look(3, 300), look(1000, 0), look(1001, 0)]
    spent = cost(past(*looks, step(1)), TrackSection())
    assert spent is not None
    assert spent.watts == pytest.approx((100 + 200 + 300 + 0) / 4)


def test_no_power_no_cost() -> None:
    assert cost(past(look(0, None), step(1)), TrackSection(power_price=30)) is None
    assert cost(past(look(0, 100)), TrackSection(power_price=30)) is None
    spent = cost(past(step(1)), TrackSection(power_price=30, machine_watts=100))
    assert spent is not None
    assert spent.watts == 100


def test_where_the_time_went() -> None:
    shares = time_shares([step(1), step(2)])
    assert shares == pytest.approx({"passes": 0.6, "data": 0.1, "wait": 0.2, "rest": 0.1})
    assert time_shares([step(1, rank_seconds=())]) == {}
    crowded = time_shares([step(1, wait_seconds=5.0)])
    assert sum(crowded.values()) == pytest.approx(1.0)
    assert min(crowded.values()) >= 0


def test_mfu_comes_from_the_plan_s_arithmetic(made: Any) -> None:
    started = replace(made.started(3), mfu_of_rate=0.001)
    assert mfu(past(started, step(1))) == pytest.approx(0.5)
    assert mfu(past(made.started(3), step(1))) is None


def test_a_reading_on_a_line() -> None:
    assert reading_text(look(0, 221.4).readings[0]) == "50 % · 10.0 GB / 25.0 GB · 221 W · 60 °C"
    assert reading_text(Reading(device="0", name="A", throttles=("thermal",), pcie_to_bytes_s=3e9)) == (
        "PCIe 3.00 GB/s · thermal"
    )
    assert reading_text(Reading(device="0", name="A")) == "—"


def test_the_page_shows_it(made: Any, tmp_path: Path) -> None:
    folder = made.finished(tmp_path / "run")
    plan = Plan.load(folder / "plan.json")
    track = TrackSection(power_price=31, currency="EUR")
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"track": track}))
    events = History.load(folder).events
    steps = [replace(e, rank_seconds=(0.3, 0.35), data_seconds=0.05) if isinstance(e, Step) else e for e in events]
    run = History((*steps, *(look(made.T0 + n, 200, 220, pcie_to_bytes_s=1e9) for n in range(6))))
    html = usage(run, plan)
    for words in ("A million tokens", "€", "Idle", "GPU 0", "GPU 1", "RTX A5000", "420 W on average", "putting data"):
        assert words in html
    assert "&amp;" not in html
    assert usage(run, plan) in page(run, plan, "", folder)


def test_a_run_of_an_earlier_version_has_no_such_section(run_dir: Path) -> None:
    assert usage(History.load(run_dir), None) == ""
    assert "Devices, power" not in write_page(run_dir).read_text()
