from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kitaeru.errors import UsageError
from kitaeru.report.history import History

Make = Callable[..., Path]


def test_a_finished_run(run_dir: Path) -> None:
    past = History.load(run_dir)
    assert [s.step for s in past.steps] == list(range(1, 61))
    assert past.before is not None
    assert past.after is not None
    assert (past.before.step, past.after.step) == (0, 60)
    assert past.seconds == pytest.approx(40, abs=1)
    assert past.tokens == sum(s.tokens for s in past.steps)
    assert [a.before is not None and a.after is not None for a in past.answers] == [True, True, True]


def test_a_resumed_run_has_each_step_once_and_no_void_ones(make: Make) -> None:
    past = History.load(make("resumed"))
    assert [s.step for s in past.steps] == list(range(1, 61))
    assert max(s.loss for s in past.steps) < 10  # the void steps had 99
    assert len(past.checkpoints) == 5
    assert past.started is not None
    assert past.started.resumed_step == 36
    assert past.finished is not None
    # The thousand seconds between the two starts are not time at work.
    assert past.seconds < 100


def test_a_killed_run(make: Make) -> None:
    past = History.load(make("killed"))
    assert past.finished is None
    assert past.steps[-1].step == 25
    assert all(a.after is None for a in past.answers)


def test_after_is_the_validation_of_the_best_step(made: object, tmp_path: Path) -> None:
    m = made
    worse = m.validation(60, 60).__class__(step=60, loss=9.0, tokens=1, seconds=1.0)
    parts = [[m.started(60), m.validation(0, 60), m.validation(48, 60), worse]]
    ended = m.finish(60)[-1].__class__(outcome="finished", step=60, seconds=1.0, best_step=48)
    past = History.load(m.write(tmp_path / "x", 60, [[*parts[0], ended]]))
    assert past.after is not None
    assert past.after.step == 48


def test_no_run_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"events\.jsonl") as caught:
        History.load(tmp_path)
    assert caught.value.remedy is not None
    assert caught.value.exit_code == 2
