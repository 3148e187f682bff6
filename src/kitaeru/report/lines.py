"""One line for each event worth a line of its own: above the live display, and among the plain lines."""

from __future__ import annotations

from rich.text import Text

from kitaeru.events import DataReady, Evaluated, Event, Notice, Preflight, RunFinished, RunStarted, Saved, SteppedDown
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan
from kitaeru.report.wording import (
    bytes_text,
    clean,
    clock_text,
    count_text,
    layout_text,
    loss_text,
    outcome_text,
    percent_text,
    preflight_text,
    split_text,
    stepped_text,
    value_text,
)

_NOTICE_STYLES = {"warning": "yellow", "error": "bold red"}


def event_line(event: Event) -> Text | None:
    """The line for `event`; None for those that are shown in other ways (steps, samples)."""
    match event:
        case Notice():
            return _notice(event)
        case DataReady():
            return _data(event)
        case Evaluated():
            best = " ★ " + tr("best") if event.best and event.step > 0 else ""
            text = tr("validation at step {step}: loss {loss}", step=event.step, loss=loss_text(event.loss))
            return Text(f"{text} ({clock_text(event.seconds)}){best}", style="cyan")
        case Saved():
            return Text(
                tr(
                    "saved step {step}: {path} ({size})", step=event.step, path=event.path, size=bytes_text(event.bytes)
                ),
                style="dim",
            )
        case SteppedDown():
            return _notice(Notice(level="warning", text=stepped_text(event), step=event.step))
        case Preflight():
            return Text(preflight_text(event), style="dim")
        case RunStarted() if event.resumed_step > 0:
            return Text(tr("going on after step {step} of {total}", step=event.resumed_step, total=event.max_steps))
        case RunFinished():
            words = f"{outcome_text(event.outcome)} · " + tr("step {step}", step=event.step)
            return Text(clean(f"{words} · {event.reason}" if event.reason else words), style="bold")
        case _:
            return None


def plan_lines(plan: Plan) -> list[Text]:
    """What will happen; below it (to be set in) its predicted memory, and every value that was decided, with why."""
    lines = [
        Text.assemble((tr("Plan: "), "bold"), layout_text(plan.layout)),
        Text(tr("predicted peak memory {size}", size=bytes_text(plan.chosen.peak_bytes)), style="dim"),
    ]
    for decision in plan.decisions:
        value = f"{decision.path} = {value_text(decision.value)}"
        lines.append(Text.assemble((value, "cyan"), (f"  {clean(decision.why)}", "dim")))
    return lines


def _notice(event: Notice) -> Text:
    style = _NOTICE_STYLES.get(event.level, "")
    marks = {"warning": tr("warning: "), "error": tr("error: ")}
    text = Text(marks.get(event.level, "") + clean(event.text), style=style)
    for example in event.examples[:5]:
        text.append("\n  " + clean(example), style="dim")
    return text


def _short(kinds: dict[str, str]) -> dict[str, str]:
    """Sources by file name where no two share one; the recipe and the page have the whole paths."""
    names = {path: path.rstrip("/").rsplit("/", 1)[-1] for path in kinds}
    return {names[p] if list(names.values()).count(names[p]) == 1 else p: kind for p, kind in kinds.items()}


def _data(event: DataReady) -> Text:
    line = tr(
        "data ({split}): {examples} examples, {tokens} tokens, {share} trained, longest {longest}",
        split=split_text(event.split),
        examples=count_text(event.examples),
        tokens=count_text(event.tokens),
        share=percent_text(event.trained_tokens / event.tokens) if event.tokens else "—",
        longest=count_text(event.longest),
    )
    if event.kinds:
        line += " · " + ", ".join(f"{clean(name)}: {clean(kind)}" for name, kind in _short(event.kinds).items())
    if event.left_out:
        reasons = ", ".join(f"{clean(reason)}: {count_text(count)}" for reason, count in event.left_out.items())
        line += " · " + tr("left out: {reasons}", reasons=reasons)
    return Text(line, style="dim")
