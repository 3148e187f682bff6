from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from rich.cells import cell_len
from rich.console import Console

from kitaeru.events import Notice
from kitaeru.plan.types import Plan
from kitaeru.report.closing import print_samples, print_summary
from kitaeru.report.history import History
from kitaeru.report.live import LiveView, live_view
from kitaeru.report.plain import PlainView

Make = Callable[..., Path]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def terminal(width: int, **environ: str) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=True, _environ={"TERM": "xterm-256color", **environ}), file


def pipe() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, _environ={}), file


def shown(console: Console, view: LiveView) -> list[str]:
    with console.capture() as capture:
        console.print(view.render())
    return ESCAPES.sub("", capture.get()).splitlines()


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
def test_the_display_fits_the_terminal(width: int, made: ModuleType) -> None:
    console, _ = terminal(width)
    view = LiveView(console)
    start = replace(made.started(60), run="runs/長い名前の実行フォルダ" * 6, model="東京/日本語大規模言語モデル" * 5)
    for event in [start, *made.data(), *made.events(60)]:
        view(event)
    view.phase("データを読み込んでいます" * 5, 120, 400)
    lines = shown(console, view)
    assert max(cell_len(line) for line in lines) <= min(width, 100)
    assert len(lines) <= 14


def test_the_display_says_where_the_run_stands(made: ModuleType) -> None:
    console, _ = terminal(80)
    view = LiveView(console)
    for event in [made.started(60), *made.events(60, last=37)]:
        view(event)
    text = "\n".join(shown(console, view))
    assert "quickstart" in text
    assert "37/60" in text
    assert f"{made.step(37, 60).loss:.3f}" in text
    assert "371 MB" in text
    assert "★ best" in text
    assert "left" in text


def test_a_resumed_display_starts_where_the_run_does(made: ModuleType) -> None:
    console, _ = terminal(80)
    view = LiveView(console)
    view(made.started(60, resumed=36))
    assert any("36/60" in line for line in shown(console, view))


def test_a_phase_shows_before_the_run_and_goes_when_done(made: ModuleType) -> None:
    console, _ = terminal(80)
    view = LiveView(console)
    view.phase("Tokenising", 120, 400)
    assert any("Tokenising" in line and "120/400" in line for line in shown(console, view))
    view.phase("Tokenising", 400, 400)
    assert not any("Tokenising" in line for line in shown(console, view))


def test_notices_and_plan_scroll_above_and_the_cursor_comes_back(made: ModuleType) -> None:
    console, file = terminal(80)
    with live_view(console) as view:
        view.show_plan(made.plan(60))
        view(made.started(60))
        view(Notice(level="warning", text="[bold]not markup[/bold] \x1b[31m"))
        for event in made.events(60, last=3):
            view(event)
    text = file.getvalue()
    assert "[bold]not markup[/bold] [31m" in ESCAPES.sub("", text)
    assert "A CPU computes bf16 slower than fp32." in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_no_color_has_no_colours(made: ModuleType) -> None:
    console, _ = terminal(80, NO_COLOR="1")
    view = LiveView(console)
    for event in [made.started(60), *made.events(60)]:
        view(event)
    with console.capture() as capture:
        console.print(view.render())
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", capture.get())


def test_the_kind_of_view_follows_the_console() -> None:
    assert isinstance(live_view(terminal(80)[0]), LiveView)
    assert isinstance(live_view(terminal(80)[0], plain=True), PlainView)
    assert isinstance(live_view(terminal(80, TERM="dumb")[0]), PlainView)
    assert isinstance(live_view(pipe()[0]), PlainView)


