"""Pipeline schedules, and a simulator that says when each device works and when it waits.

A model is cut into stages; rank r of p holds the stages r, r+p, r+2p …, its chunks. A schedule is each rank's fixed
order of forward and backward passes; a pass starts when its rank is free and what it needs has arrived. Nothing is
assumed of the stages' times: they may differ, and so may the devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["F", "B"]
SCHEDULES = ("gpipe", "1f1b", "interleaved")


class Pass(NamedTuple):
    """One forward (F) or backward (B) pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Timeline:
    """What a simulation found: seconds from the first pass to the last, each rank's share of them without work, and
    when each pass ended, rank by rank.
    """

    seconds: float
    idle: tuple[float, ...]
    ended: tuple[tuple[tuple[Pass, float], ...], ...] = ()


def orders(schedule: str, ranks: int, micro_batches: int, chunks: int = 1) -> list[list[Pass]]:
    """Each rank's passes in order.

    >>> [f"{p.kind}{p.micro_batch}" for p in orders("1f1b", 2, 3)[0]]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    if schedule == "gpipe":
        return [list(_gpipe(rank, micro_batches)) for rank in range(ranks)]
    if chunks == 1:
        return [list(_one_forward_one_backward(rank, ranks, micro_batches)) for rank in range(ranks)]
    # A last round that is not full is one in which some micro-batches are left out: nothing waits for them.
    return [
        [now for now in _interleaved(rank, ranks, micro_batches, chunks) if now.micro_batch < micro_batches]
        for rank in range(ranks)
    ]


def in_one_process(order: Sequence[Sequence[Pass]]) -> list[Pass]:
    """All ranks' passes one after another, in the order in which they would end if a backward pass took twice as long
    as a forward one: what a single process launches on several devices so that all of them work.

    >>> [f"{p.kind}{p.stage}{p.micro_batch}" for p in in_one_process(orders("1f1b", 2, 2))]
    ['F00', 'F01', 'F10', 'B10', 'F11', 'B00', 'B11', 'B01']
    """
    stages = 1 + max((now.stage for passes in order for now in passes), default=0)
    ended = simulate(order, [1.0] * stages, [2.0] * stages).ended
    found = sorted((end, rank, at) for rank, passes in enumerate(ended) for at, (_, end) in enumerate(passes))
    return [ended[rank][at][0] for _, rank, at in found]


def _gpipe(rank: int, micro_batches: int) -> Iterator[Pass]:
    yield from (Pass("F", rank, j) for j in range(micro_batches))
    yield from (Pass("B", rank, j) for j in range(micro_batches))


def _one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> Iterator[Pass]:
    ahead = min(micro_batches, ranks - rank - 1)
    yield from (Pass("F", rank, j) for j in range(ahead))
    for j in range(micro_batches - ahead):
        yield Pass("F", rank, j + ahead)
        yield Pass("B", rank, j)
    yield from (Pass("B", rank, j) for j in range(micro_batches - ahead, micro_batches))


def _interleaved(rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Pass]:
    """Rounds of `ranks` micro-batches go through one chunk after the other (Narayanan et al., arXiv 2104.04473)."""

    def at(step: int, kind: Kind) -> Pass:
        part, lane = divmod(step, ranks)
        chunk = part % chunks
        micro_batch = part // chunks * ranks + lane
        return Pass(kind, (chunk if kind == "F" else chunks - 1 - chunk) * ranks + rank, micro_batch)

    rounds = -(-micro_batches // ranks) * ranks
    total = rounds * chunks
    ahead = min(total, (ranks - rank - 1) * 2 + (chunks - 1) * ranks)
    yield from (at(step, "F") for step in range(ahead))
    for step in range(total - ahead):
        yield at(step + ahead, "F")
        yield at(step, "B")
    yield from (at(step, "B") for step in range(total - ahead, total))


def in_flight(schedule: str, rank: int, ranks: int, micro_batches: int, chunks: int = 1) -> int:
    """The most forward passes a rank has made whose backward pass is still to come: sets of activations it keeps.

    Counted in stages: with two chunks, two passes keep as much as one pass through both.

    >>> [in_flight("1f1b", rank, 4, 8) for rank in range(4)], in_flight("gpipe", 0, 4, 8)
    ([4, 3, 2, 1], 8)
    """
    if schedule == "gpipe":
        return micro_batches
    if chunks == 1:
        return min(micro_batches, ranks - rank)
    return min(micro_batches * chunks, (ranks - rank - 1) * 2 + (chunks - 1) * ranks + 1)


class Move(NamedTuple):
    """A pass as the simulation works it off: its rank, the place in the list of the pass whose result it takes (-1: it
    takes none), whether that one is another rank's, whether it goes forward, and its stage.
    """

    rank: int
    needed: int
    handed_over: bool
    is_forward: bool
    stage: int


def simulate(
    order: Sequence[Sequence[Pass]], forward: Sequence[float], backward: Sequence[float], transfer: float = 0.0
) -> Timeline:
    """Run a schedule. `forward` and `backward` are seconds of each stage, `transfer` of one hand-over between ranks.

    >>> round(simulate(orders("1f1b", 4, 8), [1.0] * 4, [2.0] * 4).idle[0], 4)  # (p - 1) / (m + p - 1) = 3 / 11
    0.2727

    Raises:
        ValueError: the schedule waits for itself.
    """
    moves = _moves(order, len(forward) - 1)
    ends = _ends(moves, len(order), forward, backward, transfer)
    ended: list[list[float]] = [[] for _ in order]
    busy = [0.0] * len(order)
    for move, end in zip(moves, ends, strict=True):
        ended[move.rank].append(end)
        busy[move.rank] += forward[move.stage] if move.is_forward else backward[move.stage]
    total = max(ends, default=0.0)
    idle = tuple(1 - used / total if total else 0.0 for used in busy)
    return Timeline(total, idle, tuple(tuple(zip(*rank, strict=True)) for rank in zip(order, ended, strict=True)))


def schedule_seconds(
    schedule: str,
    ranks: int,
    micro_batches: int,
    chunks: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float,
) -> float:
    """Seconds from the first pass to the last: `simulate(orders(…), …).seconds`, of which a planner asks often."""
    return max(
        _ends(_moves_of(schedule, ranks, micro_batches, chunks), ranks, forward, backward, transfer), default=0.0
    )


@lru_cache(maxsize=256)
def _moves_of(schedule: str, ranks: int, micro_batches: int, chunks: int) -> list[Move]:
    return _moves(orders(schedule, ranks, micro_batches, chunks), ranks * chunks - 1)


def _moves(order: Sequence[Sequence[Pass]], last: int) -> list[Move]:
    """All ranks' passes, each behind what it needs: which that is depends on no times."""
    ranks = len(order)
    moves: list[Move] = []
    place: dict[Pass, int] = {}
    at, left = [0] * ranks, sum(len(passes) for passes in order)
    while left:
        before = left
        for rank, passes in enumerate(order):
            while at[rank] < len(passes):
                now = passes[at[rank]]
                needed = _needs(now, last)
                if needed is not None and needed not in place:
                    break
                found = -1 if needed is None else place[needed]
                handed_over = needed is not None and needed.stage % ranks != rank
                place[now] = len(moves)
                moves.append(Move(rank, found, handed_over, now.kind == "F", now.stage))
                at[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("the schedule waits for itself")
    return moves


def _ends(
    moves: Sequence[Move], ranks: int, forward: Sequence[float], backward: Sequence[float], transfer: float
) -> list[float]:
    """When each move ends: it starts when its rank is free and what it needs has arrived."""
    free = [0.0] * ranks
    ends: list[float] = []
    for rank, needed, handed_over, is_forward, stage in moves:
        start = free[rank]
        if needed >= 0:
            arrived = ends[needed] + transfer if handed_over else ends[needed]
            start = max(start, arrived)
        free[rank] = end = start + (forward[stage] if is_forward else backward[stage])
        ends.append(end)
    return ends


def _needs(now: Pass, last: int) -> Pass | None:
    """The pass whose result this one takes; None for the first forward pass of a micro-batch."""
    if now.kind == "F":
        return Pass("F", now.stage - 1, now.micro_batch) if now.stage else None
    return Pass("B", now.stage + 1, now.micro_batch) if now.stage < last else Pass("F", last, now.micro_batch)


def balanced_cuts(layers: int, layer_seconds: Sequence[float], extra_seconds: Sequence[float]) -> tuple[int, ...]:
    """Layers for each stage so that the slowest stage is as fast as it can be; every stage has at least one.

    `layer_seconds` is one layer's time on each stage's device, `extra_seconds` what a stage does beside its layers (the
    head on the last).

    >>> balanced_cuts(32, [1.0, 1.0], [0.0, 2.0]), balanced_cuts(32, [1.0, 3.0], [0.0, 0.0])
    ((17, 15), (24, 8))
    """
    cuts = [1] * len(layer_seconds)
    after = [2 * t + e for t, e in zip(layer_seconds, extra_seconds, strict=True)]
    for _ in range(layers - len(cuts)):
        least = after.index(min(after))
        cuts[least] += 1
        after[least] = (cuts[least] + 1) * layer_seconds[least] + extra_seconds[least]
    return tuple(cuts)
