from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kitaeru.errors import MissingLibraryError
from kitaeru.events import Event, Notice
from kitaeru.events import read as read_events
from kitaeru.recipe.types import TrackSection
from kitaeru.report.trackers import Background, Guarded, Tracker, trackers

Make = Callable[..., Path]
NOTHING = TrackSection(tensorboard=False)


def follow(events: list[Event], run_dir: Path, section: TrackSection | None = None) -> list[Notice]:
    notices: list[Notice] = []
    config = {"model": {"name": "bundled"}, "train": {"seed": 3}}
    found = trackers(section or TrackSection(), run_dir, config, notices.append)
    for event in events:
        for tracker in found:
            tracker(event)
    for tracker in found:
        tracker.close()
    return notices


def read(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_what_happened(made: ModuleType, run_dir: Path) -> None:
    events = list(read_events(run_dir / "events.jsonl"))
    assert follow(events, run_dir) == []
    found = read(run_dir)
    losses = found.Scalars("train/loss")
    assert [s.step for s in losses] == list(range(1, 61))
    assert [s.value for s in losses] == pytest.approx([made.step(n, 60).loss for n in range(1, 61)], rel=1e-6)
    assert losses[4].wall_time == pytest.approx(made.step(5, 60).time)
    assert [s.step for s in found.Scalars("eval/loss")] == [0, 12, 24, 36, 48, 60]
    for name in ("learning_rate", "grad_norm", "tokens_per_second", "peak_bytes", "epoch"):
        assert len(found.Scalars(f"train/{name}")) == 60
    texts = {tag: found.Tensors(tag) for tag in found.Tags()["tensors"]}
    recipe = texts["recipe"][0].tensor_proto.string_val[0].decode()
    assert '"seed": 3' in recipe
    sample = texts["samples/日本で一番高い山は何ですか?"]
    assert [s.step for s in sample] == [0, 60]
    assert "富士山" in sample[1].tensor_proto.string_val[0].decode()


def test_tensorboard_forgets_void_steps_of_a_resumed_run(made: ModuleType, tmp_path: Path) -> None:
    void = [made.step(n, 60, loss=99.0) for n in range(37, 41)]
    follow([made.started(60), *made.events(60, last=36), *void], tmp_path)
    follow([made.started(60, resumed=36, at=made.T0 + 1000), *made.events(60, first=37)], tmp_path)
    losses = read(tmp_path).Scalars("train/loss")
    assert [s.step for s in losses] == list(range(1, 61))
    assert max(s.value for s in losses) < 10
    assert [s.step for s in read(tmp_path).Scalars("eval/loss")] == [0, 12, 24, 36, 48, 60]


def test_nothing_is_written_when_nothing_is_named(made: ModuleType, tmp_path: Path) -> None:
    assert trackers(NOTHING, tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_the_environment_never_reaches_a_tracker(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "wandbsecret")
    follow([made.started(60), *made.events(60)], tmp_path)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written
    assert b"secret" not in written


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingLibraryError) as caught:
            trackers(TrackSection(tensorboard=False, **{name: "project"}), tmp_path, {})
        assert f"kitaeru[{name}]" in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_folder_that_cannot_be_written_is_one_notice(made: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way", encoding="utf-8")
    notices = follow([made.started(60), *made.events(60)], tmp_path)
    assert len(notices) == 1
    assert notices[0].level == "warning"
    assert "TensorBoard" in notices[0].text


class Failing:
    """A tracker that fails from its second event on."""

    name = "failing"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, event: Event) -> None:
        self.seen += 1
        if self.seen > 1:
            raise OSError("no network\nand a long story")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is not closed")


def test_a_failing_tracker_is_told_once_even_when_the_notice_comes_back_to_it() -> None:
    inner = Failing()
    notices: list[Notice] = []

    def tell(notice: Notice) -> None:
        notices.append(notice)
        guarded(notice)  # as the engine would, which sends every event to every listener

    guarded = Guarded(inner, tell)
    for _ in range(5):
        guarded(Notice(level="info", text="x"))
    guarded.close()
    assert inner.seen == 2
    assert len(notices) == 1
    assert notices[0].text.endswith("no network")


def test_a_slow_tracker_does_not_hold_up_training() -> None:
    gate = threading.Event()
    seen: list[Event] = []

    class Slow:
        name = "slow"
        closed = False

        def __call__(self, event: Event) -> None:
            assert gate.wait(20)
            seen.append(event)

        def close(self) -> None:
            Slow.closed = True

    inner: Tracker = Slow()
    notices: list[Notice] = []
    tracker = Background(inner, notices.append)
    events = [Notice(level="info", text=str(n)) for n in range(100)]
    for event in events:
        tracker(event)  # would deadlock here if it waited
    assert seen == []
    gate.set()
    tracker.close()
    assert seen == events
    assert Slow.closed
    assert notices == []


def test_a_tracker_that_never_answers_is_told_and_left_behind() -> None:
    gate = threading.Event()

    class Stuck:
        name = "stuck"

        def __call__(self, event: Event) -> None:
            gate.wait(20)

        def close(self) -> None:
            return None

    notices: list[Notice] = []
    tracker = Background(Stuck(), notices.append, close_seconds=0.05)
    tracker(Notice(level="info", text="x"))
    tracker.close()
    gate.set()
    assert [notice.level for notice in notices] == ["warning"]
    assert "stuck" in notices[0].text


def test_mlflow_in_a_local_store(made: ModuleType, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((run_dir / "store").as_uri())
    section = TrackSection(tensorboard=False, mlflow="experiment")
    assert follow([made.started(60), *made.data(), *made.events(60, last=36)], run_dir, section) == []
    resumed = [made.started(60, resumed=36), *made.events(60, first=37), *made.finish(60)]
    assert follow(resumed, run_dir, section) == []
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.seed"] == "3"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == list(range(1, 61))


def test_wandb_offline(made: ModuleType, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    section = TrackSection(tensorboard=False, wandb="project")
    assert follow([made.started(60), *made.events(60), *made.finish(60)], run_dir, section) == []
    (log,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert log.stat().st_size > 1000
    assert b"train/grad_norm" in log.read_bytes()


def test_trackio_locally(made: ModuleType, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run_dir / "trackio"))
    pytest.importorskip("trackio")
    section = TrackSection(tensorboard=False, trackio="project")
    assert follow([made.started(60), *made.events(60), *made.finish(60)], run_dir, section) == []
    assert any(path.suffix == ".db" for path in (run_dir / "trackio").rglob("*"))
