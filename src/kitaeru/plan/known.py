"""The known models on a machine: each one's best way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware
from kitaeru.plan.choose import Pricing, choose
from kitaeru.plan.layouts import waits_to_be_asked, ways
from kitaeru.plan.problem import state
from kitaeru.plan.types import Candidate
from kitaeru.recipe.read import read
from kitaeru.recipe.types import Recipe
from kitaeru.shape import Entry, ModelShape, catalogue

MILLION = 10**6


@dataclass(frozen=True)
class Known:
    """A model and its best way; None where it cannot be trained on this machine."""

    name: str
    parameters: int
    best: Candidate | None

    @property
    def built(self) -> bool:
        """Whether it can be trained today."""
        return self.best is not None and self.best.built

    @property
    def hours_per_million_tokens(self) -> float | None:
        """How long a million tokens take."""
        if self.best is None or self.best.speed is None:
            return None
        return MILLION / self.best.speed.tokens_per_second / 3600


def models(hardware: Hardware, seq_len: int | None = None, entries: Iterable[Entry] | None = None) -> Iterator[Known]:
    """Models of the catalogue (default: all) with their best way: the one chosen, else the fastest not built yet."""
    for entry in catalogue() if entries is None else entries:
        shape = ModelShape.from_config(entry.config, entry.name)
        recipe = read(None, values={"model": entry.name, "data.train": ["-"], "data.seq_len": seq_len}).recipe
        yield Known(entry.name, shape.parameters(), _best(recipe, hardware, shape))


def _best(recipe: Recipe, hardware: Hardware, shape: ModelShape) -> Candidate | None:
    """What would be chosen. Ways that are not built yet are looked at only where no other fits."""
    usable: list[Candidate] = []
    for method, _ in ways(recipe):  # as `choose` does: the first that fits whole on a device
        pricing = Pricing(state(recipe.model_copy(update={"method": method}), hardware, shape, None), built_only=True)
        try:
            usable += [candidate for candidate in pricing.price() if candidate.fits]
        except PlanError:
            continue
        if any(candidate.layout.strategy in ("single", "ddp") for candidate in usable):
            break
    if usable:
        return pricing.finished([choose(usable)])[0]
    pricing = Pricing(state(recipe, hardware, shape, None))
    try:
        found = pricing.price()
    except PlanError:
        return None
    usable = [c for c in found if c.fits and not waits_to_be_asked(c.layout.strategy, recipe)]
    fastest = min(usable, key=lambda candidate: candidate.speed.step_seconds if candidate.speed else 0.0, default=None)
    return None if fastest is None else pricing.finished([fastest])[0]
