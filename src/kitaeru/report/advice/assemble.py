"""Advice put together: findings with their gains, what the machine can do, and the actions in order of gain."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kitaeru.errors import KitaeruError
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, tr
from kitaeru.plan.choose import Pricing
from kitaeru.plan.known import Known, models
from kitaeru.plan.problem import state
from kitaeru.plan.types import Candidate
from kitaeru.plan.what_if import what_if
from kitaeru.recipe.fields import value_at
from kitaeru.recipe.types import ModelSection, Recipe
from kitaeru.report.advice.facts import FREE, Change, Facts, Figure, Ran, changed, planned, predicted_rate
from kitaeru.report.advice.rules import Finding, findings
from kitaeru.report.wording import bytes_text, count_text, value_text
from kitaeru.shape import ModelShape, catalogue

# Models that people fine-tune for Japanese, and what each is good for; the first four are those of the request that
# kitaeru began with.
SHELF: dict[str, str] = {
    "elyza/Llama-3-ELYZA-JP-8B": N_("Japanese instructions, well balanced"),
    "tokyotech-llm/Swallow-13b-hf": N_("Japanese text of high quality"),
    "codellama/CodeLlama-34b-hf": N_("programs"),
    "mistralai/Mixtral-8x7B-v0.1": N_("a mixture of experts"),
    "tokyotech-llm/Llama-3.1-Swallow-8B-v0.2": N_("newer: Japanese and English, 8B"),
    "Qwen/Qwen3-8B": N_("newer: many languages, reasoning"),
    "Qwen/Qwen3-14B": N_("newer: many languages, reasoning"),
    "llm-jp/llm-jp-3-13b": N_("newer: made in Japan, open data"),
    "sbintuitions/sarashina2.2-3b": N_("newer: made in Japan, small and quick"),
    "cyberagent/calm3-22b-chat": N_("newer: made in Japan, conversation"),
    "google/gemma-3-27b-pt": N_("newer: many languages, 27B"),
    "Qwen/Qwen3-32B": N_("newer: the strongest dense one of this list"),
    "openai/gpt-oss-20b": N_("newer: a mixture of experts"),
}
# A gain below is none.
WORTH = 1.02
# Findings that are told only with so much gain: over today, offers over all that is free.
LEAST = {"recompute": WORTH, "small-micro-batch": WORTH, "link": WORTH, "attention": WORTH, "four-bits": 1.05,
         "sixteen-bits": 0.95, "arithmetic": WORTH, "host": WORTH, "bubble": WORTH}  # fmt: skip
MOST_GPUS = 8


@dataclass(frozen=True)
class Priced:
    """A finding, what would run once it is mended, and how many times as fast as today that is."""

    finding: Finding
    after: Candidate | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Action:
    """Something to do: what, what it brings, what to type. `phase` is when: at once, next, or with other hardware."""

    title: str
    phase: Literal["now", "next", "later"]
    why: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    gain: float | None = None
    promise: Figure | None = None
    peak_bytes: int = 0


@dataclass(frozen=True)
class Advice:
    """All that is said. `scaling` has tokens/s by number of devices; `ran` are runs with what they were promised."""

    facts: Facts
    findings: tuple[Priced, ...]
    actions: tuple[Action, ...]
    largest_today: Known | None
    largest: Known | None
    shelf: tuple[tuple[Known, str], ...]
    scaling: tuple[tuple[int, Figure], ...]
    ran: tuple[Ran, ...] = ()


def advise(facts: Facts, ran: Sequence[Ran] = (), others: Sequence[str] = ()) -> Advice:
    """Advice for the facts. `others` are models to show beside those of the shelf. Plans many models: seconds."""
    priced = _priced(facts)
    largest_today, largest = _largest_today(facts), _largest(facts.hardware)
    shelf = tuple(_shelf(facts, others))
    return Advice(
        facts=facts,
        findings=tuple(_with_size(facts, priced, largest_today, largest)),
        actions=tuple(_actions(facts, priced, largest_today, largest, ran)),
        largest_today=largest_today,
        largest=largest,
        shelf=shelf,
        scaling=tuple(_scaling(facts)),
        ran=tuple(ran),
    )


def next_changes(facts: Facts, count: int = 3) -> list[Action]:
    """The best things to change in today's recipe, the one that gains most first: for the page of a run."""
    priced = _priced(facts)
    offered = [*_free(facts, priced), *_measures(priced), *_trades(facts, priced)]
    return sorted(offered, key=lambda action: -(action.gain or 1.0))[:count]


