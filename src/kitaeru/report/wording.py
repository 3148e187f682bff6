"""Numbers as people read them: sizes, times, counts, rates. Sizes are decimal (1 GB = 10⁹ bytes), as in the recipe."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

from kitaeru.events import Preflight, RunStarted, SteppedDown
from kitaeru.i18n import tr
from kitaeru.plan.memory import ITEMS
from kitaeru.plan.types import Layout

_NOTHING = "—"


def loss_text(value: float | None) -> str:
    """A loss in nats with three decimals; a dash when there is none.

    >>> loss_text(2.71828), loss_text(float("nan")), loss_text(None)
    ('2.718', 'nan', '—')
    """
    if value is None:
        return _NOTHING
    return f"{value:.3f}" if math.isfinite(value) else str(value)


def bytes_text(value: float) -> str:
    """A size with its unit.

    >>> bytes_text(0), bytes_text(512_000), bytes_text(21_340_000_000)
    ('0 B', '512 kB', '21.3 GB')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def count_text(value: float) -> str:
    """A count with thousands separators; from ten million on, in millions or billions.

    >>> count_text(999), count_text(1234567), count_text(8_030_000_000)
    ('999', '1,234,567', '8.03 B')
    """
    if value >= 1e9:
        return f"{_three_digits(value / 1e9)} B"
    return f"{_three_digits(value / 1e6)} M" if value >= 1e7 else f"{value:,.0f}"


def round_two(value: float) -> float:
    """Two digits, or three from 100 on: more would be false.

    >>> round_two(1234.5), round_two(87.4)
    (1230.0, 87.0)
    """
    digits = 2 if value < 100 else 3
    return float(f"{value:.{digits}g}")


def rate_text(value: float) -> str:
    """A learning rate or another very small number.

    >>> rate_text(2e-4), rate_text(1.83e-5), rate_text(0.0)
    ('2e-4', '1.83e-5', '0')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def number_text(value: float) -> str:
    """A plain number with three significant digits, without an exponent where that is readable.

    >>> number_text(0.8312), number_text(1532.4), number_text(0.00012)
    ('0.831', '1,532', '1.2e-4')
    """
    if not math.isfinite(value):
        return str(value)
    return rate_text(value) if 0 < abs(value) < 1e-3 else _three_digits(value)


def percent_text(share: float) -> str:
    """A share as a percentage.

    >>> percent_text(0.4567), percent_text(0.004)
    ('45.7 %', '0.4 %')
    """
    return f"{100 * share:.1f} %"


def clock_text(seconds: float) -> str:
    """A time as a clock shows it.

    >>> clock_text(42), clock_text(754.2), clock_text(3753)
    ('0:42', '12:34', '1:02:33')
    """
    if not math.isfinite(seconds):
        return _NOTHING
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def duration_text(seconds: float) -> str:
    """A time in words: seconds, minutes and seconds, or hours and minutes."""
    if seconds < 60:
        return tr("{seconds} s", seconds=_three_digits(seconds) if seconds < 10 else round(seconds))
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return tr("{minutes} min {seconds} s", minutes=minutes, seconds=second)
    hours, minute = divmod(round(seconds / 60), 60)
    return tr("{hours} h {minutes} min", hours=hours, minutes=minute)


def outcome_text(outcome: str | None) -> str:
    """How a run ended, in words; None is a run without an end in its events."""
    return {
        "finished": tr("finished"),
        "interrupted": tr("interrupted, can be resumed"),
        "stopped_early": tr("stopped early: the validation loss no longer fell"),
        "failed": tr("failed"),
        None: tr("no end recorded: still going, or killed"),
    }.get(outcome, outcome or "")


def clean(text: str) -> str:
    """`text` without control characters (line ends and tabs stay), so that data cannot steer a terminal.

    >>> clean("a\\x1b[31mb\\n")
    'a[31mb\\n'
    """
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def split_text(split: str) -> str:
    """What a part of the data is for, in words."""
    return {"train": tr("training"), "valid": tr("validation")}.get(split, clean(split))


def run_name(started: RunStarted) -> str:
    """The name of a run: the last part of its folder."""
    return clean(Path(started.run).name or started.run)


def layout_text(layout: Layout) -> str:
    """A layout in words, for example "lora · single · bf16 · activations kept · at most 4,096 tokens at once"."""
    base = {"none": "", "nf4": tr("4-bit base"), "int8": tr("8-bit base")}.get(layout.base, layout.base)
    tokens = tr("at most {count} tokens at once", count=count_text(layout.micro_batch_tokens))
    parts = (layout.method, layout.strategy, base, layout.precision, activations_text(layout.policy), tokens)
    return " · ".join(part for part in parts if part)


def activations_text(policy: str) -> str:
    """What is done with activations, in words.

    >>> activations_text("keep8"), activations_text("keep-recompute12")
    ('activations kept, some in 8 bits', 'activations of 12 layers computed again')
    """
    kept, _, count = policy.partition("-recompute")
    if count:
        return tr("activations of {count} layers computed again", count=count)
    return {
        "keep": tr("activations kept"),
        "keep8": tr("activations kept, some in 8 bits"),
        "recompute": tr("activations computed again"),
        "offload": tr("activations in RAM"),
    }.get(kept, policy)


def stepped_text(event: SteppedDown) -> str:
    """That memory ran out, and how the run goes on."""
    now, planned = count_text(event.micro_batch_tokens), count_text(event.planned_micro_batch_tokens)
    changes = []
    if event.micro_batch_tokens != event.planned_micro_batch_tokens:
        changes.append(tr("micro-batches of {now} tokens instead of {planned}", now=now, planned=planned))
    if event.activations != event.planned_activations:
        changes.append(activations_text(event.activations))
    return tr(
        "Memory ran out; training goes on with {changes}. A step has as many tokens as before and computes the same.",
        changes=", ".join(changes),
    )


def preflight_text(event: Preflight) -> str:
    """What trying the largest micro-batch has shown."""
    values = {"tokens": count_text(event.tokens), "size": bytes_text(event.peak_bytes)}
    if not event.planned_bytes:
        return tr("The largest micro-batch ({tokens} tokens) was tried first: {size}.", **values)
    values["planned"] = bytes_text(event.planned_bytes)
    return tr("The largest micro-batch ({tokens} tokens) was tried first: {size}, planned {planned}.", **values)


def value_text(value: object) -> str:
    """A recipe value as it is written in a recipe.

    >>> value_text(True), value_text(16384), value_text(2e-4), value_text(("q_proj", "v_proj"))
    ('true', '16384', '2e-4', '[q_proj, v_proj]')
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return rate_text(value) if 0 < abs(value) < 1e-3 else f"{value:g}"
        case list() | tuple():
            return "[" + ", ".join(value_text(item) for item in value) + "]"
        case _:
            return clean(str(value))


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 3)}f}"


def item_text(item: str) -> str:
    """A memory item of the plan, in words.

    >>> item_text("process"), item_text("of_a_later_version")
    ('Python and its libraries', 'of a later version')
    """
    return tr(ITEMS[item]) if item in ITEMS else item.replace("_", " ")
