"""What the ranks of a pipeline send each other: hidden states forward, gradients backward, straight from rank to rank.

Each direction has a channel of its own, on which messages come in the order they were sent, and receives are posted
before they are needed: no order of sends and receives can then wait for itself, and copies run beside the computation.
NCCL carries GPU memory directly; gloo carries it through the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kitaeru.parallel.world import World
from kitaeru.plan.pipeline import Pass

# Receives are posted so many passes ahead.
AHEAD = 1
_TOGETHER = 9  # tag of what all ranks do at the same time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Line:
    """The ranks of one pipeline, in the order of its first stages, and this one's place among them."""

    ranks: tuple[int, ...]
    place: int
    stages: int
    group: Any = None

    def rank_of(self, stage: int) -> int:
        """The rank that has a stage."""
        return self.ranks[stage % len(self.ranks)]


def channels(ranks: Sequence[int]) -> dict[tuple[str, bool], Any]:
    """A process group for each direction: forward and backward, to a neighbour and round the end of the line. All
    processes of the run make those of all lines. Gloo needs none: it tells messages apart by their tags.
    """
    if "nccl" not in str(dist.get_backend_config()):
        return {}
    return {(kind, round_): dist.new_group(list(ranks)) for kind in "FB" for round_ in (False, True)}


class Wire:
    """Carries what the passes of a rank take and give; `under_way` messages at most wait for their receiver."""

    def __init__(self, world: World, line: Line, groups: dict[tuple[str, bool], Any], device: torch.device) -> None:
        self._world, self._line, self._groups, self._device = world, line, groups, device
        self._staged = device.type == "cuda" and "nccl" not in str(dist.get_backend_config())
        self.under_way = 0
        self.width, self.dtype = 0, torch.float32
        self._passes: Sequence[Pass] = ()
        self._tokens: Callable[[int], int] = int
        self._posted = 0
        self._arriving: dict[Pass, tuple[torch.Tensor, Any]] = {}
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def begin(self, passes: Sequence[Pass], tokens: Callable[[int], int]) -> None:
        """These passes follow."""
        self._passes, self._tokens, self._posted = passes, tokens, 0

    def take(self, at: int) -> torch.Tensor | None:
        """What pass number `at` needs of another rank, on this rank's device."""
        while self._posted < min(len(self._passes), at + 1 + AHEAD):
            self._post(self._passes[self._posted])
            self._posted += 1
        found = self._arriving.pop(self._passes[at], None)
        if found is None:
            return None
        buffer, work = found
        self._world.pulse.waiting()
        work.wait()
        return buffer.to(self._device)

    def give(self, now: Pass, tensor: torch.Tensor) -> None:
        """Send the result of a pass to the rank that goes on with it."""
        other = now.stage + 1 if now.kind == "F" else now.stage - 1
        tensor = tensor.contiguous()
        if self._staged:
            tensor = tensor.cpu()
        group, tag = self._channel(now.kind, now.stage, other)
        self._sent.append((dist.isend(_bits(tensor), self._line.rank_of(other), group=group, tag=tag), tensor))
        while len(self._sent) > self.under_way:  # the schedule says that it has long arrived
            self._sent.popleft()[0].wait()

    def end(self) -> None:
        """Wait for what is still on its way."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _post(self, now: Pass) -> None:
        other = now.stage - 1 if now.kind == "F" else now.stage + 1
        if not 0 <= other < self._line.stages:
            return
        place = "cpu" if self._staged else self._device
        buffer = torch.empty(1, self._tokens(now.micro_batch), self.width, dtype=self.dtype, device=place)
        group, tag = self._channel(now.kind, other, now.stage)
        work = dist.irecv(_bits(buffer), self._line.rank_of(other), group=group, tag=tag)
        self._arriving[now] = (buffer, work)

    def _channel(self, kind: str, source: int, target: int) -> tuple[Any, int]:
        key = (kind, max(source, target) % len(self._line.ranks) == 0)
        return self._groups.get(key), 1 + 2 * (kind == "B") + key[1]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; on the CPU as bytes, since gloo does not carry every dtype."""
    return tensor if tensor.is_cuda else tensor.view(-1).view(torch.uint8)


class Together:
    """How the ranks of a pipeline call the model together, one after the other: for probes, answers and checks.

    All of it goes through the CPU: it is little, and seldom. `wire` learns how wide hidden states are, and their dtype.
    """

    def __init__(self, line: Line, wire: Wire) -> None:
        self._line, self._wire = line, wire

    def take(self, stage: int, like: torch.Tensor) -> torch.Tensor:
        """Hidden states from the stage before, of the shape of `like`."""
        source = self._line.rank_of(stage - 1)
        code = torch.empty(1, dtype=torch.int64)
        dist.recv(code, source, tag=_TOGETHER)
        hidden = torch.empty(like.shape, dtype=_DTYPES[int(code)])
        dist.recv(_bits(hidden), source, tag=_TOGETHER)
        self._learn(hidden)
        return hidden.to(like.device)

    def give(self, stage: int, hidden: torch.Tensor) -> None:
        """Hidden states to the next stage."""
        target = self._line.rank_of(stage + 1)
        self._learn(hidden)
        dist.send(torch.tensor([_DTYPES.index(hidden.dtype)]), target, tag=_TOGETHER)
        dist.send(_bits(hidden.detach().contiguous().cpu()), target, tag=_TOGETHER)

    def logits(self, own: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """The last stage's logits, on every rank."""
        source = self._line.rank_of(self._line.stages - 1)
        head = torch.zeros(4, dtype=torch.int64)
        if own is not None:
            head = torch.tensor([_DTYPES.index(own.dtype), *own.shape])
        dist.broadcast(head, source, group=self._line.group)
        found = torch.empty(head[1:].tolist(), dtype=_DTYPES[int(head[0])])
        if own is not None:
            found.copy_(own)
        dist.broadcast(_bits(found), source, group=self._line.group)
        return found.to(device) if own is None else own

    def _learn(self, hidden: torch.Tensor) -> None:
        self._wire.width, self._wire.dtype = hidden.shape[-1], hidden.dtype
