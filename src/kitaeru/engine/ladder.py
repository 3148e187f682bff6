"""When memory runs out after all: one rung down, with the same global batch and the same mathematics.

Rungs: micro-batches of half the tokens, more of them to a step, down to the longest example; then activations of half
the layers computed again, then of all; then what goes into the layers in RAM. The loss is a sum over the tokens of the
global batch whatever it is cut into, so a run that stepped down computes what it would have computed.

Ranks that do not meet inside a pass agree after it and do the step again. Where they do meet, a rank that fails leaves
the others waiting: the run is started again from its last checkpoint, on the lower rung.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from kitaeru.engine.build import Trainee
from kitaeru.engine.memory import out_of_memory, trim
from kitaeru.errors import SteppedDownError, TrainingError
from kitaeru.events import SteppedDown
from kitaeru.files import write_json
from kitaeru.i18n import tr
from kitaeru.parallel import APART
from kitaeru.plan.layouts import BY_LAYER, DISK
from kitaeru.plan.types import Activations, Layout, Plan, policy_name

RUNG = "rung.json"


@dataclass(frozen=True)
class Rung:
    """Where a run is below its plan, in `rung.json`: it holds for this planned layout (by name) and no other."""

    planned: str
    planned_tokens: int
    planned_activations: str
    micro_batch_tokens: int
    activations: Activations
    step: int
    recomputed: int = 0

    def layout(self, planned: Layout) -> Layout:
        """The planned layout on this rung."""
        return replace(
            planned,
            micro_batch_tokens=self.micro_batch_tokens,
            activations=self.activations,
            recomputed=self.recomputed,
            graphs=planned.graphs and self.activations != "offload",
            step_in_backward=planned.step_in_backward and self.micro_batch_tokens == planned.micro_batch_tokens,
        )

    def event(self) -> SteppedDown:
        """The event that says so."""
        return SteppedDown(
            step=self.step,
            micro_batch_tokens=self.micro_batch_tokens,
            activations=policy_name(self.activations, self.recomputed),
            planned_micro_batch_tokens=self.planned_tokens,
            planned_activations=self.planned_activations,
        )


def at(plan: Plan, layout: Layout) -> Plan:
    """The plan with another layout; its costs stay those that were planned."""
    return replace(plan, chosen=replace(plan.chosen, layout=layout))


def _read(folder: Path) -> Rung | None:
    with suppress(OSError, ValueError, TypeError):
        return Rung(**json.loads((folder / RUNG).read_text(encoding="utf-8")))
    return None


def resumed(folder: Path, plan: Plan) -> Plan:
    """The plan on the rung that an earlier part of this run came down to; as it is where that was planned otherwise."""
    found = _read(folder)
    return at(plan, found.layout(plan.layout)) if found is not None and found.planned == plan.layout.name else plan


def told(folder: Path, plan: Plan) -> SteppedDown | None:
    """The event for a run that begins on a rung below its plan."""
    found = _read(folder)
    return found.event() if found is not None and found.layout(plan.layout) == plan.layout else None


def forget(folder: Path) -> None:
    """A run that begins anew is on no rung."""
    (folder / RUNG).unlink(missing_ok=True)


def lower(layout: Layout, *, longest: int, packing: bool, layers: int) -> Layout | None:
    """The layout one rung down; None where there is none. `longest`: tokens that a micro-batch must hold; `layers` of
    the model.

    >>> layout = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> [rung.name for rung in (lower(layout, longest=n, packing=True, layers=9) for n in (100, 3000, 4090)) if rung]
    ['single/lora/keep/2048', 'single/lora/keep/3000', 'single/lora/keep-recompute5/4096']
    >>> again = replace(layout, activations="recompute")
    >>> [lower(one, longest=4090, packing=True, layers=9) is None for one in (again, replace(again, variant="offload"))]
    [False, True]
    >>> lower(replace(layout, step_in_backward=True), longest=100, packing=True, layers=9).name
    'single/lora/keep-recompute5/4096'
    """
    least = -(-longest // 8) * 8
    # Several micro-batches a step would need all gradients at once.
    if packing and layout.micro_batch_tokens > least and not layout.step_in_backward:
        return replace(layout, micro_batch_tokens=max(least, layout.micro_batch_tokens // 16 * 8))
    by_layer, half = layout.strategy in BY_LAYER and layout.variant not in (DISK, "offload"), -(-layers // 2)
    if layout.activations.startswith("keep"):
        if by_layer and layout.recomputed < half < layers:
            return replace(layout, recomputed=half)
        return replace(layout, activations="recompute", recomputed=0)
    from_ram = layout.variant.startswith("offload")  # whose weights have the link already
    if layout.activations == "recompute" and by_layer and layout.device == "cuda" and not from_ram:
        return replace(layout, activations="offload", graphs=False)
    return None


class Ladder:
    """What a loop does when memory runs out. `longest` is its longest example; `save` keeps the run as it is after its
    last step.
    """

    def __init__(self, trainee: Trainee, folder: Path, longest: int, save: Callable[[], None]) -> None:
        self.trainee, self.folder, self.longest, self.save = trainee, folder, longest, save
        layout = trainee.plan.layout
        tokens, kept = layout.micro_batch_tokens, layout.activations
        self.rung = Rung(layout.name, tokens, layout.policy, tokens, kept, 0, layout.recomputed)
        earlier = _read(folder)  # the plan of a resumed run is on its rung already
        if earlier is not None and earlier.layout(layout) == layout:
            self.rung = earlier

    def caught(self, error: BaseException, step: int, *, again: bool = True) -> None:
        """Take an error of a pass: it comes back out unless it is memory that ran out.

        Raises:
            SteppedDownError: ranks wait for each other inside a pass, or what failed cannot be done `again`.
            TrainingError: there is no lower rung.
        """
        if not out_of_memory(error):
            raise error
        world = self.trainee.world
        if not again or not (world.size == 1 or self.trainee.plan.layout.strategy in APART):
            raise self._left(self._choose(step), step) from None

    def down(self, step: int) -> None:
        """All ranks have agreed that the passes after `step` do not fit: go one rung down.

        Raises:
            SteppedDownError: the model must be built anew for it; the run was saved where it is.
            TrainingError: there is no lower rung.
        """
        before, now = self.trainee.plan.layout, self._choose(step)
        self._free()
        if now.policy != before.policy:
            if step:
                self.save()
            raise self._left(now, step)
        self._at(now, step, write=self.trainee.world.main)
        self.trainee.plan = at(self.trainee.plan, now)
        self.trainee.emit(self.rung.event())

    def _choose(self, step: int) -> Layout:
        layout, packing = self.trainee.plan.layout, self.trainee.plan.recipe.data.packing
        layers = self.trainee.causal_lm.config.num_hidden_layers
        found = lower(layout, longest=self.longest, packing=packing, layers=layers)
        if found is None:
            raise TrainingError(
                tr("Memory ran out, and there is no smaller way to train this: {layout}.", layout=layout.name),
                where=tr("step {step}", step=step + 1),
                remedy=tr("Lower data.seq_len or lora.r, or take a smaller base: --set model.quantize=nf4"),
            )
        return found

    def _left(self, now: Layout, step: int) -> SteppedDownError:
        self._at(now, step, write=True)
        return SteppedDownError(
            tr(
                "Memory ran out at step {step}; the run goes on from its last checkpoint as {layout}.",
                step=step + 1,
                layout=now.name,
            ),
            remedy=tr("Go on with: kitaeru train {folder} --resume", folder=self.folder),
        )

    def _at(self, now: Layout, step: int, *, write: bool) -> None:
        self.rung = replace(
            self.rung,
            micro_batch_tokens=now.micro_batch_tokens,
            activations=now.activations,
            recomputed=now.recomputed,
            step=step,
        )
        if write:
            write_json(self.folder / RUNG, asdict(self.rung))

    def _free(self) -> None:
        self.trainee.optimizer.zero_grad(set_to_none=True)
        if self.trainee.held.replays is not None:
            self.trainee.held.replays.drop()
        gc.collect()
        trim(self.trainee.device)
        if self.trainee.device.type == "cuda":
            torch.cuda.empty_cache()
