from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kitaeru.engine.watch import Stopwatch
from kitaeru.events import Step


def test_parts_of_a_step() -> None:
    clock = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        clock.begin()
        with clock.data():
            time.sleep(0.02)
        clock.mark("begin")
        with clock.data():
            time.sleep(0.03)
        time.sleep(0.05)
        clock.mark("own")
        time.sleep(0.01)
        clock.mark("whole")
        assert clock.data_seconds == pytest.approx(0.05, abs=0.015)
        assert clock.own_seconds() == pytest.approx(0.05, abs=0.015)
        assert clock.between("own", "whole") == pytest.approx(0.01, abs=0.008)
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
