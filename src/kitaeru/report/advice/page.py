"""The optimisation report: today, what is wrong, what this machine can do, and what to type, in order of gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from kitaeru import __version__
from kitaeru.i18n import tr
from kitaeru.plan.choose import Pricing
from kitaeru.plan.known import Known
from kitaeru.plan.problem import free_bytes, needed_bytes, state
from kitaeru.plan.speed import PARTS
from kitaeru.plan.timeline import day
from kitaeru.plan.types import Candidate
from kitaeru.report.advice.assemble import WORTH, Action, Advice, Priced
from kitaeru.report.advice.blocks import Block, Card, Cards, Cell, Document, Drawing, Item, Items, Para, Section, Table
from kitaeru.report.advice.facts import Facts, Figure, Ran, planner_basis
from kitaeru.report.advice.html import to_html
from kitaeru.report.advice.markdown import to_markdown
from kitaeru.report.advice.plots import GROUP_NAMES, SPAN_NAMES, Lane, day_lanes, groups, lanes, memory_lane
from kitaeru.report.chart import Chart, Series, figure
from kitaeru.report.usage import cost, mfu, money_text
from kitaeru.report.wording import (
    activations_text,
    bytes_text,
    count_text,
    duration_text,
    number_text,
    percent_text,
    round_two,
)
from kitaeru.shape import catalogue

BILLION = 10**9
# Classes of model sizes, in parameters: those of the report that asked for this page.
CLASSES = ((0, 1), (1, 7), (7, 13), (13, 30), (30, 1000))
BARS = 9
# More devices than this share a bar where they are alike.
BARS_APART = 4
# Families of strategies in the order their days are drawn.
FAMILIES = ("single", "model_parallel", "pipeline", "tensor", "fsdp", "zero", "ddp")


def pages(advice: Advice) -> tuple[str, str]:
    """The page as HTML and as Markdown."""
    document = build(advice)
    return to_html(document), to_markdown(document)


def build(advice: Advice) -> Document:
    """The page's blocks."""
    facts = advice.facts
    date = datetime.now().strftime("%Y-%m-%d %H:%M")
    sections = (
        Section(tr("Today"), list(_today(advice))),
        Section(tr("Problems found"), list(_problems(advice))),
        Section(tr("What is possible on this machine"), list(_possible(advice))),
        Section(tr("Ways to train {model} here", model=facts.today.shape.name or facts.today.recipe.model.name),
                list(_ways(advice))),
        Section(tr("Strategy by model size"), list(_classes(advice))),
        Section(tr("Models for this hardware"), list(_models(advice))),
        Section(tr("Action plan"), list(_actions(advice))),
        Section(tr("Promise and result"), list(_results(advice))),
    )  # fmt: skip
    return Document(
        title=tr("Optimisation report"),
        sub=facts.hardware.summary(),
        sections=[section for section in sections if section.blocks],
        foot=tr("Made by kitaeru {version} on {date}.", version=__version__, date=date),
    )


# --- today ------------------------------------------------------------------------------------------------------------


def _today(advice: Advice) -> Iterator[Block]:
    facts, today = advice.facts, advice.facts.today
    basis = planner_basis(today.hardware)
    yield Para(tr("{model}, {name}.", model=today.recipe.model.name, name=today.name))
    cards = [Card(tr("GPUs at work"), Cell(_devices_text(facts, today.devices if today.on_gpus else 0)))]
    if today.peak is not None:
        cards.append(Card(tr("Memory used"), _bytes(today.peak), _of_memory(facts, today.peak)))
    if today.rate is not None:
        cards.append(Card(tr("Speed"), _rate(today.rate), _range(today.rate)))
    if today.now is not None and today.now.speed is not None:
        layout, speed = today.now.layout, today.now.speed
        note = tr("on each device: {count} × {tokens} tokens", count=speed.micro_batches,
                  tokens=count_text(layout.micro_batch_tokens))  # fmt: skip
        batch = tr("{count} tokens", count=count_text(today.now.global_batch_tokens))
        cards.append(Card(tr("Batch of a step"), Cell(batch), note))
        busy, own = today.busy, mfu(today.past) if today.past else None
        if busy is not None:
            share = percent_text(own if own is not None else speed.mfu)
            note = tr("of all GPUs' time; {mfu} of the 16-bit arithmetic of those at work", mfu=share)
            cards.append(Card(tr("Utilisation"), Cell(percent_text(busy.value), busy.basis), note))
    spent = cost(today.past, today.recipe.track) if today.past else None
    if spent is not None and today.rate is not None:
        note = tr("{watts:.0f} W on average", watts=spent.watts)
        if spent.per_million is not None:
            note += " · " + tr("{money} for a million tokens", money=money_text(spent.per_million, spent.currency))
        energy = tr("{count} tokens per joule", count=number_text(spent.tokens_per_joule))
        cards.append(Card(tr("Energy"), Cell(energy, today.rate.basis), note))
    if advice.largest_today is not None:
        size = tr("{count} parameters", count=count_text(advice.largest_today.parameters))
        cards.append(Card(tr("Largest known model"), Cell(advice.largest_today.name, basis), size))
    yield Cards(cards)
    yield Para(today.story, quiet=True)


