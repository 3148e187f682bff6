"""What a person sees while it runs: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kitaeru.events import Evaluated, Event, RunFinished, RunStarted, Step
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan
from kitaeru.report.curve import sparkline
from kitaeru.report.lines import event_line, plan_lines
from kitaeru.report.plain import PlainView
from kitaeru.report.progress import Progress
from kitaeru.report.prose import Prose
from kitaeru.report.usage import device_text, reading_text, waits_text
from kitaeru.report.wording import (
    bytes_text,
    clean,
    clock_text,
    count_text,
    loss_text,
    number_text,
    percent_text,
    rate_text,
    run_name,
)

_WIDEST = 100
_NARROW = 60


class View(Protocol):
    """A listener that shows a run to a person; used as a context manager around the run."""

    def __call__(self, event: Event) -> None:
        """Show `event`."""
        ...

    def phase(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done of the work called `name` (already translated); 0 = total unknown."""
        ...

    def show_plan(self, plan: Plan) -> None:
        """Show what will happen and why, before it starts."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def live_view(console: Console, plain: bool | None = None, every: int | None = None) -> View:
    """The view for `console`: live where it is a terminal that can redraw, else plain lines; `plain` decides it.

    Plain lines have one for a step at most every two seconds, or for `every` so many steps.
    """
    if plain is None:
        plain = not console.is_terminal or console.is_dumb_terminal
    return PlainView(console, every) if plain else LiveView(console)


class LiveView:
    """A display that redraws itself in place; notices, validations and saves scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress()
        self._phase: tuple[str, int, int] | None = None
        self._live = Live(
            console=console, get_renderable=self.render, refresh_per_second=4, transient=False, redirect_stderr=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase = None
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show `event`."""
        if isinstance(event, RunStarted | Step | Evaluated | RunFinished):
            self._phase = None
        self._progress.see(event)
        line = event_line(event)
        if line is not None:
            self._console.print(Prose(line))

    def phase(self, name: str, done: int, total: int) -> None:
        """A progress bar of its own while something is read, tokenised or loaded; gone when it is done."""
        self._phase = None if total and done >= total else (name, done, total)

    def show_plan(self, plan: Plan) -> None:
        """Print the plan above the display."""
        first, *rest = plan_lines(plan)
        self._console.print(Prose(first))
        for line in rest:
            self._console.print(Padding(Prose(line), (0, 0, 0, 2)))

    def render(self) -> RenderableType:
        """The display now."""
        width = min(self._console.width, _WIDEST)
        started = self._progress.started
        inner = width - 4
        parts: list[RenderableType] = []
        if started:
            parts += [_header(started), _bar_line(self._progress, inner), _figures(self._progress, inner)]
            parts += [_devices(self._progress, inner)] if self._progress.devices else []
        if self._phase:
            parts.append(_phase_line(*self._phase, inner))
        if not parts:
            return Text()
        title = Text.assemble(("kitaeru", "bold red"), (f" · {run_name(started)}" if started else "", "bold"))
        title.truncate(inner - 4, overflow="ellipsis")
        return Panel(Group(*parts), title=title, title_align="left", border_style="dim", width=width, box=box.ROUNDED)


def _header(started: RunStarted) -> Text:
    text = Text(clean(started.model), style="bold", no_wrap=True, overflow="ellipsis")
    text.append(f" · {started.method} · {started.strategy} · {clean(started.device)}", style="dim")
    return text


def _bar(done: int, total: int, width: int) -> ProgressBar:
    # Without a total the bar pulses.
    return ProgressBar(
        total=total or None,
        completed=done,
        width=max(4, width),
        pulse=not total,
        complete_style="red",
        finished_style="green",
    )


def _beside_bar(left: Text, done: int, total: int, right: Text, width: int) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(left, _bar(done, total, width - left.cell_len - right.cell_len - 2), right)
    return row


def _bar_line(progress: Progress, width: int) -> Table:
    left = Text(f"{count_text(progress.done)}/{count_text(progress.total)}", no_wrap=True)
    seconds = progress.seconds_left(time.time())
    right = Text("", no_wrap=True)
    if progress.finished:
        right = Text(clock_text(progress.finished.seconds), no_wrap=True)
    elif seconds is not None:
        right = Text(tr("{time} left", time=clock_text(seconds)), no_wrap=True)
    return _beside_bar(left, progress.done, progress.total, right, width)


def _phase_line(name: str, done: int, total: int, width: int) -> Table:
    left = Text(clean(name), no_wrap=True, overflow="ellipsis")
    left.truncate(max(8, width // 2), overflow="ellipsis")
    counted = f"{count_text(done)}/{count_text(total)}" if total else (count_text(done) if done else "")
    right = Text(counted, no_wrap=True)
    return _beside_bar(left, done, total, right, width)


def _figures(progress: Progress, width: int) -> Table:
    pairs = _pairs(progress, width)
    columns = 1 if width < _NARROW - 4 else 2
    grid = Table.grid(padding=(0, 2), expand=False)
    for _ in range(columns):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
    rows = (len(pairs) + columns - 1) // columns
    for i in range(rows):
        cells: list[Text | str] = []
        for label, value in pairs[i::rows]:
            cells += [label, value]
        grid.add_row(*cells)
    return grid


def _devices(progress: Progress, width: int) -> Table:
    """A line for each device; hosts are named where there are several."""
    grid = Table.grid(padding=(0, 2), expand=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis", max_width=width - 8)
    for host, look in progress.devices.items():
        for reading in look.readings:
            name = device_text(reading.device)
            label = f"{clean(host)} {name}" if len(progress.devices) > 1 else name
            style = "yellow" if reading.throttles else "" if reading.used else "dim"
            grid.add_row(label, Text(clean(reading_text(reading)), style))
    return grid


def _pairs(progress: Progress, width: int) -> list[tuple[str, Text]]:
    """Labels and values, in columns: what is learnt first, what it costs second."""
    step = progress.step
    loss = Text(loss_text(step.loss if step else None), style="bold")
    smoothed = Text(loss_text(progress.smoothed_loss) + " ")
    smoothed.append(sparkline(list(progress.losses), 14 if width < 84 else 24), style="red")
    return [
        (tr("loss"), loss),
        (tr("smoothed"), smoothed),
        (tr("validation"), _validation(progress)),
        (tr("learning rate"), Text(rate_text(step.learning_rate) if step else "—")),
        (tr("grad norm"), Text(number_text(step.grad_norm) if step else "—")),
        (tr("speed"), Text(tr("{count} tokens/s", count=count_text(step.tokens_per_second)) if step else "—")),
        (tr("peak memory"), Text(bytes_text(progress.peak_bytes) if step else "—")),
        (tr("epoch"), Text(f"{step.epoch:.2f}" if step else "—")),
        *_shares(progress),
    ]


def _shares(progress: Progress) -> list[tuple[str, Text]]:
    """MFU, and what a step waits for; two or none, so that the columns stay even."""
    step, share = progress.step, progress.mfu
    if step is None or not step.rank_seconds or not step.seconds > 0:
        return []
    return [
        (tr("MFU"), Text("—" if share is None else percent_text(share))),
        (tr("waiting"), Text(waits_text(step))),
    ]


def _validation(progress: Progress) -> Text:
    if progress.evaluated is None:
        return Text("—")
    text = Text(loss_text(progress.evaluated.loss))
    if progress.best is progress.evaluated and progress.evaluated.step > 0:
        text.append(" ★ " + tr("best"), style="green")
    elif progress.best is not None and progress.best is not progress.evaluated:
        text.append(" " + tr("(best {loss})", loss=loss_text(progress.best.loss)), style="dim")
    return text
