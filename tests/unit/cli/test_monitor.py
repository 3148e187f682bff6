"""Following a run's events as they grow."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kitaeru.cli import main
from kitaeru.cli.monitor import events
from kitaeru.events import Event, EventLog, Notice, RunFinished, RunStarted


def started(resumed: int = 0) -> RunStarted:
    return RunStarted(
        run="r", model="m", method="lora", strategy="single", device="cpu", max_steps=9, resumed_step=resumed
    )


def finished(outcome: str = "finished") -> RunFinished:
    return RunFinished(outcome=outcome, step=9, seconds=1.0, reason="disk full" if outcome == "failed" else "")


def write(path: Path, *told: Event) -> None:
    log = EventLog(path)
    for event in told:
        log(event)
    log.close()


def test_a_finished_run_is_shown_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "events.jsonl", started(), Notice(level="warning", text="GPU 1 is hot"), finished())
    assert main(["monitor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "warning: GPU 1 is hot" in out
    assert "finished · step 9" in out
    assert "\x1b" not in out


def test_a_failed_run_says_so_in_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "events.jsonl", started(), finished("failed"))
    assert main(["monitor", str(tmp_path)]) == 1
    assert "disk full" in capsys.readouterr().out


def test_a_run_that_failed_and_was_resumed_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, started(), finished("failed"), started(3))
    assert [e.kind for e in events(path, follow=False)] == ["run_started", "run_finished", "run_started"]
    write(path, finished())
    assert [e.kind for e in events(path, follow=True)][-1] == "run_finished"


def test_what_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(tmp_path)]) == 2
    assert "events.jsonl" in capsys.readouterr().err


def test_lines_are_taken_as_they_grow(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seen: list[Event] = []
    line = Notice(level="info", text="日本語の行").to_json().encode()

    def follow() -> None:
        seen.extend(events(path, follow=True, poll_seconds=0.01))

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(0.05)  # there is no file yet
    with path.open("ab", buffering=0) as file:
        file.write(started().to_json().encode() + b"\n" + line[:25])  # cut within a character
        time.sleep(0.1)
        assert thread.is_alive()
        file.write(line[25:] + b"\n" + b'{"kind": "of a later version"}\n' + b'{"torn\n')
        file.write(finished().to_json().encode() + b"\n")
    thread.join(10)
    assert [e.kind for e in seen] == ["run_started", "notice", "run_finished"]
    assert isinstance(seen[1], Notice)
    assert seen[1].text == "日本語の行"


def test_silence_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitaeru.cli.monitor._SILENT_SECONDS", 0.03)
    path = tmp_path / "events.jsonl"
    write(path, started())
    told: list[float] = []
    following = events(path, follow=True, silent=told.append, poll_seconds=0.01)
    assert next(following).kind == "run_started"
    timer = threading.Timer(0.3, write, (path, finished()))
    timer.start()
    assert next(following).kind == "run_finished"
    assert len(told) == 1