def _devices_text(facts: Facts, used: int) -> str:
    count = len(facts.hardware.devices)
    return tr("{used} of {count}", used=used, count=count) if count else tr("no GPU")


def _of_memory(facts: Facts, peak: Figure) -> str:
    total = sum(d.memory_bytes for d in facts.hardware.devices) or facts.hardware.host_ram_bytes
    used = peak.value * facts.today.devices
    return tr(
        "on the fullest device; {share} of all {total}", share=percent_text(used / total), total=bytes_text(total)
    )


# --- problems ---------------------------------------------------------------------------------------------------------


def _problems(advice: Advice) -> Iterator[Block]:
    if not advice.findings:
        yield Para(tr("None of the rules found anything: today's way is the one the planner would take."))
        return
    yield Items([_problem(found) for found in advice.findings])
    basis = planner_basis(advice.facts.hardware)
    if any(found.gain for found in advice.findings):
        yield Para(
            tr(
                "A factor is what mending this alone brings on the whole machine ({basis}). Factors do not multiply.",
                basis=basis.source,
            ),
            quiet=True,
        )


def _problem(found: Priced) -> Item:
    return Item(found.finding.what, gain_text(found.gain), (found.finding.why,))


def gain_text(gain: float | None) -> str:
    """A factor of speed in words; nothing where there is none."""
    return "" if gain is None or 1 / WORTH < gain < WORTH else tr("{gain} times the speed", gain=f"{gain:.2f}")


# --- possible ---------------------------------------------------------------------------------------------------------


def _possible(advice: Advice) -> Iterator[Block]:
    facts, best = advice.facts, advice.facts.best
    if best is None or best.speed is None:
        found = facts.found
        reason = str(found.refusal) if found else tr("Nothing fits.")
        yield Para(reason)
    else:
        for sentence in best.why:
            yield Para(sentence)
    yield Table((tr("item"), tr("today"), tr("possible"), tr("factor")), list(_comparison(advice)), numbers=(1, 2, 3))
    if facts.today.now is not None and best is not None:
        yield _memory_plot(advice, facts.today.now, best)