# --- findings ---------------------------------------------------------------------------------------------------------


def _priced(facts: Facts) -> list[Priced]:
    """Findings with what mending each alone would bring (an offer: with all that is free); without those that would
    bring nothing.
    """
    found = []
    for finding in findings(facts):
        if not finding.change:
            found.append(Priced(finding))
            continue
        after = facts.after({**FREE, **finding.change} if finding.trade else finding.change)
        gain = facts.gain(after)
        least = LEAST.get(finding.name)
        over = facts.gain(facts.best) if finding.trade else 1.0
        if least is not None and (gain is None or over is None or gain < least * over):
            continue
        found.append(Priced(finding, after, None if finding.trade and least is None else gain))
    return found


def _with_size(facts: Facts, priced: Sequence[Priced], today: Known | None, largest: Known | None) -> Iterator[Priced]:
    """The most gain first; and before all, how large a model could be."""
    if _is_larger(facts, today, largest):
        yield Priced(
            Finding(
                "small-models",
                tr(
                    "The largest known model that trains this way is {today}; this machine can train {largest}.",
                    today=today.name if today else tr("none"),
                    largest=largest.name if largest else "",
                ),
                tr("4-bit weights and both cards hold models several times as large.")
                if len(facts.hardware.devices) > 1
                else tr("4-bit weights hold models several times as large."),
            )
        )
    yield from sorted(priced, key=lambda p: (p.finding.trade, -(p.gain or 0.0)))


def _is_larger(facts: Facts, today: Known | None, largest: Known | None) -> bool:
    """Whether the machine can train a larger model than today's way; on a CPU that is no advice."""
    if largest is None or not facts.hardware.devices:
        return False
    return today is None or largest.parameters > 1.3 * today.parameters


# --- models -----------------------------------------------------------------------------------------------------------


def _by_size() -> list[ModelShape]:
    shapes = [ModelShape.from_config(entry.config, entry.name) for entry in catalogue()]
    return sorted(shapes, key=lambda shape: -shape.parameters())


def _fits(recipe: Recipe, hardware: Hardware, shape: ModelShape) -> Candidate | None:
    """The fastest layout that fits and can be trained today."""
    try:
        pricing = Pricing(state(recipe, hardware, shape, None), built_only=True)
        fitting = [c for c in pricing.price() if c.fits]
    except KitaeruError:
        return None
    if not fitting:
        return None
    return pricing.finished([min(fitting, key=lambda c: c.speed.step_seconds if c.speed else 0.0)])[0]


def _with_model(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"model": ModelSection(name=name, attention=recipe.model.attention)})


def _largest_today(facts: Facts) -> Known | None:
    today = facts.today
    for shape in _by_size():
        found = _fits(_with_model(today.recipe, shape.name), today.hardware, shape)
        if found is not None:
            return Known(shape.name, shape.parameters(), found)
    return None


def _largest(hardware: Hardware) -> Known | None:
    for shape in _by_size():
        wish = Recipe.model_validate({"model": shape.name, "data": {"train": "my.jsonl"}})
        if _fits(wish, hardware, shape) is not None:
            return next(models(hardware, entries=[e for e in catalogue() if e.name == shape.name]))
    return None


