"""Going through a schedule: the forward and backward passes of one process, in the order that the planner simulates.

Micro-batches differ in length, so nothing here has a fixed shape. What crosses between stages is one tensor of hidden
states [1, T, h], and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch

from kitaeru.model.head import forward_arguments
from kitaeru.model.stages import Stages
from kitaeru.parallel.types import Held, Work
from kitaeru.plan.pipeline import Pass

# Micro-batches by number, as `Work` has them, for the passes that count them from 0.
Numbers = Sequence[int]


class Carrier(Protocol):
    """Carries hidden states and their gradients from pass to pass, wherever the next stage is."""

    def begin(self, passes: Sequence[Pass], tokens: Callable[[int], int]) -> None:
        """These passes follow; `tokens` of a micro-batch, as the passes count them."""
        ...

    def take(self, at: int) -> torch.Tensor | None:
        """What pass number `at` works on; None for token ids, and for the backward pass of the loss."""
        ...

    def give(self, now: Pass, tensor: torch.Tensor) -> None:
        """What a pass has made, for the next stage (forward) or the one before (backward)."""
        ...

    def end(self) -> None:
        """All passes are done."""
        ...


def go_through(
    held: Held,
    work: Work,
    passes: Sequence[Pass],
    stages: Stages,
    carrier: Carrier,
    device_of: Callable[[int], torch.device],
) -> dict[int, torch.Tensor]:
    """Do all passes; the shares of the micro-batches that met the loss here. Without backward ones nothing is kept."""
    numbers = [number for number in work.numbers if number is not None]
    training = any(now.kind == "B" for now in passes)
    last = len(stages.share.cuts) - 1
    shares: dict[int, torch.Tensor] = {}
    kept: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor]] = {}
    carrier.begin(passes, lambda place: work.tokens[numbers[place]])
    for at, now in enumerate(passes):
        number = numbers[now.micro_batch]
        arrived = carrier.take(at)
        work.begin(number)
        if now.kind == "B":
            given, result = kept.pop((now.stage, now.micro_batch))
            if now.stage == last:
                work.scale(result).backward()
            elif result.requires_grad:
                result.backward(arrived)
            if given is not None:
                assert given.grad is not None
                carrier.give(now, given.grad)
            continue
        if arrived is not None and training:
            arrived.requires_grad_()
        batch = work.batch(number, device_of(now.stage))
        with nullcontext() if training else torch.no_grad(), stages.at(now.stage, arrived), work.autocast():
            if now.stage == last:
                result = work.share(held.unit(batch))
                shares[number] = result.detach()
            else:
                result = stages.decoder(**forward_arguments(batch)).last_hidden_state
        if now.stage != last:
            carrier.give(now, result.detach())
        if training:
            kept[now.stage, now.micro_batch] = (arrived, result)
        del arrived, result
    carrier.end()
    return shares
