"""What the planner makes of a recipe, for `kitaeru recipe show`: recorded in a run, worked out now, or still open."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kitaeru.recipe.fields import leaves, value_at
from kitaeru.recipe.read import Effective, Origin
from kitaeru.recipe.types import Recipe

if TYPE_CHECKING:
    from kitaeru.plan.types import Plan

# Fields the planner fills when a recipe leaves them open.
PLANNED = (
    "model.quantize",
    "data.seq_len",
    "method",
    "strategy",
    "train.epochs",
    "train.learning_rate",
    "train.global_batch_tokens",
    "train.optimizer",
    "train.precision",
    "train.arithmetic",
    "train.cuda_graphs",
    "train.step_in_backward",
    "train.warmup_steps",
    "train.eval_every",
    "train.save_every",
    "limits.device",
    "limits.micro_batch_tokens",
    "limits.checkpointing",
    "limits.threads",
)
# Not decided when the other is given.
_INSTEAD = {"train.epochs": "train.max_steps", "train.global_batch_tokens": "train.global_batch_examples"}


@dataclass(frozen=True)
class Settled:
    """A recipe and its origins after the planner, with its reasons by path; not `complete` while values are open."""

    recipe: Recipe
    origins: dict[str, Origin]
    why: dict[str, str] = field(default_factory=dict)
    complete: bool = True


def settle(effective: Effective, plan: Plan | None) -> Settled:
    """Lay the plan over the recipe; without one, mark what the planner will decide."""
    if plan is None:
        recipe = effective.recipe
        left_open = {path for path in PLANNED if value_at(recipe, path) in (None, "auto")}
        left_open -= {path for path, other in _INSTEAD.items() if value_at(recipe, other) is not None}
        return Settled(effective.recipe, _with_planner(effective, left_open), complete=not left_open)
    why = {decision.path: decision.why for decision in plan.decisions}
    changed = {
        spec.path for spec in leaves() if value_at(plan.recipe, spec.path) != value_at(effective.recipe, spec.path)
    }
    return Settled(plan.recipe, _with_planner(effective, changed | set(why)), why)


def _with_planner(effective: Effective, paths: set[str]) -> dict[str, Origin]:
    return {path: Origin("planner") if path in paths else origin for path, origin in effective.origins.items()}


def recorded(recipe: Path) -> Plan | None:
    """The plan beside the recipe of a run; None where there is none."""
    from kitaeru.plan.types import Plan

    path = recipe.parent / "plan.json"
    return Plan.load(path) if path.is_file() else None


def work_out(recipe: Recipe) -> Plan:
    """Read the data and plan for this machine, as `kitaeru train` does before it starts. Imports torch: seconds.

    Raises:
        KitaeruError: the model, the data or the machine does not allow it.
    """
    from kitaeru.data.prepare import prepare
    from kitaeru.machine.probe import probe
    from kitaeru.model.load import config_dict, load_config
    from kitaeru.model.quiet import quiet_libraries
    from kitaeru.model.tokenizer import load_tokenizer
    from kitaeru.plan.choose import default_seq_len, make_plan
    from kitaeru.shape import ModelShape

    quiet_libraries()
    shape = ModelShape.from_config(config_dict(load_config(recipe.model)))
    data = prepare(recipe, load_tokenizer(recipe.model), seq_len=default_seq_len(recipe, shape), bad_rows=None)
    return make_plan(recipe, probe(), shape, data.facts)
