"""What a person sees when it is over: answers before and after, and what was reached and where it lies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kitaeru.events import Event
from kitaeru.i18n import tr
from kitaeru.report.history import Answers, History, history
from kitaeru.report.wording import (
    bytes_text,
    clean,
    count_text,
    duration_text,
    loss_text,
    outcome_text,
    percent_text,
)

_SIDE_BY_SIDE = 56


def print_samples(console: Console, events: Path | Iterable[Event] | History) -> None:
    """Print every question with its answer before and after training, side by side where the width allows it."""
    for answers in history(events).answers:
        console.print()
        console.print(Text.assemble(("■ ", "red"), (clean(answers.prompt), "bold")))
        if console.width >= _SIDE_BY_SIDE:
            console.print(_side_by_side(answers, min(console.width, 120)))
        else:
            for label, answer in ((tr("before"), answers.before), (tr("after"), answers.after)):
                console.print(Text.assemble((f"{label}: ", "dim"), _answer(answer)))


def print_summary(console: Console, events: Path | Iterable[Event] | History, run_dir: Path | None = None) -> None:
    """Print what was reached, what it took, and the paths of the run folder, the result and the report.

    `events` may be the run folder itself; `run_dir` is needed only when it is not.
    """
    past = history(events)
    folder = run_dir or (events if isinstance(events, Path) else None)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    # Paths must stay whole to be copied: they may be wider than the screen.
    grid.add_column(overflow="fold")
    console.print()
    for label, value in [*_figures(past), *(_paths(past, folder) if folder else [])]:
        grid.add_row(label, value)
    console.print(grid)


def _side_by_side(answers: Answers, width: int) -> Table:
    table = Table(box=box.SIMPLE, width=width, padding=(0, 1), header_style="dim")
    after = tr("after ({step} steps)", step=count_text(answers.after_step)) if answers.after_step else tr("after")
    table.add_column(tr("before"), ratio=1, overflow="fold")
    table.add_column(after, ratio=1, overflow="fold")
    table.add_row(_answer(answers.before), _answer(answers.after))
    return table


def _answer(answer: str | None) -> Text:
    if answer is None:
        return Text("—", style="dim")
    return Text(clean(answer).strip() or tr("(empty)"))


def _figures(past: History) -> list[tuple[str, Text]]:
    rows: list[tuple[str, Text]] = []
    finished, before, after = past.finished, past.before, past.after
    rows.append((tr("outcome"), Text(outcome_text(finished.outcome if finished else None))))
    if after:
        text = Text(f"{loss_text(before.loss)} → " if before else "")
        text.append(loss_text(after.loss), style="bold green" if not before or after.loss < before.loss else "bold")
        if before and before.loss:
            text.append(f"  ({(after.loss - before.loss) / before.loss:+.1%})", style="dim")
        rows.append((tr("validation loss"), text))
    steps = past.steps
    if steps:
        total = past.started.max_steps if past.started else steps[-1].step
        rows.append((tr("steps"), Text(f"{count_text(steps[-1].step)} / {count_text(total)}")))
        rows.append((tr("tokens"), Text(f"{count_text(past.tokens)}  ({_trained_share(past)})")))
        rows.append((tr("speed"), Text(tr("{count} tokens/s", count=count_text(past.tokens_per_second)))))
        rows.append((tr("peak memory"), Text(bytes_text(past.peak_bytes))))
    rows.append((tr("time"), Text(duration_text(past.seconds))))
    return rows


def _trained_share(past: History) -> str:
    trained = sum(step.trained_tokens for step in past.steps)
    return tr("{share} trained", share=percent_text(trained / past.tokens if past.tokens else 0))


def _paths(past: History, run_dir: Path) -> list[tuple[str, Text]]:
    rows = [(tr("run folder"), Text(str(run_dir)))]
    if past.finished and past.finished.result:
        result = Path(past.finished.result)
        kind = tr("adapter") if result.name == "adapter" else tr("model")
        # Relative to the run folder, unless it is a path from here.
        rows.append((kind, Text(str(result if result.exists() else run_dir / result))))
    page = run_dir / "report.html"
    if page.exists():
        rows.append((tr("report"), Text(str(page))))
    return rows
