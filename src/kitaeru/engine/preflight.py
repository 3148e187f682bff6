"""Before training: the worst that is to come is done once, and undone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from kitaeru.data.batches import MicroBatches
from kitaeru.data.corpus import Corpus
from kitaeru.engine.memory import peak_bytes
from kitaeru.engine.optim import set_rate
from kitaeru.events import Preflight
from kitaeru.plan.layouts import DISK

if TYPE_CHECKING:
    from kitaeru.engine.build import Trainee
    from kitaeru.engine.loop import Loop

# Passes of each copy of the model: the second finds the gradients of the first; a pipeline is to be full.
PASSES = 2


def worst_examples(corpus: Corpus, budget: int, *, packing: bool, most: int | None = None) -> list[int]:
    """A micro-batch as large as the sampler may give: the longest example, and others that fill it up, but for less
    than the shortest example has.

    `most` tokens are in a whole global batch, however large a micro-batch may be.
    """
    order = sorted(range(len(corpus)), key=lambda i: (-int(corpus.lengths[i]), i))
    if not packing:
        return order[:1]
    room = budget if most is None else min(budget, max(most, int(corpus.lengths[order[0]])))
    chosen: list[int] = []
    place = 0
    while place < len(order):
        length = int(corpus.lengths[order[place]])
        if length <= room:  # the same example may come again: the sampler repeats them from epoch to epoch
            chosen.append(order[place])
            room -= length
        else:
            place += 1
    return chosen


@contextmanager
def undrawn(trainee: Trainee) -> Iterator[None]:
    """What is done here leaves random numbers as if none had been drawn."""
    before = torch.random.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(trainee.device) if trainee.device.type == "cuda" else None
    yield
    torch.random.set_rng_state(before)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, trainee.device)


def preflight(loop: Loop) -> None:
    """The largest micro-batch forward and backward, with the loss head, and an optimizer step that changes nothing.

    Gradients are set to nought and the rate too, so no weight moves; the optimizer's state is thrown away, so this is
    for before anything is restored. Random numbers are drawn later as if none had been drawn here.

    Raises:
        TrainingError: it does not fit, and nothing smaller would.
        SteppedDownError: it does not fit, and the run must be started again a rung lower.
    """
    started, trainee, world = time.perf_counter(), loop.trainee, loop.world
    devices = trainee.held.devices or (trainee.device,)
    with undrawn(trainee):
        while True:
            for device in devices:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
            batches = _batches(loop)
            set_rate(trainee.optimizer, 0.0)
            with loop._changing("rehearse", batches):
                shares = loop._gradients(batches, batches.trained_tokens, 0)
            if shares is not None:
                break
            loop.ladder.down(0)
        _step(loop)
    peaks = world.numbers([peak_bytes(device) for device in devices])
    trainee.emit(
        Preflight(
            tokens=batches.tokens[0],
            peak_bytes=max(peaks),
            planned_bytes=trainee.plan.chosen.step_bytes,
            seconds=time.perf_counter() - started,
        )
    )


def _batches(loop: Loop) -> MicroBatches:
    """So many of the worst micro-batch that each copy of the model has two, or as many as a step has."""
    trainee, section = loop.trainee, loop.section
    layout = trainee.plan.layout
    worst = worst_examples(
        loop.train,
        layout.micro_batch_tokens,
        packing=trainee.plan.recipe.data.packing,
        most=section.global_batch_tokens,
    )
    tokens = int(loop.train.lengths[worst].sum())
    of_step = (section.global_batch_tokens or 0) // max(1, tokens) or (section.global_batch_examples or 1) // len(worst)
    wanted = max(PASSES, layout.ranks_per_replica if layout.strategy == "pipeline" else 0)
    if layout.variant == DISK:  # a pass reads the whole model
        wanted = 1
    count = max(1, min(wanted * layout.replicas, of_step))
    return MicroBatches(loop.train, [worst] * count)


def _step(loop: Loop) -> None:
    """What the optimizer's step takes, with nothing to change."""
    trainee = loop.trainee
    for _, parameter in trainee.named:
        if parameter.grad is not None:
            parameter.grad.zero_()
    try:
        trainee.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        loop.ladder.caught(error, 0, again=False)
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.optimizer.state.clear()