def _shelf(facts: Facts, others: Sequence[str]) -> Iterator[tuple[Known, str]]:
    """Models worth a look here: those that can be trained today first."""
    names = list(dict.fromkeys([*others, *SHELF]))
    entries = {entry.name: entry for entry in catalogue()}
    length = facts.today.recipe.data.seq_len
    rows = list(models(facts.hardware, length, [entries[name] for name in names if name in entries]))
    for row in sorted(rows, key=lambda row: (not row.built, row.best is None)):
        yield row, tr(SHELF[row.name]) if row.name in SHELF else tr("asked for")


# --- actions ----------------------------------------------------------------------------------------------------------


def _actions(
    facts: Facts, priced: Sequence[Priced], today: Known | None, largest: Known | None, ran: Sequence[Ran]
) -> Iterator[Action]:
    yield from sorted([*_free(facts, priced), *_measures(priced)], key=lambda action: -(action.gain or 1.0))
    yield from sorted(_trades(facts, priced), key=lambda action: -(action.gain or 1.0))
    yield from _larger_model(facts, today, largest)
    yield from _from_disk(facts, largest)
    if len(ran) < 2:
        before = shlex.quote(str(facts.today.typed).removesuffix("/recipe.yaml")) if facts.today.kind == "run" else ""
        yield Action(
            tr("Measure, and lay the result beside the promise"),
            "next",
            (tr("The plan of the new run holds what was promised; this page then shows both."),),
            (" ".join(part for part in ("kitaeru advise", before, "runs/NEW") if part),),
        )
    yield from _other_hardware(facts)


def _free(facts: Facts, priced: Sequence[Priced]) -> Iterator[Action]:
    """Everything that changes nothing but how the same training is computed, together."""
    mended = [p for p in priced if p.finding.change and not p.finding.trade]
    best = facts.best
    if best is None or not mended:
        return
    gain = facts.gain(best)
    yield Action(
        tr("Let kitaeru plan it: {name}", name=best.layout.name)
        if facts.today.kind == "baseline"
        else tr("Free what is pinned: {name}", name=best.layout.name),
        "now",
        tuple(p.finding.what for p in mended),
        (_command(facts, FREE),),
        gain,
        facts.promise(best),
        max(best.device_peaks),
    )


def _measures(priced: Sequence[Priced]) -> Iterator[Action]:
    for item in priced:
        if item.finding.command:
            yield Action(item.finding.what, "now", (item.finding.why,), (item.finding.command,))


def _trades(facts: Facts, priced: Sequence[Priced]) -> Iterator[Action]:
    """Offers that change what is learnt, each alone on top of what is free."""
    for item in priced:
        if not item.finding.trade:
            continue
        after = item.after
        if after is None:
            continue
        yield Action(
            item.finding.what,
            "next",
            (item.finding.why,),
            (_command(facts, {**FREE, **item.finding.change}),),
            item.gain,
            facts.promise(after),
            max(after.device_peaks),
        )


def _larger_model(facts: Facts, today: Known | None, largest: Known | None) -> Iterator[Action]:
    if not _is_larger(facts, today, largest) or largest is None or largest.best is None:
        return
    size = count_text(largest.parameters)
    yield Action(
        tr("Try a larger model: {name}, {size} parameters", name=largest.name, size=size),
        "next",
        (
            tr(
                "{method} with {way}, {size} on the fullest device.",
                method=largest.best.layout.method,
                way=largest.best.layout.way,
                size=bytes_text(max(largest.best.device_peaks)),
            ),
        ),
        (f"kitaeru train {shlex.quote(largest.name)} --data my.jsonl",),
        None,
        predicted_rate(largest.best, facts.hardware),
        max(largest.best.device_peaks),
    )


