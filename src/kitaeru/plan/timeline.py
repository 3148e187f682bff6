"""When each device of a layout works on what, during one step: for drawing, from the same numbers as the speed.

Strategies that give every device all layers follow from the step's parts; pipelines are simulated pass by pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kitaeru.plan.pipeline import orders, simulate
from kitaeru.plan.speed import Load, Pace, Step, layer_on, step
from kitaeru.plan.stored import residual_bytes
from kitaeru.plan.types import Layout
from kitaeru.shape import ModelShape

SpanKind = Literal["forward", "backward", "waiting", "optimizer"]
WAITS = ("communication", "offload", "bubble")


@dataclass(frozen=True)
class Span:
    """A stretch of one device's step, in seconds from its start. `waiting` is for other devices' data or for RAM."""

    rank: int
    kind: SpanKind
    start: float
    end: float


@dataclass(frozen=True)
class Day:
    """One step of a layout: its spans, its length, and how many micro-batches a replica goes through."""

    seconds: float
    micro_batches: int
    spans: tuple[Span, ...]


def day(layout: Layout, shape: ModelShape, load: Load, at: Pace) -> Day:
    """The step, device by device. What no span covers is idle."""
    found = step(layout, shape, load, at)
    count = load.micro_batches(layout)
    full = replace(layout, micro_batch_tokens=load.tokens_in(layout))
    if layout.strategy in ("pipeline", "model_parallel"):
        spans = _piped(full, shape, load, at, count, found)
    else:
        spans = _side_by_side(full, shape, load, at, count, found)
    return Day(found.seconds, count, tuple(spans))


def _side_by_side(layout: Layout, shape: ModelShape, load: Load, at: Pace, count: int, found: Step) -> Iterator[Span]:
    """Every device goes through all layers of its own micro-batches; a slower one sets the pace."""
    optimizer = found.parts.get("optimizer", 0.0)
    waiting = sum(found.parts.get(kind, 0.0) for kind in WAITS)
    working = found.seconds - optimizer - waiting
    most = max(1 - idle for idle in found.idle)
    for rank in range(layout.devices):
        own = working * (1 - found.idle[rank]) / most
        layer = layer_on(layout, shape, load, at.devices[rank])
        ahead = layer.forward.seconds * shape.layers + layer.head.seconds
        share = ahead / (ahead + layer.backward.seconds * shape.layers)
        now = 0.0
        # Waits lie between layers; drawn behind each pass they are as long.
        for kind, seconds in (("forward", share), ("backward", 1 - share)) * count:
            end = now + own / count * seconds
            yield Span(rank, "forward" if kind == "forward" else "backward", now, end)
            now = end + waiting / (2 * count)
            if waiting:
                yield Span(rank, "waiting", end, now)
        yield Span(rank, "optimizer", now, now + optimizer)


def _stages(layout: Layout, shape: ModelShape, load: Load, at: Pace) -> tuple[list[float], list[float], float]:
    """Seconds of each stage forward and backward, and of a hand-over."""
    ranks, last = layout.ranks_per_replica, len(layout.cuts) - 1
    forward, backward = [], []
    for stage, layers in enumerate(layout.cuts):
        rates = min(at.devices[stage % ranks :: ranks], key=lambda found: found.gemm)
        layer = layer_on(layout, shape, load, rates, head=stage == last)
        forward.append(layer.forward.seconds * layers + layer.head.seconds + rates.micro_batch / (last + 1))
        backward.append(layer.backward.seconds * layers)
    sent = residual_bytes(layout) * layout.micro_batch_tokens * shape.hidden / at.link.bytes_s + at.link.latency
    return forward, backward, sent


def _piped(layout: Layout, shape: ModelShape, load: Load, at: Pace, count: int, found: Step) -> Iterator[Span]:
    forward, backward, sent = _stages(layout, shape, load, at)
    ranks = layout.ranks_per_replica
    timeline = simulate(orders(layout.variant, ranks, count, layout.chunks), forward, backward, sent)
    for rank in range(layout.devices):
        for now, end in timeline.ended[rank % ranks]:
            seconds = forward[now.stage] if now.kind == "F" else backward[now.stage]
            yield Span(rank, "forward" if now.kind == "F" else "backward", end - seconds, end)
        yield Span(rank, "optimizer", found.seconds - found.parts.get("optimizer", 0.0), found.seconds)
