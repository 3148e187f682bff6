"""Resuming: what is damaged is passed over, what is full is told, what has changed is refused."""

import json
import resource
import shutil

import pytest

from kitaeru.events import Evaluated, Notice, RunFinished, Saved, Step, read


@pytest.fixture(scope="module")
def whole(new_folder, tmp_path_factory):
    """A finished run of 24 steps that nothing happened to."""
    folder = new_folder(tmp_path_factory.mktemp("whole"))
    folder.train()
    return folder


@pytest.fixture
def stopped(new_folder, tmp_path):
    """The same run, ended by a loss that is no number after the checkpoints of steps 9 and 12."""
    folder = new_folder(tmp_path)
    cut(folder)
    return folder


def cut(folder):
    """Run to the end and take away what lies after step 12: as if it had been killed then."""
    folder.train("--set", "train.keep_checkpoints=20")
    for path in (folder.run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 12:
            shutil.rmtree(path)
    shutil.rmtree(folder.run / "adapter")
    lines = folder.log.read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"kind": "step"' in line and json.loads(line)["step"] == 14)
    folder.log.write_text("".join(lines[: last + 1]) + lines[last + 1][:20])  # torn


def assert_ends_like(folder, whole):
    assert [s.loss for s in folder.events(Step)] == [s.loss for s in whole.events(Step)]
    assert [(e.step, e.loss) for e in folder.events(Evaluated)] == [(e.step, e.loss) for e in whole.events(Evaluated)]
    assert folder.adapter() == whole.adapter()


def test_a_resumed_run_is_the_run_that_would_have_been(stopped, whole):
    stopped.train("--resume")
    assert_ends_like(stopped, whole)
    starts = [json.loads(x) for x in stopped.log.read_text().splitlines() if '"kind": "run_started"' in x]
    assert [s["resumed_step"] for s in starts] == [0, 12]


def test_the_run_folder_alone_is_enough_to_resume(stopped, whole):
    (stopped.path / "recipe.yaml").unlink()
    started = stopped.starter.start("train", "run", "--resume", "--plain", cwd=stopped.path)
    assert started.wait() == 0, started.said
    assert_ends_like(stopped, whole)


def test_resuming_a_finished_run_changes_nothing(whole):
    before, losses = whole.adapter(), [s.loss for s in whole.events(Step)]
    whole.train("--resume")
    assert whole.adapter() == before
    assert [s.loss for s in whole.events(Step)] == losses


@pytest.mark.parametrize("damage", ["truncated", "one bit", "no manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over(stopped, whole, damage):
    newest = stopped.run / "checkpoints" / "step-00000012"
    tensors = newest / "state.safetensors"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-1000])
    elif damage == "one bit":
        data = bytearray(tensors.read_bytes())
        data[-7] ^= 4
        tensors.write_bytes(data)
    else:
        (newest / "manifest.json").unlink()
    said = stopped.train("--resume")
    assert "step-00000012 is damaged" in said
    [notice] = [n for n in stopped.events(Notice) if "step-00000012" in n.text]
    assert notice.level == "warning"
    assert_ends_like(stopped, whole)


def test_a_full_disk_is_told_and_the_run_goes_on_later(new_folder, whole, tmp_path):
    folder = new_folder(tmp_path)
    size = max(p.stat().st_size for p in (whole.run / "checkpoints").rglob("*.safetensors"))
    # Token cache, page and log are smaller than a checkpoint here: the checkpoint is what does not fit.
    said = folder.train(code=1, file_bytes=size // 2)
    assert "checkpoint could not be written" in said
    assert "Free space on this disk" in said
    assert "Traceback" not in said
    assert folder.checkpoints() == []
    assert folder.events(RunFinished)[-1].outcome == "failed"
    folder.train("--resume")
    assert_ends_like(folder, whole)


def test_a_disk_that_fills_up_later_leaves_the_old_checkpoints_whole(stopped, whole):
    before = {p.name: (p / "state.safetensors").read_bytes() for p in (stopped.run / "checkpoints").glob("step-*")}
    size = max(len(data) for data in before.values())
    stopped.train("--resume", code=1, file_bytes=size // 2)
    after = {p.name: (p / "state.safetensors").read_bytes() for p in (stopped.run / "checkpoints").glob("step-*")}
    assert after == before
    failed = stopped.events(RunFinished)[-1]
    assert (failed.outcome, failed.step) == ("failed", 15)
    stopped.train("--resume")
    assert_ends_like(stopped, whole)


def test_a_log_that_cannot_grow_is_a_clear_error(stopped, whole):
    said = stopped.train("--resume", code=1, file_bytes=stopped.log.stat().st_size + 300)
    assert "The log of the run cannot be written" in said
    assert "--resume" in said
    assert "Traceback" not in said
    stopped.train("--resume")
    assert_ends_like(stopped, whole)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # here nothing was limited


def test_another_learning_rate_is_refused(stopped):
    before = stopped.log.read_bytes(), (stopped.run / "recipe.yaml").read_bytes()
    said = stopped.train("--resume", "--set", "train.learning_rate=1e-4", code=1)
    assert "train.learning_rate: 0.005 → 0.0001" in said
    assert "`output`" in said
    assert (stopped.log.read_bytes(), (stopped.run / "recipe.yaml").read_bytes()) == before


def test_other_data_is_refused(stopped):
    path = stopped.path / "train.jsonl"
    path.write_text(path.read_text().replace("富士山です。", "高尾山です。", 1))
    said = stopped.train("--resume", code=1)
    assert "data.train: the content changed" in said


def test_a_data_file_may_move(stopped, whole):
    (stopped.path / "train.jsonl").rename(stopped.path / "moved.jsonl")
    stopped.write(data__train="moved.jsonl")
    stopped.train("--resume")
    assert_ends_like(stopped, whole)


def test_what_may_change_on_the_way_does_change(stopped, whole):
    stopped.train("--resume", "--set", "train.save_every=1", "--set", "train.keep_checkpoints=50")
    assert [s.loss for s in stopped.events(Step)] == [s.loss for s in whole.events(Step)]
    assert [s.step for s in stopped.events(Saved)][-12:] == list(range(13, 25))
    assert json.loads((stopped.run / "plan.json").read_text())["recipe"]["train"]["save_every"] == 1
    assert "save_every: 1" in (stopped.run / "recipe.yaml").read_text()


def test_a_folder_that_holds_a_run_is_not_written_over(whole):
    before = whole.log.read_bytes()
    said = whole.train(code=2)
    assert "run already holds a run" in said
    assert "--resume" in said
    assert whole.log.read_bytes() == before


def test_resume_without_a_folder_is_refused(new_folder, tmp_path):
    folder = new_folder(tmp_path, output=None)
    said = folder.train("--resume", code=2)
    assert "does not know which run" in said
    assert not (tmp_path / "runs").exists()


def test_an_early_stop_is_final(new_folder, tmp_path):
    """A wild rate makes validation worse at once; resuming must not train another step."""
    folder = new_folder(
        tmp_path,
        train__learning_rate=1.0,
        train__early_stop=2,
        train__eval_every=2,
        train__save_every=2,
        train__max_steps=40,
        train__keep_checkpoints=1,
        train__max_grad_norm=0.0,
    )
    folder.train()
    finished = folder.events(RunFinished)[-1]
    assert finished.outcome == "stopped_early"
    losses = {e.step: e.loss for e in folder.events(Evaluated) if e.step}
    assert finished.step == max(losses) < 40
    assert finished.best_step == min(losses, key=losses.__getitem__)
    before, steps = folder.adapter(), len(folder.events(Step))
    folder.train("--resume")
    assert len(folder.events(Step)) == steps
    assert folder.adapter() == before
    assert folder.events(RunFinished)[-1].outcome == "stopped_early"
    assert len(list(read(folder.log))) > steps


def test_a_run_folder_that_cannot_be_made_is_a_clear_error(new_folder, tmp_path):
    (tmp_path / "file").write_text("")
    folder = new_folder(tmp_path, output="file/run")
    said = folder.train(code=1)
    assert "The run folder cannot be written" in said
    assert "--set output=FOLDER" in said