def _from_disk(facts: Facts, largest: Known | None) -> Iterator[Action]:
    """The largest model that trains only with its frozen layers in a folder, read when their turn comes."""
    if not facts.hardware.devices:
        return
    for shape in _by_size():
        if largest is not None and shape.parameters() <= largest.parameters:
            return
        wish = {"model": shape.name, "data": {"train": "my.jsonl"}, "limits": {"offload_folder": "offload"}}
        found = _fits(Recipe.model_validate(wish), facts.hardware, shape)
        if found is None:
            continue
        command = f"kitaeru train {shlex.quote(shape.name)} --data my.jsonl --set limits.offload_folder=offload"
        yield Action(
            tr("Larger still, slowly: {name}, {size} parameters", name=shape.name,
               size=count_text(shape.parameters())),
            "next",
            (tr("Its frozen layers wait in a folder on a fast disk, and each is read when its turn comes."),),
            (command,),
            None,
            predicted_rate(found, facts.hardware),
            max(found.device_peaks),
        )  # fmt: skip
        return


def _other_hardware(facts: Facts) -> Iterator[Action]:
    """What other hardware would bring, over the best way on this one."""
    best = facts.best
    if best is None or best.speed is None or not facts.hardware.devices:
        return
    double = f"ram={max(1, round(facts.hardware.host_ram_bytes / 1e9)) * 2}GB"
    for text in ("add 1 GPU", "nvlink", double):
        try:
            recipe, hardware = what_if(text, facts.recipe, facts.hardware)
        except KitaeruError:
            continue
        found = planned(recipe, hardware, facts.today.shape, facts.today.data)
        after = found.plan.chosen if found and found.plan else None
        if after is None or after.speed is None:
            continue
        times = after.speed.tokens_per_second / best.speed.tokens_per_second
        if times < WORTH:
            continue
        yield Action(
            tr("Other hardware: {change}", change=text),
            "later",
            (tr("{times:.2f} times the best way on this machine, with {name}.", times=times, name=after.layout.name),),
            (_plan_command(facts, text),),
            facts.gain(after),
            predicted_rate(after, hardware),
            max(after.device_peaks),
        )


def _plan_command(facts: Facts, change: str) -> str:
    return shlex.join(["kitaeru", "plan", facts.today.typed, *facts.machine, "--what-if", change])


def _command(facts: Facts, change: Change) -> str:
    """What to type to train with a change: only the values that differ from today's are named."""
    today = facts.today
    words = ["kitaeru", "train", today.typed]
    if today.kind == "baseline":
        words += ["--data", "my.jsonl"]
        method = change.get("method")
        return shlex.join(words + (["--method", method] if method else []))
    for path, value in change.items():
        if value_at(today.recipe, path) != value:
            words += ["--set", f"{path}={'' if value is None else value_text(value)}"]
    if today.kind == "run":
        words += ["--output", f"runs/{today.name}-2"]
    return shlex.join(words)


# --- scaling ----------------------------------------------------------------------------------------------------------


def _scaling(facts: Facts) -> Iterator[tuple[int, Figure]]:
    """Tokens/s of the best way with one device, two, and so on to twice as many as there are."""
    count, best = len(facts.hardware.devices), facts.best
    if not count or best is None:
        return
    recipe = facts.recipe
    if recipe.method == "auto":
        recipe = changed(recipe, {"method": best.layout.method})
    for devices in range(1, min(MOST_GPUS, max(4, 2 * count)) + 1):
        found = planned(recipe, _with_devices(facts.hardware, devices), facts.today.shape, facts.today.data)
        chosen = found.plan.chosen if found and found.plan else None
        rate = predicted_rate(chosen, facts.hardware) if chosen else None
        if rate is not None:
            yield devices, rate


def _with_devices(hardware: Hardware, count: int) -> Hardware:
    have = len(hardware.devices)
    if count > have:
        wish = Recipe.model_validate({"model": "bundled", "data": {"train": "my.jsonl"}})
        return what_if(f"add {count - have} GPUs", wish, hardware)[1]
    links = tuple(link for link in hardware.links if max(link.a, link.b) < count)
    return replace(hardware, devices=hardware.devices[:count], links=links, described=True)