def test_plain_lines(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("kitaeru.report.plain.time.monotonic", lambda: clock[0])
    console, file = pipe()
    with live_view(console) as view:
        view.phase("Loading the model", 0, 0)
        for done in (0, 10, 20, 100):
            view.phase("Tokenising", done, 100)
        view.show_plan(made.plan(60))
        for event in [made.started(60), *made.data(), *made.events(60), *made.finish(60)]:
            clock[0] += 0.25
            view(event)
        view(Notice(level="error", text="a\x1b[2Jb\rc", examples=("x\x07",)))
    text = file.getvalue()
    assert not CONTROL.search(text)
    lines = text.splitlines()
    assert lines[:3] == ["Loading the model …", "Tokenising: 0/100", "Tokenising: 100/100"]
    steps = [int(m[1]) for m in re.finditer(r"^step (\d+)/60 ", text, re.MULTILINE)]
    assert steps[0] == 1
    assert steps[-1] == 60
    # 86 events a quarter of a second apart: a line every two seconds, and one for the last step.
    assert 6 <= len(steps) <= 12
    assert sum(line.startswith("validation at step") for line in lines) == 6
    assert sum(line.startswith("saved step") for line in lines) == 5
    assert lines[-2:] == ["error: a[2Jbc", "  x"]


def test_time_left_counts_validation_and_saving_too(made: ModuleType) -> None:
    from kitaeru.report.progress import Progress

    progress = Progress()
    progress.see(made.started(60))
    assert progress.seconds_left(0) is None
    for n in (1, 11):  # 0.6 s a step, of which 0.59 s are the step itself
        progress.see(made.step(n, 60))
    now = made.step(11, 60).time
    assert progress.seconds_left(now) == pytest.approx(49 * 0.6)
    assert progress.seconds_left(now + 5) == pytest.approx(49 * 0.6 - 5)
    assert progress.seconds_left(now + 1000) == 0


@pytest.mark.parametrize("width", [40, 80, 160])
def test_samples_side_by_side_or_one_below_the_other(width: int, run_dir: Path) -> None:
    console, file = terminal(width)
    print_samples(console, History.load(run_dir))
    lines = ESCAPES.sub("", file.getvalue()).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    together = any("山は山の山です。" in line and "富士山" in line for line in lines)
    assert together == (width >= 56)


def test_samples_of_a_killed_run_have_a_dash(make: Make) -> None:
    console, file = pipe()
    print_samples(console, make("killed"))
    assert "—" in file.getvalue()


def test_summary(run_dir: Path) -> None:
    (run_dir / "report.html").write_text("x", encoding="utf-8")
    console, file = pipe()
    print_summary(console, History.load(run_dir).events, run_dir)
    text = file.getvalue().replace("\n", "").replace(" ", "")
    assert "3.450→1.977(-42.7%)" in text
    assert "60/60" in text
    for path in (run_dir, run_dir / "adapter", run_dir / "report.html"):
        assert str(path) in text
    console, again = pipe()
    print_summary(console, run_dir)
    assert again.getvalue() == file.getvalue()


def test_summary_of_a_run_that_only_began(make: Make) -> None:
    console, file = pipe()
    print_summary(console, make("begun"))
    assert "going, or killed" in file.getvalue()


def test_the_plan_is_shown_with_its_reasons(made: ModuleType) -> None:
    plan: Plan = made.plan(60)
    console, file = pipe()
    live_view(console).show_plan(plan)
    for decision in plan.decisions:
        assert decision.why in file.getvalue()


SCRIPT = """
import sys, time
from rich.console import Console
from kitaeru.events import Notice, RunStarted, Step
from kitaeru.report.live import live_view

console = Console()
with live_view(console) as view:
    view.phase("Tokenising", 1, 2)
    view(RunStarted(run="runs/東京", model="m", method="lora", strategy="single", device="cpu", max_steps=3))
    for n in (1, 2, 3):
        view(Step(step=n, loss=3.0 - n, tokens=9, trained_tokens=9, tokens_per_second=9.0, learning_rate=1e-4,
                  grad_norm=1.0, peak_bytes=10**9, epoch=0.1, seconds=0.1))
        time.sleep(0.3)
        print("a library prints", n)
    if "interrupt" in sys.argv:
        raise KeyboardInterrupt
"""


@pytest.mark.parametrize("how", ["finish", "interrupt"])
def test_in_a_real_terminal(how: str) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, how], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    chunks: list[bytes] = []
    with contextlib.suppress(OSError):  # Linux ends a terminal whose other side is closed with EIO
        while chunk := os.read(master, 65536):
            chunks.append(chunk)
    os.close(master)
    assert (process.wait(60) == 0) == (how == "finish")
    raw = b"".join(chunks).decode()
    text = ESCAPES.sub("", raw)
    assert "東京" in text
    assert "1/3" in text
    assert "3/3" in text
    assert all(f"a library prints {n}" in text for n in (1, 2, 3))
    assert max(cell_len(line) for line in re.split(r"[\r\n]+", text) if "Error" not in line) <= 80
    # The cursor was hidden and is shown again, whatever happened.
    assert "\x1b[?25l" in raw
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")
