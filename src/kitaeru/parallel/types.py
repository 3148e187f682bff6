"""What a strategy is: a module with the functions below. What it keeps between calls is in `Held`.

The strategy changes where numbers lie and when they move, never what they are. The loop gives every rank the same
global batch, cut into the same micro-batches whatever the number of ranks; a strategy deals them out, and after
`reduce` each rank holds the gradient of the loss of all of them, for the parameters that it changes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from kitaeru.data.types import MicroBatch
from kitaeru.model.parts import Parts
from kitaeru.parallel.world import World
from kitaeru.plan.types import Layout

if TYPE_CHECKING:
    from kitaeru.parallel.graphs import Replays

T = TypeVar("T")
Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Engine:
    """For a strategy with an engine of its own: how that is set up, and the optimizer that it is to drive."""

    config: Mapping[str, Any]
    optimizer: Callable[[Named], torch.optim.Optimizer]


class Unit(nn.Module):
    """A model as one thing to call: with a micro-batch it gives the loss sum, with a function it calls that.

    A strategy that keeps weights in pieces puts them together around `forward`, so everything that reads weights goes
    through here. `loss_sum` is filled in once the output head is recognised. `parts`: where the weights come from, if
    `model` is an outline. `engine`: for a strategy that brings its own.
    """

    loss_sum: Callable[[MicroBatch], torch.Tensor]

    def __init__(self, model: nn.Module, parts: Parts | None = None, engine: Engine | None = None) -> None:
        super().__init__()
        self.model = model
        self.parts = parts
        self.engine = engine

    def forward(self, what: MicroBatch | Callable[[], Any]) -> Any:
        """The loss sum of a micro-batch, or what the function gives."""
        return self.loss_sum(what) if isinstance(what, MicroBatch) else what()


@dataclass(frozen=True)
class Rows:
    """A piece of a parameter: of the whole one of `shape` the rows from `first` on."""

    shape: tuple[int, ...]
    first: int


@dataclass
class Held:
    """What this rank holds: the model, and the trained parameters (or its pieces of them) that it changes itself.

    Names in `named` are those of the whole model, in its order; ranks may hold different ones. `state` is the
    strategy's own. `devices` are those of this process where it has more than one. `at`: where it computes (None: where
    its trained parameters are). `rows`: what it writes into checkpoints, if its pieces are rows. `first_rows`: the
    number of the first row of each piece, for an optimizer to which places matter. `optimizer`: the one
    that a strategy drives itself. `elsewhere`: how many numbers of the trained parameters, and of all, only others
    have, where the model's parameters here are pieces themselves. `replays`: micro-batches as CUDA graphs, where the
    layout has them. `notices`: what a person should be told.
    """

    world: World
    unit: Unit
    named: Named
    state: Any = None
    devices: tuple[torch.device, ...] = ()
    at: torch.device | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)
    first_rows: Mapping[str, int] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    elsewhere: tuple[int, int] = (0, 0)
    replays: Replays | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a rank computes of a global batch, or of a validation set.

    `numbers` are its micro-batches, from `deal`; `tokens` the tokens of each of all. `batch(number, device)` makes one
    (None: the shortest). `begin(number)` is called before each pass, `autocast()` around the forward ones. `share`
    turns a loss sum into what is differentiated, which `scale` scales.
    """

    numbers: Sequence[int | None]
    tokens: Sequence[int]
    batch: Callable[[int | None, torch.device], MicroBatch]
    begin: Callable[[int | None], None]
    autocast: Callable[[], AbstractContextManager[None]]
    share: Callable[[torch.Tensor], torch.Tensor]
    scale: Callable[[torch.Tensor], torch.Tensor]


class Strategy(Protocol):
    """The functions of a strategy's module."""

    def deal(self, tokens: Sequence[int], replicas: int) -> list[list[int | None]]:
        """Which micro-batches each copy of the model computes, by number, given the tokens of each.

        None: a micro-batch that only keeps the rank in step with the others and counts for nothing.
        """
        ...

    def hold(self, unit: Unit, named: Named, world: World, layout: Layout) -> Held:
        """Put the model where it trains. `named` are the trained parameters, whole; every rank has the same ones."""
        ...

    def inside(self, held: Held, function: Callable[[], T]) -> T:
        """Call a function that uses the model's weights; every rank calls the same one at the same time."""
        ...

    def gradients(self, held: Held, work: Work) -> dict[int, torch.Tensor]:
        """Add the gradients of this rank's part of the work; `share` of each micro-batch whose loss it has seen."""
        ...

    def losses(self, held: Held, work: Work) -> dict[int, torch.Tensor]:
        """The same without gradients."""
        ...

    def reduce(self, held: Held) -> None:
        """Make the gradients of `held.named` those of the global batch. A rank without micro-batches calls it too."""
        ...

    def norm(self, held: Held) -> torch.Tensor:
        """The norm of the whole gradient: a scalar, the same on every rank."""
        ...

    def gather(self, held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of parameter `name`, or of a tensor of the same shape (a moment), on the CPU of every rank that has
        a piece of it, or of the main process alone.
        """
        ...

    def scatter(self, held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's piece of what `gather` gave."""
        ...

    def model_state(self, held: Held) -> dict[str, torch.Tensor]:
        """On the main process every weight and buffer of the model, whole, by name; what was in pieces on the CPU."""
        ...
