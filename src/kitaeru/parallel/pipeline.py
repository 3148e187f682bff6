"""Pipeline: the model is cut into stages, each rank has its own, and micro-batches go through one behind another.

The schedule is the one that the planner simulates (`plan.pipeline.orders`), with the plan's cuts. The last stage has
the head and the losses. Parameters keep the names of the whole model; each rank trains those that it has. With
`replicas`, several such lines train side by side and add up their gradients once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel

from kitaeru.model.stages import Stages, share_of
from kitaeru.parallel import ddp, single
from kitaeru.parallel.passes import go_through
from kitaeru.parallel.reducer import Reducer
from kitaeru.parallel.start import same_start
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.wire import Line, Together, Wire, channels
from kitaeru.parallel.world import World
from kitaeru.plan.pipeline import in_flight, orders
from kitaeru.plan.types import Layout

# Every rank calls the model at the same time; what each has of it joins in.
inside, gather, scatter, deal = single.inside, single.gather, single.scatter, ddp.deal


@dataclass
class _Pipe:
    layout: Layout
    line: Line
    stages: Stages
    wire: Wire
    device: torch.device
    reducer: Reducer | None = None


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """Keep this rank's stages, and connect them with the others'."""
    ranks = layout.ranks_per_replica
    share = share_of(layout, world.rank)
    assert share is not None
    device = single.own_device(layout)
    mine = [(name, parameter) for name, parameter in named if not parameter.is_meta]
    line, groups = _connect(world, ranks, len(layout.cuts))
    reducer = None
    if layout.replicas > 1:
        same = [dist.new_group(list(range(place, world.size, ranks))) for place in range(ranks)][line.place]
        same_start(unit.model, mine, world, same)
        reducer = Reducer([parameter for _, parameter in mine], group=same)
    wire = Wire(world, line, groups, device)
    model: Any = unit.model.get_base_model() if isinstance(unit.model, PeftModel) else unit.model
    stages = Stages(model, share, device, Together(line, wire))
    return Held(world, unit, mine, _Pipe(layout, line, stages, wire, device, reducer))


def _connect(world: World, ranks: int, stages: int) -> tuple[Line, dict[tuple[str, bool], Any]]:
    """This rank's line and its channels; all processes make the groups of all lines, in the same order."""
    found = None
    for first in range(0, world.size, ranks):
        members = tuple(range(first, first + ranks))
        line = Line(members, world.rank - first, stages, dist.new_group(list(members)))
        groups = channels(members)
        if world.rank in members:
            found = line, groups
    assert found is not None
    return found


def gradients(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """This rank's passes of the schedule; the losses are known on the last stage's rank."""
    return _go(held, work, training=True)


def losses(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """The forward passes alone."""
    return _go(held, work, training=False)


def _go(held: Held, work: Work, *, training: bool) -> dict[int, torch.Tensor]:
    pipe: _Pipe = held.state
    layout, ranks = pipe.layout, pipe.layout.ranks_per_replica
    count = len(work.numbers)
    passes = orders(layout.variant, ranks, count, layout.chunks)[pipe.line.place]
    if not training:
        passes = [now for now in passes if now.kind == "F"]
    pipe.wire.under_way = in_flight(layout.variant, 0, ranks, count, layout.chunks) + 1
    return go_through(held, work, passes, pipe.stages, pipe.wire, lambda _: pipe.device)


def reduce(held: Held) -> None:
    """Each stage's gradients are whole, but for those of other replicas."""
    if held.state.reducer is not None:
        held.state.reducer.finish()


def norm(held: Held) -> torch.Tensor:
    """The norm over all stages."""
    total = single.squares(held.named).cpu()
    dist.all_reduce(total, group=held.state.line.group)
    return total.sqrt()


def model_state(held: Held) -> dict[str, torch.Tensor]:
    """What the ranks have of the model, together on the main process."""
    state = held.unit.model.state_dict()
    return held.world.united({name: tensor.cpu() for name, tensor in state.items() if not tensor.is_meta})
