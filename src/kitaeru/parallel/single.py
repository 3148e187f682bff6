"""One device: the reference that every other strategy must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from kitaeru.parallel.graphs import Replays
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.types import Layout

T = TypeVar("T")


def deal(tokens: Sequence[int], ranks: int) -> list[list[int | None]]:
    """Every micro-batch, in order."""
    return [list(range(len(tokens))) for _ in range(ranks)]


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """The model as it is."""
    return Held(world, unit, named, replays=Replays(named) if layout.graphs else None)


def inside(held: Held, function: Callable[[], T]) -> T:
    """Call it."""
    return function()


Backward = Callable[[Held, torch.Tensor, bool], None]


def gradients(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """One micro-batch after the other."""
    return in_turn(held, work, lambda _, loss, __: loss.backward())


def in_turn(held: Held, work: Work, backward: Backward) -> dict[int, torch.Tensor]:
    """A forward and a backward pass of each micro-batch; `backward` is given each loss, and whether it is the last,
    unless the two passes are replayed.
    """
    shares = {}
    if held.replays is not None:
        held.replays.begin()
    for place, number in enumerate(work.numbers):
        work.begin(number)
        batch = work.batch(number, device_of(held))
        if held.replays is not None and number is not None:
            replayed = held.replays.passes(held.unit, batch, work)
            if replayed is not None:
                shares[number] = replayed
                continue
        with work.autocast():
            share = work.share(held.unit(batch))
        if number is None:
            share = share * 0
        else:
            shares[number] = share.detach()
        backward(held, work.scale(share), place == len(work.numbers) - 1)
        del share  # and with it the graph of this pass: what is captured next must not meet its nodes
    return shares


def losses(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """One micro-batch after the other."""
    shares = {}
    for number in work.numbers:
        work.begin(number)
        with work.autocast():
            share = work.share(held.unit(work.batch(number, device_of(held))))
        if number is not None:
            shares[number] = share
    return shares


def own_device(layout: Layout) -> torch.device:
    """The device of this process, where each process has one."""
    return torch.device("cuda", torch.cuda.current_device()) if layout.device == "cuda" else torch.device("cpu")


def device_of(held: Held) -> torch.device:
    """Where this rank computes: its weights may be elsewhere, its trained ones are not unless it says so."""
    return held.at or held.named[0][1].device


def reduce(held: Held) -> None:
    """They are whole already."""


def norm(held: Held) -> torch.Tensor:
    """The norm of all gradients."""
    return squares(held.named).sqrt()


def squares(named: Named) -> torch.Tensor:
    """The sum of the squares of all gradients, in 64 bits: in 32 a sum over millions depends on how it is cut up."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for _, parameter in named:
        if parameter.grad is not None:
            by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    found = [torch.stack(torch._foreach_norm(each, dtype=torch.float64)).square().sum() for each in by_device.values()]
    total = torch.zeros((), dtype=torch.float64, device=next(iter(by_device), None))
    for part in found:
        total += part.to(total.device)
    return total


def gather(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """It is whole."""
    return tensor.detach().cpu()


def scatter(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """All of it is here."""
    return tensor


def model_state(held: Held) -> dict[str, torch.Tensor]:
    """The model's own."""
    state: dict[str, torch.Tensor] = held.unit.model.state_dict()
    return state
