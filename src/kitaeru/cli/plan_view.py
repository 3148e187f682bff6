"""What `kitaeru plan` draws: the ranked table, a memory bar for each device, reasons; in 80 columns, Japanese too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.plan.choose import Survey
from kitaeru.plan.explain import MEMORY_GROUPS, Line, factor_lines, host_lines, memory_lines, speed_lines
from kitaeru.plan.problem import Problem, free_bytes, needed_bytes
from kitaeru.plan.types import Candidate
from kitaeru.report.prose import Prose
from kitaeru.report.wording import bytes_text, count_text, duration_text, percent_text, round_two
from kitaeru.shape import ModelShape

# Groups of items in a bar, each with its letter: they stay readable without colour.
GROUPS = tuple(zip("WTAh", ("cyan", "magenta", "green", "yellow"), MEMORY_GROUPS.values(), strict=True))
BAR = 40


def show_survey(out: Console, found: Survey, hardware: Hardware, shape: ModelShape) -> None:
    """The whole answer."""
    problem = found.problem
    head = tr(
        "{model}: {count} parameters, examples up to {longest} tokens, {batch} tokens a step.",
        model=problem.recipe.model.name,
        count=count_text(shape.parameters()),
        longest=count_text(problem.longest),
        batch=count_text(found.candidates[0].global_batch_tokens),
    )
    out.print(Prose(head, "bold"))
    out.print(Prose(hardware.summary(), "dim"))
    out.print()
    out.print(_table(found))
    out.print()
    chosen = found.plan.chosen if found.plan else None
    shown = chosen or next(c for c in found.candidates if c.fits)
    _bars(out, problem, shown)
    out.print()
    if chosen is None:
        out.print(Prose(str(found.refusal), "yellow"))
    else:
        for sentence in chosen.why:
            out.print(Padding(Prose(sentence), (0, 0, 0, 2)))
    _impossible(out, found)
    hint = tr("More of one way: --explain {name}", name=shown.layout.name)
    out.print(Prose(hint, "dim"))


def _table(found: Survey) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold", ratio=1)
    for _ in range(2):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold", max_width=20)
    grid.add_row(*(Text(title, "bold") for title in (tr("way"), tr("memory"), tr("tokens/s"), tr("verdict"))))
    for candidate in best_of_each_way(found):
        chosen = found.plan is not None and candidate is found.plan.chosen
        style = "bold green" if chosen else "" if candidate.fits and candidate.built else "dim"
        row = (
            candidate.layout.name,
            bytes_text(max(candidate.device_peaks)),
            _range(candidate),
            _verdict(found, candidate),
        )
        grid.add_row(*(Text(cell, style) for cell in row))
    return grid


def best_of_each_way(found: Survey) -> list[Candidate]:
    """One candidate for each way, in rank: the first that could run today, else the first."""
    first: dict[str, Candidate] = {}
    for candidate in sorted(found.candidates, key=lambda c: not (c.fits and c.built)):
        first.setdefault(candidate.layout.way, candidate)
    kept = {candidate.layout.name for candidate in first.values()}
    return [candidate for candidate in found.candidates if candidate.layout.name in kept]


def _range(candidate: Candidate) -> str:
    speed = candidate.speed
    return "" if speed is None else f"{round_two(speed.low):,.0f}–{round_two(speed.high):,.0f}"


def _verdict(found: Survey, candidate: Candidate) -> str:
    if found.plan is not None and candidate is found.plan.chosen:
        return tr("chosen")
    if not candidate.fits:
        return tr("too big")
    if not candidate.built:
        return tr("not built yet")
    chosen = found.plan.chosen if found.plan else None
    if chosen is None or _rate(candidate) <= 1.02 * _rate(chosen):
        return tr("fits")
    if candidate.layout.base == "nf4" and chosen.layout.base != "nf4":
        return tr("less exact")
    return tr("leans on RAM") if candidate.layout.variant.startswith("offload") else tr("fits")


def _bars(out: Console, problem: Problem, candidate: Candidate) -> None:
    """A bar for each device: what is taken by group, the margin, and what is free; equal devices share one."""
    out.print(Prose(tr("Memory of {name} at its peak", name=candidate.layout.name), "bold"))
    layout = candidate.layout
    groups: dict[tuple[str, int, tuple[int, ...]], list[int]] = {}
    for rank, items in enumerate(candidate.devices):
        device = problem.device_of(rank)
        name = tr("RAM") if device is None else device.name
        parts = tuple(sum(items.get(item, 0) for item in names) for _, _, names in GROUPS)
        groups.setdefault((name, free_bytes(problem, layout, rank), parts), []).append(rank)
    for (name, free, parts), ranks in groups.items():
        label = _ranks(ranks) if len(candidate.devices) > 1 else ""
        need = needed_bytes(layout, sum(parts))
        line = Text("  ")
        line.append_text(_bar(parts, need, free))
        line.append(f" {bytes_text(sum(parts))} / {bytes_text(free)}")
        out.print(Padding(Prose(f"{label}{name}"), (0, 0, 0, 2)))
        out.print(line)
    legend = tr("W weights, T what is trained, A activations, h head and work space, m margin")
    out.print(Padding(Prose(legend, "dim"), (0, 0, 0, 2)))
    if layout.device == "cuda":
        ram = tr("RAM: {need} of {free} free", need=bytes_text(candidate.host_bytes),
                 free=bytes_text(problem.hardware.host_free_bytes))  # fmt: skip
        out.print(Padding(Prose(ram, "dim"), (0, 0, 0, 2)))


def _ranks(ranks: Sequence[int]) -> str:
    whole = ranks[-1] - ranks[0] + 1 == len(ranks) and len(ranks) > 2
    return (f"{ranks[0]}–{ranks[-1]}" if whole else ", ".join(map(str, ranks))) + ": "


def _bar(parts: Sequence[int], need: int, free: int) -> Text:
    scale = BAR / max(free, need, 1)
    bar, at, total = Text(), 0, 0.0
    for (letter, style, _), size in zip(GROUPS, parts, strict=True):
        total += size
        width = round(total * scale) - at
        bar.append(letter * width, style)
        at += width
    margin = max(0, round(need * scale) - at)
    bar.append("m" * margin, "red" if need > free else "dim")
    bar.append("." * (BAR - at - margin), "dim")
    return bar


def _impossible(out: Console, found: Survey) -> None:
    """Ways that cannot be, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.impossible.items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        out.print()
        out.print(Prose(tr("Impossible here"), "bold"))
    for why, names in reasons.items():
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        out.print(Padding(Prose(f"{shown}: {why}", "dim"), (0, 0, 0, 2)))


