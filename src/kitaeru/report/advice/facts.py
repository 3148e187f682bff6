"""What advice is made from: how training goes today, the machine, and what the planner finds on it.

Every figure carries where it comes from: measured in a run, predicted by the planner, or stated by a person.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import KitaeruError, PlanError, UsageError
from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.plan.calibrate import own_profile
from kitaeru.plan.choose import Pricing, Survey, survey
from kitaeru.plan.decide import fill
from kitaeru.plan.problem import state
from kitaeru.plan.types import Candidate, DataFacts, Decision, Plan
from kitaeru.recipe.read import read
from kitaeru.recipe.types import Recipe
from kitaeru.report.history import History
from kitaeru.report.usage import devices_used
from kitaeru.report.wording import run_name
from kitaeru.shape import ModelShape, find_shape

Kind = Literal["measured", "predicted", "stated"]
# What plain transformers does when nobody says otherwise: its Trainer's usual batch, rows padded, one card.
BASELINE_EXAMPLES = 4
# Every setting that only decides how the same training is computed, left to the planner.
FREE: dict[str, Any] = {
    "strategy": "auto",
    "limits.device": None,
    "limits.devices": None,
    "limits.micro_batch_tokens": None,
    "limits.checkpointing": None,
    "limits.recomputed_layers": None,
    "limits.offload_activations": None,
    "limits.memory_gb": None,
    "limits.threads": None,
    "data.packing": True,
    "model.attention": "auto",
    "train.precision": "auto",
}
Change = Mapping[str, Any]


@dataclass(frozen=True)
class Basis:
    """Where a figure comes from: how it is known, and a sentence that says from what."""

    kind: Kind
    source: str


@dataclass(frozen=True)
class Figure:
    """A number with its basis; a prediction has its range."""

    value: float
    basis: Basis
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Today:
    """How training goes now. `typed` is what a person trains: a recipe file or a model; `now` the layout that runs, as
    the planner prices it (None: it does not fit); `story` says in a sentence what this is.
    """

    kind: Literal["run", "recipe", "baseline"]
    name: str
    story: str
    typed: str
    recipe: Recipe
    shape: ModelShape
    hardware: Hardware
    data: DataFacts | None = None
    now: Candidate | None = None
    past: History | None = None
    rate: Figure | None = None
    peak: Figure | None = None

    @property
    def devices(self) -> int:
        """Devices at work."""
        return self.now.layout.devices if self.now else 1

    @property
    def busy(self) -> Figure | None:
        """The share of all GPUs' time in which they compute: measured by the driver where a run has looked, else
        predicted.
        """
        if not self.on_gpus:
            return None
        count = max(1, len(self.hardware.devices))
        seen = [u.utilisation for u in (devices_used(self.past) if self.past else ()) if u.device != "host"]
        known = [share for share in seen if share is not None]
        if known and self.rate is not None:
            return Figure(sum(known) / max(len(known), count), self.rate.basis)
        idle = self.now.speed.idle if self.now and self.now.speed else ()
        if not idle:
            return None
        return Figure(sum(1 - share for share in idle) / max(len(idle), count), planner_basis(self.hardware))

    @property
    def on_gpus(self) -> bool:
        """Whether it computes on GPUs."""
        return self.now.layout.device == "cuda" if self.now else bool(self.hardware.devices)


@dataclass(frozen=True)
class Facts:
    """Today, and the machine that advice is for; `machine` are the words that name another one to a command."""

    today: Today
    hardware: Hardware
    machine: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """Today's wish with everything left to the planner that only decides how the same training is computed.

        The baseline's small batch and its arithmetic are habits, not anybody's wish.
        """
        change = dict(FREE)
        if self.today.kind == "baseline":
            change |= {"train.global_batch_examples": None, "train.arithmetic": "auto"}
        return changed(self.today.recipe, change)

    @cached_property
    def found(self) -> Survey | None:
        """What the planner finds for `recipe` on the whole machine; None when nothing fits."""
        return planned(self.recipe, self.hardware, self.today.shape, self.today.data)

    @property
    def best(self) -> Candidate | None:
        """The way the planner would take."""
        return self.found.plan.chosen if self.found and self.found.plan else None

    @cached_property
    def priced(self) -> tuple[Candidate, ...]:
        """All that could be trained today on the whole machine: every layout that is built and fits."""
        problem = state(self.recipe, self.hardware, self.today.shape, self.today.data)
        try:
            return tuple(c for c in Pricing(problem, built_only=True).price() if c.fits)
        except PlanError:
            return ()

    @property
    def same_machine(self) -> bool:
        """Whether today's figures are of the machine that advice is for."""
        mine, theirs = self.hardware.devices, self.today.hardware.devices
        return [d.name for d in mine[: len(theirs)]] == [d.name for d in theirs]

    def after(self, change: Change) -> Candidate | None:
        """What would run with one change of today's recipe on the whole machine; None when that does not fit."""
        found = planned(changed(self.today.recipe, change), self.hardware, self.today.shape, self.today.data)
        return found.plan.chosen if found and found.plan else None

    def gain(self, candidate: Candidate | None) -> float | None:
        """How many times as fast as today: both as the planner prices them, so that its error cancels."""
        now = self.today.now
        if candidate is None or candidate.speed is None or now is None or now.speed is None:
            return None
        return candidate.speed.tokens_per_second / now.speed.tokens_per_second

    def promise(self, candidate: Candidate) -> Figure | None:
        """Tokens/s of a way. What a run on the same machine measured corrects the planner by that run's factor."""
        speed = candidate.speed
        if speed is None:
            return None
        now, rate = self.today.now, self.today.rate
        if self.same_machine and rate and rate.basis.kind == "measured" and now and now.speed:
            share = rate.value / now.speed.tokens_per_second
            source = tr(
                "the planner's figure times {share:.2f}, which is measured over predicted in {run}",
                share=share,
                run=self.today.name,
            )
            basis = Basis("predicted", source)
            return Figure(speed.tokens_per_second * share, basis, speed.low * share, speed.high * share)
        return predicted_rate(candidate, self.hardware)


