"""Each rule on made-up steps and readings: where it speaks, where it is silent, and how often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kitaeru.engine import alarms
from kitaeru.engine.alarms import RULES, Alarms, Seen
from kitaeru.events import Devices, Notice, Reading, Step

GPU = Reading(
    device="0",
    name="RTX A5000",
    utilisation=0.97,
    memory_bytes=20 * 10**9,
    memory_total_bytes=25 * 10**9,
    watts=225,
    celsius=70,
    clock_share=0.9,
)
HOST = Reading(
    device="host",
    name="32 threads",
    used=False,
    utilisation=0.2,
    memory_bytes=40 * 10**9,
    memory_total_bytes=128 * 10**9,
)


def step(number: int, **changes: Any) -> Step:
    values = {"loss": 2.0, "seconds": 1.0, "data_seconds": 0.01, "wait_seconds": 0.05, "rank_seconds": (0.93, 0.92)}
    return Step(
        step=number, tokens=4096, trained_tokens=4096, tokens_per_second=4096, learning_rate=1e-4, grad_norm=1.0,
        peak_bytes=20 * 10**9, epoch=0.1, **{**values, **changes},
    )  # fmt: skip


def look(number: int, *changes: dict[str, Any], host: dict[str, Any] | None = None) -> Devices:
    gpus = [replace(GPU, device=str(n), **change) for n, change in enumerate(changes or ({}, {}))]
    return Devices(step=number, host="here", readings=(*gpus, replace(HOST, **(host or {}))))


def steps(count: int = 50, change: Callable[[int], dict[str, Any]] = lambda n: {}) -> list[Step]:
    return [step(n, **change(n)) for n in range(1, count + 1)]


def looks(*changes: dict[str, Any], host: dict[str, Any] | None = None, count: int = 12) -> list[Devices]:
    return [look(n, *changes, host=host) for n in range(count)]


def said(seen: Seen) -> list[str]:
    return [alarm.text for rule in RULES for alarm in rule(seen)]


HEALTHY = Seen(steps(), looks())


def test_a_healthy_run_raises_none() -> None:
    assert said(HEALTHY) == []
    assert said(Seen()) == []
    assert said(Seen(steps(), looks({}))) == []


CASES: list[tuple[str, Seen, str]] = [
    ("unused_gpu", Seen(steps(), looks({}, {"used": False, "utilisation": 0.0})), "does not use GPU 1 (RTX A5000)"),
    ("idle_gpu", Seen(steps(), looks({}, {"utilisation": 0.2})), "GPU 1 computes only 20% of the time"),
    (
        "throttled",
        Seen(steps(), looks({}, {"throttles": ("thermal",), "celsius": 91, "clock_share": 0.55})),
        "because of heat (91 °C, clock at 55%)",
    ),
    (
        "throttled",
        Seen(steps(), looks({"throttles": ("power brake",)}, {})),
        "GPU 0 is slowed down by the power supply",
    ),
    (
        "memory_near_limit",
        Seen(steps(), looks({}, {"memory_bytes": int(24.6e9)})),
        "The memory of GPU 1 is 98% full",
    ),
    ("memory_near_limit", Seen(steps(), looks(host={"memory_bytes": 126 * 10**9})), "98% of the RAM is taken"),
    (
        "data_starvation",
        Seen(steps(change=lambda n: {"data_seconds": 0.4}), looks({"utilisation": 0.6}, {"utilisation": 0.6})),
        "40% of the time goes into putting data together",
    ),
    (
        "waiting_for_others",
        Seen(steps(change=lambda n: {"wait_seconds": 0.5, "rank_seconds": (0.45, 0.45)}), looks()),
        "50% of the time goes into exchanging gradients",
    ),
    (
        "slow_rank",
        Seen(steps(change=lambda n: {"wait_seconds": 0.5, "rank_seconds": (0.45, 0.9)}), looks()),
        "Rank 1 needs 2.0 times as long",
    ),
    ("unsteady_loss", Seen(steps(change=lambda n: {"loss": 4.0 if n in (20, 30, 44) else 2.0})), "steps 20, 30, 44"),
    ("rising_loss", Seen(steps(60, lambda n: {"loss": 2.0 + 0.03 * n})), "rising for 60 steps"),
]


@pytest.mark.parametrize(("rule", "seen", "words"), CASES)
def test_what_is_wrong_is_said_by_its_rule_alone(rule: str, seen: Seen, words: str) -> None:
    [text] = said(seen)
    assert words in text
    [alarm] = getattr(alarms, rule)(seen)
    assert alarm.text == text


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in RULES} == {name for name, _, _ in CASES}


@pytest.mark.parametrize(
    "seen",
    [
        Seen(steps(3), looks({}, {"utilisation": 0.2})),  # too early
        Seen(steps(), looks({}, {"utilisation": 0.2}, count=3)),
        Seen(steps(), looks({}, {"throttles": ("thermal",)}, count=2)),
        Seen(steps(change=lambda n: {"data_seconds": 0.4}), looks()),  # the GPUs are busy all the same
        Seen(steps(change=lambda n: {"data_seconds": 0.04, "seconds": 0.1})),  # too short to matter
        Seen(steps(change=lambda n: {"rank_seconds": (0.9,), "wait_seconds": 0.5})),  # alone
        Seen(steps(change=lambda n: {"loss": 4.0 if n == 30 else 2.0})),  # one spike: the gate has said it
        Seen(steps(change=lambda n: {"loss": 3.0 - 0.02 * n})),
    ],
)
def test_what_is_no_alarm(seen: Seen) -> None:
    assert said(seen) == []


def test_an_alarm_is_said_once_until_it_has_been_quiet() -> None:
    heard: list[Notice] = []
    listener = Alarms(heard.append, quiet=20)
    for n in range(1, 81):
        listener(look(n, {}, {"utilisation": 0.2}))
        listener(step(n))
    assert len(heard) == 1
    assert heard[0].level == "warning"
    for n in range(81, 121):
        listener(look(n))
        listener(step(n))
    for n in range(121, 141):
        listener(look(n, {}, {"utilisation": 0.2}))
        listener(step(n))
    assert len(heard) == 2
    assert heard[1].step > 120


def test_the_first_steps_do_not_count() -> None:
    heard: list[Notice] = []
    listener = Alarms(heard.append)
    for n in range(1, 13):
        listener(step(n, rank_seconds=(0.4, 4.0)))
    assert heard == []
    listener(step(13, rank_seconds=(0.4, 4.0)))
    assert len(heard) == 1
