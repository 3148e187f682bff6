"""The processes that train together: who this one is, and the few things they tell each other besides gradients."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kitaeru.parallel.pulse import OVER, Lost, NoPulse, Pulse

# Waiting longer than this in a collective is an error whatever the reason; `pulse` finds dead ranks much sooner.
TIMEOUT = timedelta(hours=1)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that train together. Alone, all that it says comes straight back.

    What is told here is small and lies on the CPU (gloo), whatever carries the gradients.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = field(default_factory=socket.gethostname)
    pulse: Pulse | NoPulse = field(default_factory=NoPulse)

    @property
    def main(self) -> bool:
        """Whether this process writes files, emits events and shows the view."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each; any CPU tensor of the same shape everywhere."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor([int(value)])).item()) if self.size > 1 else value

    def numbers(self, values: Sequence[int]) -> list[int]:
        """All numbers of all ranks, in the order of the ranks; each gives as many."""
        slots = torch.zeros(self.size, len(values), dtype=torch.int64)
        slots[self.rank] = torch.tensor(values)
        return [int(value) for value in self.sum(slots).flatten()]

    def each_of(self, value: T) -> list[T]:
        """What each rank gave; small, since it is pickled."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def united(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the main process its own CPU tensors and those that only others have; on the others their own."""
        outlines = self.each_of({name: (t.shape, t.dtype) for name, t in tensors.items()})
        seen, whole = set(outlines[0]), dict(tensors)
        for rank, outline in enumerate(outlines):
            for name in sorted(outline.keys() - seen):
                seen.add(name)
                if self.rank == rank and tensors[name].numel():
                    dist.send(_raw(tensors[name]), 0)
                elif self.main:
                    shape, dtype = outline[name]
                    whole[name] = torch.empty(shape, dtype=dtype)
                    if whole[name].numel():
                        dist.recv(_raw(whole[name]), rank)
        return whole

    def said(self, value: T) -> T:
        """What the main process gave; the others give anything."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def each(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The main process's CPU tensors one after another, so that no other holds them all; all ranks go through."""
        for name in self.said(list(tensors)):
            tensor = tensors[name] if self.main else torch.empty(0)
            shape, dtype = self.said((tensor.shape, tensor.dtype))
            tensor = tensor if self.main else torch.empty(shape, dtype=dtype)
            if self.size > 1 and tensor.numel():
                dist.broadcast(_raw(tensor), src=0)
            yield name, tensor

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            self.sum(torch.zeros(1))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: gloo does not carry every dtype, and carries these unchanged."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def join(
    store: Any,
    *,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    device: str,
    on_loss: Callable[[Lost], None] | None = None,
) -> World:
    """Make this process one of `size` that train together; all must call it. `device` is "cpu" or "cuda".

    `store` is torch's, common to all. With `on_loss` the ranks watch each other, and it is told of one that is lost.

    NCCL carries what lies on GPUs; gloo what lies on the CPU, and everything where processes share a GPU, which NCCL
    refuses. `local_rank` of `local_size` counts the processes of this host.
    """
    backend = "gloo"
    if device == "cuda":
        count = torch.cuda.device_count()
        torch.cuda.set_device(local_rank % count)
        if local_size <= count:
            backend = "cpu:gloo,cuda:nccl"
    world = World(rank, size, local_rank)
    if on_loss is not None and size > 1:  # before the first collective, which may already wait for a dead rank
        store.set(f"process/{rank}", f"{world.host} {os.getpid()}")
        end = time.monotonic() + store.timeout.total_seconds()
        while not store.check([f"process/{other}" for other in range(size)]):
            if store.check([OVER]) or time.monotonic() > end:
                raise RuntimeError("connection refused: not all ranks have come")
            time.sleep(0.1)
        processes = [store.get(f"process/{other}").decode().split() for other in range(size)]
        peers = [(host, int(number)) for host, number in processes]
        world = replace(world, pulse=Pulse(store.clone(), rank, peers, on_loss))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return world


_CONNECTION = re.compile(r"gloo|NCCL|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


def lost_contact(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone."""
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None


def leave(world: World) -> None:
    """Let go of the others."""
    if isinstance(world.pulse, Pulse):
        world.pulse.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