@dataclass(frozen=True)
class Ran:
    """A run beside what was promised before it began."""

    name: str
    past: History
    plan: Plan | None
    rate: Figure
    peak: Figure


# --- where today comes from -------------------------------------------------------------------------------------------


def from_run(folder: Path) -> Today:
    """Today as a run measured it.

    Raises:
        UsageError: it is no run, has made no step, or has no plan that this version can read.
    """
    past = History.load(folder)
    ran = ran_in(folder, past)
    if ran.plan is None:
        raise UsageError(
            tr("{path} has no plan.json that this version can read.", path=folder),
            remedy=tr("Give the folder of a run of this version of kitaeru."),
        )
    plan = ran.plan
    recipe = read(folder / "recipe.yaml").recipe if (folder / "recipe.yaml").is_file() else plan.recipe
    return Today(
        kind="run",
        name=ran.name,
        story=ran.rate.basis.source,
        typed=str(folder / "recipe.yaml"),
        recipe=recipe,
        shape=find_shape(plan.recipe.model.name),
        hardware=Hardware.from_dict(plan.hardware),
        data=_data_of(past),
        now=plan.chosen,
        past=past,
        rate=ran.rate,
        peak=ran.peak,
    )


def ran_in(folder: Path, past: History | None = None) -> Ran:
    """What a run measured, with the plan it was made from.

    Raises:
        UsageError: it is no run, or has made no step.
    """
    past = past or History.load(folder)
    if not past.steps:
        raise UsageError(
            tr("{path} has made no step yet.", path=folder), remedy=tr("Let it train for a few minutes first.")
        )
    try:
        plan = Plan.load(folder / "plan.json")
    except PlanError:
        plan = None
    name = run_name(past.started) if past.started else folder.name
    basis = Basis("measured", _where(past, name))
    return Ran(name, past, plan, Figure(past.tokens_per_second, basis), Figure(past.peak_bytes, basis))


def from_recipe(path: str, recipe: Recipe, hardware: Hardware, data: DataFacts | None = None) -> Today:
    """Today as a recipe would run it on this machine, by the planner.

    Raises:
        ModelError: the model's sizes are not known here.
    """
    shape = find_shape(recipe.model.name)
    found = planned(recipe, hardware, shape, data)
    now = found.plan.chosen if found and found.plan else None
    story = tr("{path} as it stands, on this machine: nothing of it has run.", path=path)
    return _predicted(Today("recipe", path, story, path, recipe, shape, hardware, data, now))


