"""Data parallel: every rank holds the whole model and computes some of the micro-batches; gradients are summed once an
optimizer step, while the last micro-batch's backward pass still runs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from kitaeru.parallel import single
from kitaeru.parallel.graphs import Replays
from kitaeru.parallel.reducer import Reducer
from kitaeru.parallel.start import same_start
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.types import Layout

# Weights, gradients after `reduce`, and moments are whole and equal on every rank, as on one device.
inside, losses, norm, gather, scatter, model_state = (
    single.inside,
    single.losses,
    single.norm,
    single.gather,
    single.scatter,
    single.model_state,
)


def deal(tokens: Sequence[int], ranks: int) -> list[list[int | None]]:
    """The longest micro-batch first, each to the rank with the fewest tokens so far: at most 4/3 of the best (Graham).

    >>> deal([5, 3, 2, 6], 2)
    [[2, 3], [0, 1]]
    """
    loads = [(0, rank) for rank in range(ranks)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, rank = heapq.heappop(loads)
        hands[rank].append(number)
        heapq.heappush(loads, (load + tokens[number], rank))
    return [list[int | None](sorted(hand)) for hand in hands]


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """The model as it is, with eyes on the gradients."""
    same_start(unit.model, named, world)
    replays = Replays(named) if layout.graphs else None
    return Held(world, unit, named, Reducer([parameter for _, parameter in named]), replays=replays)


def gradients(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """One micro-batch after the other; in the last backward pass each bucket is sent off once it is full, or
    all are afterwards if it is replayed.
    """
    return single.in_turn(held, work, _backward)


def _backward(held: Held, loss: torch.Tensor, last: bool) -> None:
    if last:
        held.state.start()
    loss.backward()


def reduce(held: Held) -> None:
    """Send the buckets that are left and take all sums in."""
    held.state.finish()
