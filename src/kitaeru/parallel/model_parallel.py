"""Model parallel: one process, the model's layers on several devices, several micro-batches under way.

The stages and the schedule are the pipeline's. One process launches the passes of all devices in the order in which
they would run; since a GPU works through what it was given while the next is being launched, all of them work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel

from kitaeru.model.stages import Share, Stages, inputs_follow, stage_devices
from kitaeru.parallel import single
from kitaeru.parallel.passes import go_through
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.pipeline import Pass, in_one_process, orders
from kitaeru.plan.types import Layout

deal, inside, reduce, norm, gather, scatter, model_state = (
    single.deal,
    single.inside,
    single.reduce,
    single.norm,
    single.gather,
    single.scatter,
    single.model_state,
)


@dataclass
class _Split:
    stages: Stages
    devices: tuple[torch.device, ...]


@dataclass
class _Across:
    """Carries tensors from device to device."""

    devices: tuple[torch.device, ...]
    _passes: Sequence[Pass] = ()
    _ready: dict[Pass, torch.Tensor] = field(default_factory=dict)

    def begin(self, passes: Sequence[Pass], tokens: Callable[[int], int]) -> None:
        """These passes follow."""
        self._passes = passes

    def take(self, at: int) -> torch.Tensor | None:
        """What was given for pass number `at`."""
        return self._ready.pop(self._passes[at], None)

    def give(self, now: Pass, tensor: torch.Tensor) -> None:
        """To the device of the next stage, or of the one before."""
        other = now.stage + 1 if now.kind == "F" else now.stage - 1
        self._ready[Pass(now.kind, other, now.micro_batch)] = tensor.to(self.devices[other], non_blocking=True)

    def end(self) -> None:
        """Nothing is left."""


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """The model where it was loaded; inputs come to their devices."""
    devices = stage_devices(layout)
    model: Any = unit.model.get_base_model() if isinstance(unit.model, PeftModel) else unit.model
    inputs_follow(model, layout.cuts, devices)
    share = Share(layout.cuts, tuple(range(len(layout.cuts))))
    stages = Stages(model, share, devices[0], None)
    distinct = tuple(dict.fromkeys(devices))
    return Held(world, unit, named, _Split(stages, devices), distinct if len(distinct) > 1 else ())


def gradients(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """All passes of the schedule."""
    return _go(held, work, training=True)


def losses(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """The forward passes alone."""
    return _go(held, work, training=False)


def _go(held: Held, work: Work, *, training: bool) -> dict[int, torch.Tensor]:
    split: _Split = held.state
    passes = in_one_process(orders("1f1b", len(split.devices), len(work.numbers)))
    if not training:
        passes = [now for now in passes if now.kind == "F"]
    return go_through(held, work, passes, split.stages, _Across(split.devices), lambda stage: split.devices[stage])
