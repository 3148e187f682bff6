"""The plan: what will happen, as plain data. The plan file is all that crosses into a process that trains."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import PlanError
from kitaeru.files import write_json
from kitaeru.i18n import tr
from kitaeru.recipe.types import Recipe

Activations = Literal["keep", "recompute"]
Base = Literal["none", "nf4", "int8"]
Precision = Literal["bf16", "fp16", "fp32"]
MethodKind = Literal["full", "lora", "qlora", "pretrain"]


@dataclass(frozen=True)
class Layout:
    """One legal way to train: a point in the space the planner searches. Nothing in it is left open.

    `micro_batch_tokens` is the most tokens one forward and backward pass sees on one device; `devices` the world size.
    """

    strategy: str
    method: MethodKind
    base: Base
    precision: Precision
    activations: Activations
    micro_batch_tokens: int
    device: Literal["cpu", "cuda"]
    devices: int = 1

    @property
    def name(self) -> str:
        """A short name for tables, for example `single/qlora/keep/4096`."""
        return f"{self.strategy}/{self.method}/{self.activations}/{self.micro_batch_tokens}"


@dataclass(frozen=True)
class DataFacts:
    """What the planner must know of the data: counts of the training split, and of its longest example in tokens."""

    examples: int
    tokens: int
    longest: int
    valid_examples: int = 0


@dataclass(frozen=True)
class Decision:
    """A value the planner chose for a recipe field that was left open, and why, in a sentence."""

    path: str
    value: Any
    why: str


@dataclass(frozen=True)
class Candidate:
    """A layout and what it costs. Bytes are per device; `memory` holds the items of the peak, which sum to it."""

    layout: Layout
    memory: dict[str, int]
    host_bytes: int
    fits: bool
    why: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of allocated bytes on each device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What will run: the effective recipe (nothing training needs is left open), the layout, its cost, the reasons."""

    recipe: Recipe
    chosen: Candidate
    decisions: tuple[Decision, ...] = ()
    rivals: tuple[Candidate, ...] = ()
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The layout that runs."""
        return self.chosen.layout

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(path, {"version": 1, **asdict(self), "recipe": self.recipe.model_dump(mode="json")})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: the file is missing, not a plan, or of another version.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("version") != 1:
                raise ValueError("version")
            return cls(
                recipe=Recipe.model_validate_json(json.dumps(value["recipe"])),
                chosen=_candidate(value["chosen"]),
                decisions=tuple(Decision(**d) for d in value["decisions"]),
                rivals=tuple(_candidate(c) for c in value["rivals"]),
                hardware=value["hardware"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(
                tr("{path} is not a plan this version can read.", path=path),
                remedy=tr("Plan again with `kitaeru train RECIPE.yaml`."),
            ) from error


def _candidate(value: dict[str, Any]) -> Candidate:
    return Candidate(**{**value, "layout": Layout(**value["layout"]), "why": tuple(value["why"])})