def _comparison(advice: Advice) -> Iterator[list[Cell]]:
    facts, today, best = advice.facts, advice.facts.today, advice.facts.best
    now, basis, theirs = today.now, planner_basis(facts.hardware), planner_basis(today.hardware)

    def row(name: str, before: Cell, after: Cell, factor: float | None) -> list[Cell]:
        return [Cell(name), before, after, Cell(f"{factor:.2f}" if factor else "—")]

    if facts.hardware.devices and best is not None:
        used, then = today.devices if today.on_gpus else 0, best.layout.devices
        yield row(tr("GPUs at work"), Cell(_devices_text(facts, used)), Cell(_devices_text(facts, then)),
                  then / used if used else None)  # fmt: skip
    if today.peak is not None and best is not None:
        before, after = today.peak.value * today.devices, sum(best.device_peaks)
        yield row(tr("memory used, all devices"), Cell(bytes_text(before), today.peak.basis),
                  Cell(bytes_text(after), basis), after / before)  # fmt: skip
    small, large = advice.largest_today, advice.largest
    if small is not None and large is not None:
        yield row(tr("largest known model"), Cell(count_text(small.parameters), theirs),
                  Cell(count_text(large.parameters), basis), large.parameters / small.parameters)  # fmt: skip
    promise = facts.promise(best) if best is not None else None
    if today.rate is not None and promise is not None:
        rate = Cell(f"{_round(promise.value)} {_range(promise, brackets=True)}".strip(), promise.basis)
        factor = promise.value / today.rate.value if today.rate.value else None
        yield row(tr("tokens/s"), Cell(_round(today.rate.value), today.rate.basis), rate, factor)
    if now is not None and best is not None:
        batches = now.global_batch_tokens, best.global_batch_tokens
        yield row(tr("tokens in a step"), Cell(count_text(batches[0])), Cell(count_text(batches[1])),
                  batches[1] / batches[0])  # fmt: skip
    busy = today.busy
    if busy is not None and best is not None:
        then_busy = _busy(best, facts)
        yield row(tr("utilisation of all GPUs"), Cell(percent_text(busy.value), busy.basis),
                  Cell(percent_text(then_busy), basis), then_busy / busy.value if busy.value else None)  # fmt: skip


def _busy(candidate: Candidate, facts: Facts) -> float:
    """The share of all GPUs' time in which they compute."""
    idle = candidate.speed.idle if candidate.speed else ()
    if candidate.layout.device == "cpu" or not idle:
        return 0.0
    return sum(1 - share for share in idle) / max(len(idle), len(facts.hardware.devices))


def _memory_plot(advice: Advice, now: Candidate, best: Candidate) -> Drawing:
    """Memory bars for each device, today and as it could be."""
    facts, drawn, rows = advice.facts, [], []
    count = max(1, len(facts.hardware.devices))
    for title, candidate, machine in ((tr("today"), now, facts.today.hardware), (tr("possible"), best, facts.hardware)):
        problem = state(facts.recipe, machine, facts.today.shape, facts.today.data)
        held: list[tuple[dict[str, int], int]] = []
        for rank in range(max(count, len(candidate.devices))):
            device = problem.device_of(min(rank, len(machine.devices) - 1)) if machine.devices else None
            items = candidate.devices[rank] if rank < len(candidate.devices) else {}
            held.append((items, device.memory_bytes if device else free_bytes(problem)))
        for first, last in _alike(held):
            items, size = held[first]
            used = sum(items.values())
            value = f"{bytes_text(used)} / {bytes_text(size)}"
            name = f"GPU {first}" + (f"–{last}" if last > first else "") if machine.devices else tr("RAM")
            name = f"{title} · {name}"
            drawn.append((name, items, needed_bytes(candidate.layout, used) if items else 0, size, value))
            rows.append([Cell(name), *(Cell(bytes_text(part)) for part in groups(items).values()), Cell(value)])
    scale = max(size for _, _, _, size, _ in drawn)
    bars = [memory_lane(name, items, need, size, scale, value) for name, items, need, size, value in drawn]
    names = [tr(GROUP_NAMES[group]) for group in groups({})]
    table = Table((tr("device"), *names, tr("peak")), rows, numbers=range(1, 6), basis=planner_basis(facts.hardware))
    note = tr("Peak of what is allocated, by item; the margin is kept free for fragments and the driver.")
    return Drawing(tr("Memory of each device at its peak"), lanes(bars, GROUP_NAMES), table, note)


def _alike(held: Sequence[tuple[dict[str, int], int]]) -> Iterator[tuple[int, int]]:
    """Runs of devices, first and last: each alone, but of more than a few equal ones share a bar."""
    first = 0
    for rank in range(1, len(held) + 1):
        if rank == len(held) or len(held) <= BARS_APART or held[rank] != held[first]:
            yield first, rank - 1
            first = rank


# --- ways -------------------------------------------------------------------------------------------------------------


def _ways(advice: Advice) -> Iterator[Block]:
    facts, found = advice.facts, advice.facts.found
    if found is None or not facts.hardware.devices:
        return
    yield _speed_plot(advice, _best_ways(found.candidates))
    if len(facts.hardware.devices) > 1:
        yield _timeline_plot(advice, _one_of_each_family(found.candidates, facts.best))
    if len(advice.scaling) > 1:
        yield _scaling_plot(advice)


