"""kill -9 at any moment: the run that is resumed ends as the run that was never killed."""

import os
import random
import signal
import time

import pytest

from kitaeru.events import Evaluated, RunFinished, Saved, Step

KILLS = 20
STEPS = 150


@pytest.mark.slow
def test_twenty_kills_change_nothing(new_folder, tmp_path):
    lives = {"train__max_steps": STEPS, "train__eval_every": 15, "train__save_every": 4}
    whole = new_folder(tmp_path / "whole", **lives)
    whole.train()
    steps_seconds = sum(step.seconds for step in whole.events(Step))
    killed = new_folder(tmp_path / "killed", **lives)
    dice = random.Random(time.time_ns() if os.environ.get("KITAERU_RANDOM_KILLS") else 20)
    places = []
    while len(places) < KILLS:
        started = killed.start("--resume")
        if dice.random() < 0.15:
            time.sleep(dice.uniform(0, 0.5))  # while it starts
        else:
            killed.wait_for("run_started", started, count=killed.lines("run_started") + 1)
            killed.wait_for("step", started, count=killed.lines("step") + dice.randrange(12))
            time.sleep(dice.uniform(0, steps_seconds / STEPS))  # and somewhere in the next one
        os.killpg(started.pid, signal.SIGKILL)
        code = started.wait()
        assert code == -signal.SIGKILL, f"it had ended before kill {len(places) + 1}: {started.said}"
        places.append(killed.lines("step"))
    assert len(set(places)) > KILLS // 2  # most of them met it at another step
    killed.train("--resume")

    steps, wanted = killed.events(Step), whole.events(Step)
    assert [s.step for s in steps] == list(range(1, STEPS + 1))
    assert [s.loss for s in steps] == [s.loss for s in wanted]
    assert [s.grad_norm for s in steps] == [s.grad_norm for s in wanted]
    assert [(e.step, e.loss) for e in killed.events(Evaluated)] == [(e.step, e.loss) for e in whole.events(Evaluated)]
    assert killed.events(RunFinished)[-1].best_step == whole.events(RunFinished)[-1].best_step
    assert killed.adapter() == whole.adapter()
    assert killed.checkpoints() == whole.checkpoints()
    assert len(killed.events(Saved)) <= len(whole.events(Saved))
