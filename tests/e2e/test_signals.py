"""Ctrl-C and SIGTERM: saved, told, resumed as if nothing had been."""

import os
import signal

import pytest

from kitaeru.events import Notice, RunFinished, Step


@pytest.fixture(scope="module")
def whole(new_folder, tmp_path_factory):
    folder = new_folder(tmp_path_factory.mktemp("whole"), train__max_steps=40)
    folder.train()
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(number, whole, new_folder, tmp_path):
    folder = new_folder(tmp_path, train__max_steps=40)
    started = folder.start()
    folder.wait_for("step", started, count=5)
    os.kill(started.pid, number)
    assert started.wait() == 130, started.said
    done = len(folder.events(Step))
    assert 5 <= done < 40
    assert folder.checkpoints()[-1] == f"step-{done:08d}"
    assert f"Stopped after step {done} of 40; everything is saved." in started.said
    assert "kitaeru train run --resume" in started.said
    assert folder.events(RunFinished)[-1].outcome == "interrupted"
    assert any("Stopping after this step" in n.text for n in folder.events(Notice))
    assert not (folder.run / "adapter").exists()
    assert (folder.run / "report.html").exists()
    folder.train("--resume")
    assert [s.loss for s in folder.events(Step)] == [s.loss for s in whole.events(Step)]
    assert folder.adapter() == whole.adapter()


def test_a_signal_while_it_starts_ends_it_and_it_can_begin_again(new_folder, tmp_path):
    folder = new_folder(tmp_path, train__max_steps=2)
    started = folder.start()
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait() in (-signal.SIGTERM, 130)
    folder.train("--resume")
    assert len(folder.events(Step)) == 2
