"""The sections of the report, each a function from the run to HTML; an empty string where there is nothing to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape

from kitaeru.events import DataReady, Evaluated, Notice, RunStarted
from kitaeru.i18n import tr
from kitaeru.plan.types import Candidate, Plan
from kitaeru.report.chart import Chart, Series, figure
from kitaeru.report.curve import Point, smooth_past
from kitaeru.report.history import Answers, History
from kitaeru.report.markup import bars, card, lang, pairs, section, table
from kitaeru.report.wording import (
    bytes_text,
    count_text,
    duration_text,
    item_text,
    layout_text,
    loss_text,
    number_text,
    percent_text,
    preflight_text,
    rate_text,
    round_two,
    split_text,
    value_text,
)


def result(past: History, plan: Plan | None) -> str:
    """The headline: the loss before and after, and what it took."""
    return f'<section>{_hero(past)}<div class="cards">{"".join(_cards(past, plan))}</div></section>'


def curves(past: History, plan: Plan | None) -> str:
    """Loss, learning rate, speed, memory and gradient norm over the steps."""
    steps = past.steps
    x = tr("step")

    def over_steps(name: str, values: Iterable[float], look: str = "main") -> Series:
        return Series(name, list(zip((s.step for s in steps), values, strict=True)), look)

    speed = [s.tokens_per_second for s in steps]
    memory = [over_steps(tr("measured"), (s.peak_bytes for s in steps))]
    if plan and steps:
        limit: list[Point] = [(s.step, plan.chosen.step_bytes) for s in (steps[0], steps[-1])]
        memory.append(Series(tr("predicted"), limit, "limit"))
    norms = [s.grad_norm for s in steps]
    charts = (
        _loss_chart(past),
        Chart(
            tr("Learning rate"),
            [over_steps(tr("Learning rate"), (s.learning_rate for s in steps))],
            rate_text,
            x,
            from_zero=True,
            plain=False,
        ),
        Chart(tr("Speed (tokens/s)"), _with_smoothed(over_steps, speed), count_text, x, from_zero=True),
        Chart(tr("Peak memory"), memory, bytes_text, x, from_zero=True, plain=False),
        Chart(tr("Gradient norm"), _with_smoothed(over_steps, norms), number_text, x, from_zero=True),
    )
    drawn = "".join(figure(chart) for chart in charts)
    return section(tr("Curves"), f'<div class="charts">{drawn}</div>') if drawn else ""


def samples(past: History) -> str:
    """The questions, answered before and after."""
    blocks = "".join(_sample(answers) for answers in past.answers)
    return section(tr("The same questions, before and after"), blocks) if blocks else ""


def data(past: History, plan: Plan | None) -> str:
    """What was learnt from."""
    splits = past.data
    if not splits:
        return ""
    head = ("", tr("examples"), tr("tokens"), tr("trained"), tr("longest"), tr("characters per token"))
    rows = [[split_text(name), *_counts(event)] for name, event in splits.items()]
    parts = [table(head, rows, numbers=range(1, 6))]
    if plan:
        parts.append(_sources(plan, splits))
    train = splits.get("train") or next(iter(splits.values()))
    columns = [bars(tr("Length of examples, in tokens"), _lengths(train))]
    left_out: Counter[str] = Counter()
    for event in splits.values():
        left_out.update(event.left_out)
    columns.append(bars(tr("Left out or changed"), left_out))
    columns = [column for column in columns if column]
    if columns:
        parts.append(f'<div class="{"two" if len(columns) > 1 else ""}">{"".join(columns)}</div>')
    return section(tr("Data"), "".join(parts))


def plan(past: History, plan: Plan | None) -> str:
    """What was decided and why, and the prediction beside the measurement."""
    if plan is None:
        return ""
    parts = [f"<p>{escape(layout_text(plan.layout))}</p>"]
    if plan.chosen.why:
        parts.append(f'<p class="soft">{escape(" ".join(plan.chosen.why))}</p>')
    if plan.decisions:
        rows = [[f"<code>{escape(d.path)}</code>", f"<code>{escape(value_text(d.value))}</code>", escape(d.why)]
                for d in plan.decisions]  # fmt: skip
        parts.append(table((tr("value"), tr("decided"), tr("why")), rows, raw=True, stack=True))
    if past.preflight is not None:
        parts.append(f"<p>{escape(preflight_text(past.preflight))}</p>")
    memory = {item_text(item): size for item, size in plan.chosen.memory.items() if size > 0}
    parts.append(bars(tr("Predicted memory at the peak"), memory, bytes_text))
    if plan.rivals:
        parts.append(f"<h3>{escape(tr('Other ways'))}</h3>")
        head = (tr("way"), tr("predicted memory"), tr("why not"))
        parts.append(table(head, [_rival(rival) for rival in plan.rivals], numbers=(1,), stack=True))
    return section(tr("Plan"), "".join(parts))


def notices(past: History) -> str:
    """What a person should know."""
    blocks = "".join(_notice(notice) for notice in past.notices)
    return section(tr("Notices"), blocks) if blocks else ""


def checkpoints(past: History) -> str:
    """What was saved."""
    losses = {event.step: event for event in past.evaluations}
    rows = [
        [count_text(s.step), s.path, loss_text(losses[s.step].loss) if s.step in losses else "—", bytes_text(s.bytes)]
        for s in past.checkpoints
    ]
    head = (tr("step"), tr("folder"), tr("validation loss"), tr("size"))
    return section(tr("Checkpoints written"), table(head, rows, numbers=(0, 2, 3))) if rows else ""


def environment(past: History) -> str:
    """The machine and the versions."""
    if past.started is None or not past.started.environment:
        return ""
    items = list(past.started.environment.items())
    half = (len(items) + 1) // 2
    tables = [pairs(part) for part in (items[:half], items[half:]) if part]
    return section(tr("Environment"), f'<div class="two">{"".join(f"<div>{table}</div>" for table in tables)}</div>')


def recipe(text: str) -> str:
    """The exact recipe."""
    if not text.strip():
        return ""
    copy, copied = escape(tr("Copy")), escape(tr("Copied"))
    block = f'<div class="recipe" data-copy="{copy}" data-copied="{copied}"><pre>{escape(text.strip())}\n</pre></div>'
    return section(tr("Recipe"), block)


def _hero(past: History) -> str:
    before, after = past.before, past.after
    if after is None:
        losses = [(s.step, s.loss) for s in past.steps]
        if not losses:
            return _hero_block(tr("Nothing has been learnt yet"), "—", "")
        smoothed = smooth_past([loss for _, loss in losses])
        value = _from_to(losses[0][1], smoothed[-1])
        return _hero_block(tr("Training loss, first and last (smoothed)"), value, "")
    note = tr("in nats per trained token; step {step}", step=count_text(after.step))
    if before is None:
        return _hero_block(tr("Validation loss"), _now(after.loss), escape(note))
    change = (after.loss - before.loss) / before.loss if before.loss else 0.0
    look = "good" if change < 0 else "bad"
    text = f'<span class="change {look}">{100 * change:+.1f} %</span> · {escape(note)}'
    return _hero_block(tr("Validation loss, before and after"), _from_to(before.loss, after.loss), text)


def _hero_block(label: str, value: str, note: str) -> str:
    return (
        f'<div class="hero"><div class="label">{escape(label)}</div>'
        f'<div class="value">{value}</div><div class="note">{note}</div></div>'
    )


def _now(loss: float) -> str:
    return f"<span>{escape(loss_text(loss))}</span>"


def _from_to(before: float, after: float) -> str:
    return f'<span class="was">{escape(loss_text(before))}</span><span class="arrow">→</span>{_now(after)}'


def _cards(past: History, plan: Plan | None) -> list[str]:
    steps, started = past.steps, past.started
    cards = []
    if steps and started:
        note = tr("{epochs} epochs", epochs=f"{steps[-1].epoch:.2f}")
        cards.append(card(tr("Steps"), f"{count_text(steps[-1].step)} / {count_text(started.max_steps)}", note))
    if steps:
        share = sum(s.trained_tokens for s in steps) / max(1, past.tokens)
        cards.append(card(tr("Tokens"), count_text(past.tokens), tr("{share} trained", share=percent_text(share))))
        cards.append(card(tr("Speed"), count_text(past.tokens_per_second), _speed_note(plan)))
        cards.append(card(tr("Peak memory"), bytes_text(past.peak_bytes), _against(past.peak_bytes, plan)))
    cards.append(card(tr("Time"), duration_text(past.seconds), _starts(past)))
    if started and started.total_parameters:
        share = started.trainable_parameters / started.total_parameters
        note = tr("{share} of {total}", share=percent_text(share), total=count_text(started.total_parameters))
        cards.append(card(tr("Trained parameters"), count_text(started.trainable_parameters), note))
    return cards


def _against(measured: int, plan: Plan | None) -> str:
    if plan is None or not plan.chosen.step_bytes:
        return ""
    predicted = plan.chosen.step_bytes
    difference = f"{100 * (measured - predicted) / predicted:+.1f} %"
    return tr("predicted {size}, off by {difference}", size=bytes_text(predicted), difference=difference)


def _speed_note(plan: Plan | None) -> str:
    note = tr("tokens/s, median of the steps")
    speed = plan.chosen.speed if plan else None
    if speed is None:
        return note
    low, high = (count_text(round_two(rate)) for rate in (speed.low, speed.high))
    return note + " · " + tr("predicted {low} to {high}", low=low, high=high)


def _starts(past: History) -> str:
    resumed = [event for event in past.of(RunStarted) if event.resumed_step > 0]
    if not resumed:
        return ""
    return tr("resumed after step {steps}", steps=", ".join(count_text(event.resumed_step) for event in resumed))


def _loss_chart(past: History) -> Chart:
    steps = past.steps
    losses = [s.loss for s in steps]
    xs = [s.step for s in steps]
    averaged = smooth_past(losses)
    series = [
        Series(tr("training"), list(zip(xs, losses, strict=True)), "raw"),
        Series(tr("training, smoothed"), list(zip(xs, averaged, strict=True))),
        Series(tr("validation"), [(e.step, e.loss) for e in past.evaluations], "second"),
    ]
    return Chart(tr("Loss"), series, loss_text, tr("step"), marks=_best_mark(past.best, past.evaluations))


def _best_mark(best: Evaluated | None, evaluations: Sequence[Evaluated]) -> list[tuple[float, float, str]]:
    if best is None or len(evaluations) < 2:
        return []
    return [(best.step, best.loss, tr("best {loss}", loss=loss_text(best.loss)))]


def _with_smoothed(over_steps: Callable[..., Series], values: Sequence[float]) -> list[Series]:
    averaged = smooth_past(values)
    return [over_steps(tr("each step"), values, "raw"), over_steps(tr("smoothed"), averaged)]


def _sample(answers: Answers) -> str:
    after = tr("after ({step} steps)", step=count_text(answers.after_step)) if answers.after_step else tr("after")
    both = _answer("before", tr("before"), answers.before) + _answer("after", after, answers.after)
    return (
        f'<article class="sample"><div class="q"{lang(answers.prompt)}>{escape(answers.prompt)}</div>'
        f'<div class="answers">{both}</div></article>'
    )


def _answer(look: str, label: str, text: str | None) -> str:
    shown = "—" if text is None else text.strip() or tr("(empty)")
    return (
        f'<div class="a {look}"><span class="label">{escape(label)}</span>'
        f"<span{lang(shown)}>{escape(shown)}</span></div>"
    )


def _lengths(event: DataReady) -> dict[str, int]:
    """A bar named by a number alone holds examples of at most so many tokens."""
    return {f"≤ {count_text(int(name))}" if name.isdigit() else name: n for name, n in event.length_histogram.items()}


def _counts(event: DataReady) -> list[str]:
    tokens = max(1, event.tokens)
    return [
        count_text(event.examples),
        count_text(event.tokens),
        percent_text(event.trained_tokens / tokens),
        count_text(event.longest),
        f"{event.characters / tokens:.2f}" if event.characters else "—",
    ]


def _sources(plan: Plan, splits: dict[str, DataReady]) -> str:
    kinds = {path: kind for event in splits.values() for path, kind in event.kinds.items()}
    data = plan.recipe.data
    used = [(tr("training"), source) for source in data.train] + [(tr("validation"), source) for source in data.valid]
    rows = [[s.path, split, kinds.get(s.path, s.kind), f"{s.weight:g}"] for split, s in used]
    head = (tr("source"), tr("used for"), tr("kind"), tr("weight"))
    return f"<h3>{escape(tr('Sources'))}</h3>" + table(head, rows, numbers=(3,))


def _rival(rival: Candidate) -> list[str]:
    why = " ".join(rival.why) or ("" if rival.fits else tr("does not fit"))
    return [layout_text(rival.layout), bytes_text(rival.peak_bytes), why]


def _notice(notice: Notice) -> str:
    examples = "".join(f"<li{lang(e)}>{escape(e)}</li>" for e in notice.examples[:20])
    step = f' <span class="soft">· {escape(tr("step {step}", step=notice.step))}</span>' if notice.step else ""
    return (
        f'<div class="notice {escape(notice.level)}">{escape(notice.text)}{step}'
        + (f"<ul>{examples}</ul>" if examples else "")
        + "</div>"
    )