def from_model(
    model: str,
    hardware: Hardware,
    seq_len: int | None = None,
    data: DataFacts | None = None,
    stated: float | None = None,
) -> Today:
    """Today as most people begin: one device, a batch of four padded rows, plain transformers and PEFT.

    What that costs is predicted for kitaeru's own engine held to the same choices. The first of these that fits is
    taken: LoRA with the whole batch at once, with one row at a time, then the same in 4 bits.

    Args:
        model: a Hub id, a folder, or `bundled`.
        hardware: the machine.
        seq_len: the longest example in tokens.
        data: counts of the data, where they are known.
        stated: tokens/s that a person says they have today.

    Raises:
        ModelError: the model's sizes are not known here.
    """
    shape = find_shape(model)
    name = tr("one device, batch {count}, plain transformers", count=BASELINE_EXAMPLES)
    first, now = None, None
    for method in ("lora", "qlora"):
        for at_once in (True, False):
            wish = _baseline(model, method, seq_len)
            longest = state(wish, hardware, shape, data).least_micro_batch
            rows = BASELINE_EXAMPLES if at_once else 1
            wish = changed(wish, {"limits.micro_batch_tokens": rows * longest})
            first = first or wish
            found = planned(wish, hardware, shape, data)
            if found is not None and found.plan is not None:
                now = found.plan.chosen
                return _told(_predicted(_baseline_today(name, model, wish, shape, hardware, data, now)), stated)
    assert first is not None
    return _told(_baseline_today(name, model, first, shape, hardware, data, None), stated)


def _baseline(model: str, method: str, seq_len: int | None) -> Recipe:
    values = {
        "model": model,
        "method": method,
        "data.train": ["my.jsonl"],
        "data.seq_len": seq_len,
        "data.packing": False,
        "strategy": "single",
        "limits.devices": 1,
        "train.arithmetic": "plain",
        "train.global_batch_examples": BASELINE_EXAMPLES,
    }
    return read(None, values=values).recipe


def _baseline_today(
    name: str,
    model: str,
    wish: Recipe,
    shape: ModelShape,
    hardware: Hardware,
    data: DataFacts | None,
    now: Candidate | None,
) -> Today:
    story = tr(
        "A stated baseline, not a run: {method} on one device with a batch of {count} padded examples. What it costs "
        "is predicted for kitaeru's own engine held to these choices; padding, which makes it slower still, is not "
        "counted.",
        method=wish.method,
        count=BASELINE_EXAMPLES,
    )
    return Today("baseline", name, story, model, wish, shape, hardware, data, now)


def _predicted(today: Today) -> Today:
    """Today with the planner's figures."""
    if today.now is None:
        return today
    basis = planner_basis(today.hardware)
    peak = Figure(max(today.now.device_peaks), basis)
    return replace(today, rate=predicted_rate(today.now, today.hardware), peak=peak)


def _told(today: Today, stated: float | None) -> Today:
    if stated is None:
        return today
    return replace(today, rate=Figure(stated, Basis("stated", tr("what you said you have today (--speed)"))))


def _where(past: History, name: str) -> str:
    started = past.started
    device = started.device if started else "?"
    date = datetime.fromtimestamp(past.events[-1].time).strftime("%Y-%m-%d")
    return tr(
        "the run {name}: {steps} steps on {device}, {date}", name=name, steps=len(past.steps), device=device, date=date
    )


def _data_of(past: History) -> DataFacts | None:
    train, valid = past.data.get("train"), past.data.get("valid")
    if train is None:
        return None
    return DataFacts(train.examples, train.tokens, train.longest, valid.examples if valid else 0)


# --- the planner ------------------------------------------------------------------------------------------------------


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with some values changed; None is "decide for me"."""
    return fill(recipe, [Decision(path, value, "") for path, value in change.items()])


def planned(recipe: Recipe, hardware: Hardware, shape: ModelShape, data: DataFacts | None) -> Survey | None:
    """What the planner finds; None when nothing fits, built or not, or no way is legal."""
    try:
        return survey(recipe, hardware, shape, data)
    except KitaeruError:
        return None


def planner_basis(hardware: Hardware) -> Basis:
    """What the planner's figures rest on."""
    if not hardware.devices:
        return Basis("predicted", tr("kitaeru's planner, a rough guess for a CPU"))
    profile = None if hardware.described else own_profile()
    if profile is not None and all(profile.device(device.name) for device in hardware.devices):
        return Basis(
            "predicted", tr("kitaeru's planner, from rates measured on this machine on {date}", date=profile.date)
        )
    return Basis(
        "predicted", tr("kitaeru's planner, from data sheets and measurements on other machines; nothing ran here")
    )


def predicted_rate(candidate: Candidate, hardware: Hardware) -> Figure | None:
    """Tokens/s of a way, by the planner."""
    speed = candidate.speed
    if speed is None:
        return None
    return Figure(speed.tokens_per_second, planner_basis(hardware), speed.low, speed.high)
