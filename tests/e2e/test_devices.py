"""A run on several devices, from outside: started by kitaeru or torchrun, killed, stopped, interrupted, resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from kitaeru.events import Evaluated, RunFinished, RunStarted, Sample, Step

STEPS = 40
# A rank is missed after 12 s, and who waits for it would wait for half an hour; on a machine that may be busy.
SOON = 120
TWO = {"strategy": "ddp", "limits__devices": 2, "train__max_steps": STEPS, "train__save_every": 5}


@pytest.fixture(scope="session")
def one(new_folder, tmp_path_factory):
    """The run on one device."""
    folder = new_folder(tmp_path_factory.mktemp("devices") / "one", train__max_steps=STEPS)
    folder.train()
    return folder


def losses(folder):
    return [(step.step, step.loss) for step in folder.events(Step)]


def assert_same(folder, wanted):
    assert [s for s, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert [x for _, x in losses(folder)] == pytest.approx([x for _, x in losses(wanted)], rel=1e-5)
    ours, theirs = ([e.loss for e in f.events(Evaluated)] for f in (folder, wanted))
    assert ours == pytest.approx(theirs, rel=1e-5)


def rank(folder, number):
    return json.loads((folder.run / "logs" / f"rank-{number}.json").read_text())


def killed(folder, number, how, *more):
    """Start, hurt a rank in the middle of the run; the exit code and the seconds until everything had ended."""
    started = folder.start(*more)
    folder.wait_for("step", started, count=12)
    began = time.monotonic()
    os.kill(rank(folder, number)["pid"], how)
    code = started.wait()
    seconds = time.monotonic() - began
    started.assert_nobody_left()
    return code, seconds, started.said


def test_two_devices_are_one_training(one, new_folder, tmp_path):
    folder = new_folder(tmp_path, **TWO)
    said = folder.train()
    assert_same(folder, one)
    assert folder.events(RunStarted)[0].strategy == "ddp"
    assert (folder.run / "report.html").exists()
    assert "finished" in said
    assert "step 40/40" in said
    assert [rank(folder, number)["state"] for number in (0, 1)] == ["done", "done"]
    assert '"kind": "step"' in (folder.run / "logs" / "rank-1.log").read_text()
    assert folder.lines("run_started") == 1


@pytest.mark.parametrize("strategy", ["pipeline", "model_parallel"])
def test_a_model_split_over_two_devices_is_one_training(one, new_folder, tmp_path, strategy):
    folder = new_folder(tmp_path, **(TWO | {"strategy": strategy}))
    said = folder.train()
    assert_same(folder, one)
    assert folder.events(RunStarted)[0].strategy == strategy
    assert "step 40/40" in said
    plan = json.loads((folder.run / "plan.json").read_text())["chosen"]
    assert len(plan["layout"]["cuts"]) >= 2
    answers = [[event.answer for event in each.events(Sample)] for each in (folder, one)]
    assert answers[0] == answers[1]
    counts = [each.events(RunStarted)[0].trainable_parameters for each in (folder, one)]
    assert counts[0] == counts[1]


def test_a_rank_of_a_pipeline_that_is_killed_is_named(one, new_folder, tmp_path):
    folder = new_folder(tmp_path, **(TWO | {"strategy": "pipeline"}))
    code, seconds, said = killed(folder, 1, signal.SIGKILL)
    assert code == 1
    assert seconds < SOON
    assert f"Rank 1 on {os.uname().nodename} is lost after step" in said.replace("\n", " ")
    folder.write(strategy="ddp")
    folder.train("--resume")
    assert_same(folder, one)


def test_a_stopped_rank_of_a_pipeline_is_missed(new_folder, tmp_path):
    folder = new_folder(tmp_path, **(TWO | {"strategy": "pipeline", "train__max_steps": 4000}))
    code, seconds, said = killed(folder, 1, signal.SIGSTOP)
    assert code == 1
    assert seconds < SOON
    assert "Rank 1" in said
    assert "no sign of life" in said


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_is_named_and_the_run_goes_on_elsewhere(one, new_folder, tmp_path, number):
    folder = new_folder(tmp_path, **TWO)
    code, seconds, said = killed(folder, number, signal.SIGKILL)
    assert code == 1
    assert seconds < SOON
    assert f"Rank {number} on {os.uname().nodename} is lost after step" in said.replace("\n", " ")
    assert "ran out of RAM" in said
    assert folder.events(RunFinished)[-1].outcome == "failed"
    folder.write(strategy="single", limits__devices=1)  # and now on one device
    folder.train("--resume")
    assert_same(folder, one)


def test_a_stopped_rank_is_missed(new_folder, tmp_path):
    folder = new_folder(tmp_path, **(TWO | {"train__max_steps": 4000}))
    code, seconds, said = killed(folder, 1, signal.SIGSTOP)
    assert code == 1
    assert seconds < SOON
    assert "Rank 1" in said
    assert "no sign of life" in said


def test_restarts_from_the_last_checkpoint(one, new_folder, tmp_path):
    folder = new_folder(tmp_path, **TWO)
    code, _, said = killed(folder, 1, signal.SIGKILL, "--set", "limits.max_restarts=1")
    assert code == 0, said
    assert folder.lines("run_started") == 2
    assert folder.events(RunStarted)[-1].resumed_step >= 10
    assert_same(folder, one)


def test_ranks_killed_at_random_moments(one, new_folder, tmp_path):
    dice = random.Random(time.time_ns() if os.environ.get("KITAERU_RANDOM_KILLS") else 4)
    folder = new_folder(tmp_path, **TWO, limits__max_restarts=3)
    started = folder.start()
    for attempt in range(3):
        folder.wait_for("run_started", started, count=attempt + 1)
        time.sleep(dice.uniform(0, 0.8))
        os.kill(rank(folder, dice.randrange(2))["pid"], signal.SIGKILL)
    assert started.wait() == 0, started.said
    started.assert_nobody_left()
    assert folder.lines("run_started") == 4
    assert_same(folder, one)


def test_nobody_is_left_when_the_program_itself_is_killed(one, new_folder, tmp_path):
    folder = new_folder(tmp_path, **TWO)
    started = folder.start()
    folder.wait_for("step", started, count=7)
    os.kill(started.pid, signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    started.assert_nobody_left()
    folder.train("--resume")
    assert_same(folder, one)


def test_a_sigterm_to_everybody_is_survived_until_all_is_saved(new_folder, tmp_path):
    folder = new_folder(tmp_path, **(TWO | {"train__max_steps": 4000}))
    started = folder.start(whole=True)
    folder.wait_for("step", started, count=7)
    os.killpg(started.pid, signal.SIGTERM)  # as schedulers do
    assert started.wait() == 130, started.said
    started.assert_nobody_left()
    assert folder.checkpoints()[-1] == f"step-{losses(folder)[-1][0]:08d}"


def test_workers_that_are_fresh_processes_as_where_there_is_a_gpu(one, new_folder, tmp_path):
    folder = new_folder(tmp_path, **TWO)
    started = folder.start(fresh=True)
    folder.wait_for("step", started, count=7, seconds=120)
    os.killpg(started.pid, signal.SIGTERM)
    assert started.wait() == 130, started.said
    started.assert_nobody_left()
    folder.train("--resume")
    assert_same(folder, one)


def test_interrupted_and_resumed_on_one_device_more(one, new_folder, tmp_path):
    folder = new_folder(tmp_path)
    folder.write(**(TWO | {"strategy": "single", "limits__devices": 1}))
    started = folder.start()
    folder.wait_for("step", started, count=5)
    os.kill(started.pid, signal.SIGINT)
    assert started.wait() == 130
    folder.write(**TWO)
    started = folder.start("--resume")
    folder.wait_for("step", started, count=20)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: everyone hears it
    assert started.wait() == 130, started.said
    started.assert_nobody_left()
    folder.train("--resume")
    assert_same(folder, one)


def test_started_by_torchrun(one, new_folder, tmp_path):
    folder = new_folder(tmp_path, **{name: value for name, value in TWO.items() if name != "limits__devices"})
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kitaeru", "train"]
    done = subprocess.run(
        [sys.executable, *words, "recipe.yaml", "--plain"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(folder, one)