# --- what if ----------------------------------------------------------------------------------------------------------


def show_change(out: Console, before: Survey, after: Survey, changes: Iterable[str]) -> None:
    """The best before and after a change."""
    out.print()
    out.print(Prose(tr("What if: {changes}", changes=", ".join(changes)), "bold"))
    for title, found in ((tr("now"), before), (tr("then"), after)):
        best = found.plan.chosen if found.plan else None
        waiting = next((c for c in found.candidates if c.fits and not c.built), None)
        lines = [_summary(best) if best else tr("nothing that is built fits")]
        if waiting is not None and (best is None or _rate(waiting) > _rate(best)):
            lines.append(tr("not built yet: {way}", way=_summary(waiting)))
        for number, line in enumerate(lines):
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(width=8)
            grid.add_column()
            grid.add_row(Text("" if number else title), Prose(line))
            out.print(Padding(grid, (0, 0, 0, 2)))


def _rate(candidate: Candidate) -> float:
    return candidate.speed.tokens_per_second if candidate.speed else 0.0


def _summary(candidate: Candidate) -> str:
    return tr(
        "{name}, {size}, about {rate} tokens/s",
        name=candidate.layout.name,
        size=bytes_text(max(candidate.device_peaks)),
        rate=count_text(_rate(candidate)),
    )


# --- explain ----------------------------------------------------------------------------------------------------------


def show_explanation(out: Console, found: Survey, candidate: Candidate) -> None:
    """Every item of one way, with its formula."""
    problem, speed = found.problem, candidate.speed
    out.print(Prose(candidate.layout.name, "bold"))
    for sentence in candidate.why:
        out.print(Padding(Prose(sentence), (0, 0, 0, 2)))
    seen: list[dict[str, int]] = []
    for rank, items in enumerate(candidate.devices):
        if items in seen:
            continue
        seen.append(items)
        title = tr("Memory of device {rank} at its peak: {size}", rank=rank, size=bytes_text(sum(items.values())))
        _lines(out, title, memory_lines(items), bytes_text)
    phases = {
        "loading": tr("loading"),
        "first_step": tr("first step"),
        "steady_step": tr("steady step"),
        "evaluation": tr("evaluation"),
        "saving": tr("saving"),
    }
    found_phases = [Line(phases[name], size, "", "") for name, size in candidate.phases.items()]
    _lines(out, tr("Peaks of the phases, on the fullest device"), found_phases, bytes_text)
    _lines(out, tr("RAM: {size}", size=bytes_text(candidate.host_bytes)), host_lines(candidate), bytes_text)
    if speed is not None:
        title = tr("One step: {seconds}", seconds=duration_text(speed.step_seconds))
        _lines(out, title, speed_lines(candidate), duration_text)
        idle = ", ".join(percent_text(share) for share in speed.idle)
        facts = tr(
            "{count} micro-batches a step; model FLOP utilisation {mfu}; idle: {idle}.",
            count=speed.micro_batches,
            mfu=percent_text(speed.mfu),
            idle=idle,
        )
        out.print(Padding(Prose(facts), (0, 0, 0, 2)))
    if speed is not None and speed.source == "table":
        _factors(out, problem)


def _lines(out: Console, title: str, lines: Sequence[Line], say: object) -> None:
    out.print()
    out.print(Prose(title, "bold"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="cyan")
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(ratio=1)
    for line in lines:
        assert callable(say)
        text = f"{line.what}: {line.formula}" if line.what and line.formula else line.what or line.formula
        grid.add_row(line.name, Text(say(line.value)), Prose(text))
    out.print(Padding(grid, (0, 0, 0, 2)))


def _factors(out: Console, problem: Problem) -> None:
    out.print()
    out.print(Prose(tr("Rates are the sheet's times these shares, likely (lowest to highest)"), "bold"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    for name, share, source in factor_lines(problem.device):
        grid.add_row(Prose(name), Text(share), Prose(source))
    out.print(Padding(grid, (0, 0, 0, 2)))