def _family(candidate: Candidate) -> str:
    """The strategy, the three of ZeRO as one."""
    strategy = candidate.layout.strategy
    return "zero" if strategy.startswith("zero") else strategy


def _best_ways(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best of each way and method that fits, the fastest first; one that can be trained today before others."""
    first: dict[tuple[str, ...], Candidate] = {}
    for candidate in candidates:
        layout = candidate.layout
        if not candidate.fits or candidate.speed is None:
            continue
        key = ("zero" if _family(candidate) == "zero" else layout.way, layout.method)
        known = first.get(key)
        if known is None or (candidate.built, _speed(candidate)) > (known.built, _speed(known)):
            first[key] = candidate
    return sorted(first.values(), key=lambda c: -_speed(c))


def _one_of_each_family(candidates: Sequence[Candidate], best: Candidate | None) -> list[Candidate]:
    """One way of each family: with the method of the best one where that fits, built before not built."""
    method = best.layout.method if best else ""
    shown = []
    for family in FAMILIES:
        inside = [c for c in candidates if c.fits and c.speed and _family(c) == family and c.layout.variant != "gpipe"]
        if inside:
            shown.append(max(inside, key=lambda c: (c is best, c.layout.method == method, c.built, _speed(c))))
    return shown


def _speed(candidate: Candidate) -> float:
    return candidate.speed.tokens_per_second if candidate.speed else 0.0


def _speed_plot(advice: Advice, ways: Sequence[Candidate]) -> Drawing:
    facts = advice.facts
    kept = sorted(ways, key=lambda c: (c is not facts.best, not c.built, -_speed(c)))[:BARS]
    shown = sorted(kept, key=lambda c: -_speed(c))
    most = max(c.speed.high for c in shown if c.speed)
    rate = facts.today.rate
    bars, rows = [], []
    if rate is not None:
        most = max(most, rate.high or rate.value)
        line = (rate.low / most, rate.high / most) if rate.low is not None and rate.high is not None else None
        bars.append(Lane(tr("today"), [("now", 0.0, rate.value / most)], _round(rate.value), line))
        rows.append([Cell(tr("today")), _rate(rate), Cell(_range(rate)), Cell(facts.today.name)])
    for candidate in shown:
        assert candidate.speed is not None
        speed, look = (
            candidate.speed,
            "chosen" if candidate is facts.best else "built" if candidate.built else "unbuilt",
        )
        name = f"{candidate.layout.way} · {candidate.layout.method} · {activations_text(candidate.layout.policy)}"
        parts = [(look, 0.0, speed.tokens_per_second / most)]
        bars.append(Lane(name, parts, _round(speed.tokens_per_second), (speed.low / most, speed.high / most)))
        verdict = {"chosen": tr("chosen"), "built": tr("fits"), "unbuilt": tr("not built yet")}[look]
        span = f"{_round(speed.low)}–{_round(speed.high)}"
        rows.append([Cell(name), Cell(_round(speed.tokens_per_second)), Cell(span), Cell(verdict)])
    legend = {"now": tr("today"), "chosen": tr("chosen"), "built": tr("fits"), "unbuilt": tr("not built yet"),
              "whisker": tr("range of the prediction")}  # fmt: skip
    looks = {part[0] for bar in bars for part in bar.parts} | {"whisker"}
    table = Table((tr("way"), tr("tokens/s"), tr("range"), tr("verdict")), rows, (1, 2), planner_basis(facts.hardware))
    drawn = lanes(bars, {k: v for k, v in legend.items() if k in looks}, (most, tr("tokens/s")))
    return Drawing(tr("Tokens per second by strategy"), drawn, table)


def _timeline_plot(advice: Advice, ways: Sequence[Candidate]) -> Drawing:
    facts = advice.facts
    pricing = Pricing(state(facts.recipe, facts.hardware, facts.today.shape, facts.today.data))
    days = [(c, day(c.layout, facts.today.shape, *pricing.work(c.layout))) for c in ways]
    longest = max(found.seconds for _, found in days)
    devices = min(4, len(facts.hardware.devices))
    drawn: list[Lane] = []
    rows = []
    for candidate, found in days:
        name = f"{candidate.layout.way} · {candidate.layout.method}"
        drawn += day_lanes(name, found, devices, longest, duration_text(found.seconds))
        idle = [*(candidate.speed.idle if candidate.speed else ()), *([1.0] * devices)][: len(facts.hardware.devices)]
        texts = (duration_text(found.seconds), count_text(found.micro_batches), ", ".join(map(percent_text, idle)),
                 _waits(candidate))  # fmt: skip
        rows.append([Cell(name), *map(Cell, texts)])
    head = (tr("way"), tr("seconds of a step"), tr("micro-batches"), tr("idle, by GPU"), tr("what takes longest"))
    table = Table(head, rows, (1, 2), planner_basis(facts.hardware))
    tokens = count_text(ways[0].global_batch_tokens)
    note = tr(
        "The same {tokens} tokens under each strategy; where nothing is drawn the card has nothing to do.",
        tokens=tokens,
    )
    title = tr("One step on each GPU")
    return Drawing(title, lanes(drawn, SPAN_NAMES, (longest, tr("seconds"))), table, note)


def _waits(candidate: Candidate) -> str:
    parts = candidate.speed.parts if candidate.speed else {}
    return tr(PARTS[max(parts, key=lambda kind: parts[kind])]) if parts else ""


def _scaling_plot(advice: Advice) -> Drawing:
    points = [(float(count), rate.value) for count, rate in advice.scaling]
    first = points[0][1] / points[0][0]
    ideal = [(count, first * count) for count, _ in points]
    chart = Chart(
        tr("Scaling"),
        [Series(tr("predicted"), points, "second"), Series(tr("in proportion"), ideal, "limit")],
        _round,
        tr("GPUs"),
        from_zero=True,
    )
    rows = [
        [Cell(str(count)), Cell(_round(rate.value)), Cell(_range(rate)), Cell(percent_text(rate.value / first / count))]
        for count, rate in advice.scaling
    ]
    head = (tr("GPUs"), tr("tokens/s"), tr("range"), tr("of in proportion"))
    table = Table(head, rows, (0, 1, 2, 3), planner_basis(advice.facts.hardware))
    note = tr("The best way for each number of cards like these; those that are not here are on PCIe like the others.")
    return Drawing(tr("Tokens per second by number of GPUs"), figure(chart), table, note)


# --- models -----------------------------------------------------------------------------------------------------------


def _classes(advice: Advice) -> Iterator[Block]:
    known = [*(row for row, _ in advice.shelf), *([advice.largest] if advice.largest else [])]
    rows = []
    for low, high in CLASSES:
        inside = [row for row in known if low * BILLION <= row.parameters < high * BILLION]
        if not inside:
            continue
        best = max(inside, key=lambda row: (row.built, row.best is not None, row.parameters))
        name = (
            tr("{low}–{high} B", low=f"{low:g}", high=f"{high:g}") if high < 1000 else tr("{low} B and more", low=low)
        )
        rows.append([Cell(name), *_known_cells(best), Cell(best.name)])
    if rows:
        head = (
            tr("parameters"),
            tr("method and strategy"),
            tr("memory"),
            tr("tokens/s"),
            tr("hours"),
            tr("for example"),
        )
        yield Table(head, rows, (2, 3, 4), planner_basis(advice.facts.hardware))
        yield Para(tr("The largest model of each class among those below. Hours are for a million tokens."), quiet=True)


def _models(advice: Advice) -> Iterator[Block]:
    entries = {entry.name: entry for entry in catalogue()}
    rows = []
    for row, note in advice.shelf:
        licence = entries[row.name].licence + (tr(", on request") if entries[row.name].gated else "")
        rows.append([Cell(row.name), Cell(note), *_known_cells(row), Cell(licence)])
    head = (
        tr("model"),
        tr("good for"),
        tr("method and strategy"),
        tr("memory"),
        tr("tokens/s"),
        tr("hours"),
        tr("licence"),
    )
    yield Table(head, rows, (3, 4, 5), planner_basis(advice.facts.hardware))
    yield Para(
        tr(
            "Memory is that of the fullest device, hours are for a million tokens; a star marks a way that this "
            "version cannot train yet. Any of them: kitaeru train MODEL --data my.jsonl. All known models: kitaeru "
            "models."
        ),
        quiet=True,
    )


def _known_cells(row: Known) -> list[Cell]:
    best, hours = row.best, row.hours_per_million_tokens
    if best is None or best.speed is None or hours is None:
        return [Cell(tr("does not fit")), Cell("—"), Cell("—"), Cell("—")]
    way = f"{best.layout.method}, {best.layout.way}" + ("" if best.built else " *")
    rate = f"{_round(best.speed.low)}–{_round(best.speed.high)}"
    return [Cell(way), Cell(bytes_text(max(best.device_peaks))), Cell(rate), Cell(f"{hours:.2f}")]


# --- actions and results ----------------------------------------------------------------------------------------------


def _actions(advice: Advice) -> Iterator[Block]:
    titles = {"now": tr("At once"), "next": tr("Next"), "later": tr("With other hardware")}
    number = 1
    for phase, title in titles.items():
        chosen = [action for action in advice.actions if action.phase == phase]
        if chosen:
            yield Para(title)
            yield Items([action_item(action) for action in chosen], number)
            number += len(chosen)


def action_item(action: Action) -> Item:
    """An action as a block of the page."""
    figures = []
    if action.promise is not None:
        span = _range(action.promise, brackets=True)
        text = tr("{rate} tokens/s {range}", rate=_round(action.promise.value), range=span).strip()
        figures.append(Cell(text, action.promise.basis))
    if action.peak_bytes:
        figures.append(Cell(tr("{size} on the fullest device", size=bytes_text(action.peak_bytes))))
    return Item(action.title, gain_text(action.gain), action.why, "\n".join(action.commands), figures)


def _results(advice: Advice) -> Iterator[Block]:
    rows = []
    for ran in advice.ran:
        rows += list(_promised(ran))
    if not rows:
        return
    yield Table((tr("run"), tr("figure"), tr("promised"), tr("measured"), tr("verdict")), rows, (2, 3))
    first, last = advice.ran[0], advice.ran[-1]
    if first is not last and first.rate.value:
        yield Para(
            tr(
                "{last} trains at {times:.2f} times the speed of {first}, both measured.",
                last=last.name,
                first=first.name,
                times=last.rate.value / first.rate.value,
            )
        )


def _promised(ran: Ran) -> Iterator[list[Cell]]:
    speed = ran.plan.chosen.speed if ran.plan else None
    rate = Cell(_round(ran.rate.value), ran.rate.basis)
    if speed is not None:
        value = ran.rate.value
        verdict = (
            tr("as promised")
            if speed.low <= value <= speed.high
            else tr("faster")
            if value > speed.high
            else tr("slower")
        )
        yield [
            Cell(ran.name),
            Cell(tr("tokens/s")),
            Cell(f"{_round(speed.low)}–{_round(speed.high)}"),
            rate,
            Cell(verdict),
        ]
    if ran.plan is not None and ran.plan.chosen.step_bytes:
        predicted, measured = ran.plan.chosen.step_bytes, ran.peak.value
        off = f"{100 * (measured - predicted) / predicted:+.1f} %"
        cells = (Cell(bytes_text(predicted)), Cell(bytes_text(measured), ran.peak.basis), Cell(off))
        yield [Cell(ran.name), Cell(tr("peak memory")), *cells]


# --- words ------------------------------------------------------------------------------------------------------------


def _round(value: float) -> str:
    return count_text(round_two(value))


def _rate(rate: Figure) -> Cell:
    return Cell(tr("{count} tokens/s", count=_round(rate.value)), rate.basis)


def _range(rate: Figure, brackets: bool = False) -> str:
    if rate.low is None or rate.high is None:
        return ""
    text = f"{_round(rate.low)}–{_round(rate.high)}"
    return f"({text})" if brackets else text


def _bytes(size: Figure) -> Cell:
    return Cell(bytes_text(size.value), size.basis)
