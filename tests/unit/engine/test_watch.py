from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kitaeru.engine.watch import Stopwatch
from kitaeru.events import Step


def slept(seconds: float) -> float:
    """How long the sleep really was: a busy machine wakes late."""
    started = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - started


def test_parts_of_a_step() -> None:
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        began = time.perf_counter()
        clock.begin()
        with clock.data():
            before = slept(0.02)
        clock.mark("begin")
        with clock.data():
            within = slept(0.03)
        own = slept(0.05)
        clock.mark("own")
        after = slept(0.01)
        clock.mark("whole")
        beside = time.perf_counter() - began - (before + within + own + after)  # the rest of what has passed
        assert before + within <= clock.data_seconds <= before + within + beside
        assert own <= clock.own_seconds() <= own + beside
        assert after <= clock.between("own", "whole") <= after + beside
    clock.begin()
    assert clock.between("begin", "own") == 0


@pytest.mark.gpu
def test_the_stream_is_timed_and_not_the_host() -> None:
    clock = Stopwatch(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        clock.begin()
        clock.mark("begin")
        started = time.perf_counter()
        for _ in range(50):
            a @ a
        launched = time.perf_counter() - started
        clock.mark("own")
        assert clock.own_seconds() > launched


def test_a_run_says_where_its_time_went(training: Any, tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    run = training.Training(tmp_path, tiny_model, chat_data)
    run.run()
    for step in run.steps:
        assert isinstance(step, Step)
        [own] = step.rank_seconds
        assert 0 < own <= step.seconds
        assert 0 < step.data_seconds < step.seconds
        assert step.wait_seconds < own
        assert step.idle_share == pytest.approx(1 - own / step.seconds)
