"""The two passes of a micro-batch as one CUDA graph: the host launches it as a whole, instead of each of its kernels.

A graph is made of what one Python pass launches, with the addresses it used. So everything that a pass reads lies in
places that stay: the micro-batch, the factor of its loss, the weights, and the gradients, to which it adds. What it
needs in between comes from a pool of memory that all graphs share, since they run one after another, and that nobody
else has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kitaeru.data.types import MicroBatch
from kitaeru.model.site import refresh
from kitaeru.parallel.types import Named, Unit, Work

# Graphs at a time, the last used ones: each takes some MB of the device's memory beside the pool.
MOST = 16

Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    batch: MicroBatch
    factor: Tensor
    loss: Tensor


class Replays:
    """Graphs of micro-batches by their shapes. A shape that comes for the first time is not captured: it may not come
    again, and what compiles or chooses among kernels at first must have done so. Such a pass takes memory beside the
    pool: where that may be too little, all graphs are given up for it.
    """

    def __init__(self, named: Named) -> None:
        self._parameters = [parameter for _, parameter in named]
        self._gradients: list[Tensor] = []
        self._flat: Tensor | None = None
        self._seen: set[Key] = set()
        self._captured: dict[Key, _Captured] = {}
        self._pool: Any = None
        self._pool_bytes = 0
        self._largest = 0  # tokens of a captured micro-batch
        self._why_off: str | None = None
        self._told = False

    def begin(self) -> None:
        """Before a step's first micro-batch: its gradients are 0, in the places that the graphs add to."""
        if self._flat is not None:
            self._flat.zero_()
            self._take()

    def passes(self, unit: Unit, batch: MicroBatch, work: Work) -> Tensor | None:
        """Both passes of a micro-batch: its share of the loss. None, and nothing is done, if it is to be computed the
        other way.
        """
        key = (batch.longest, *(tensor.shape for tensor in batch.tensors.values()))
        found = self._captured.pop(key, None)
        if found is None:
            if self._why_off is not None or key not in self._seen:
                self._seen.add(key)
                self._make_room(batch.tokens)
                return None
            found = self._capture(unit, batch, work)
            if found is None:
                return None
        self._captured[key] = found  # the last used one is the last
        for name, tensor in found.batch.tensors.items():
            tensor.copy_(getattr(batch, name))
        found.factor.copy_(work.share(torch.ones_like(found.factor)))
        found.graph.replay()
        return work.share(found.loss.clone())

    def drop(self) -> bool:
        """Give all memory of the graphs back, and begin anew; whether there were any."""
        there = bool(self._captured)
        self._captured.clear()
        self._seen.clear()
        self._pool, self._pool_bytes, self._largest = None, 0, 0
        if there:
            torch.cuda.empty_cache()
        return there

    def excuse(self) -> str | None:
        """Why there are no graphs any more, in torch's words; once."""
        told, self._told = self._told, self._why_off is not None
        return None if told else self._why_off

    def _capture(self, unit: Unit, batch: MicroBatch, work: Work) -> _Captured | None:
        while len(self._captured) >= MOST:
            del self._captured[next(iter(self._captured))]
        if self._flat is None:
            self._hold()
        own = batch.each(torch.clone)
        factor = torch.ones((), device=batch.input_ids.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        refresh()  # within the graph, of adapters as they will be
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # goes back to it even if the capture fails
                torch.autograd.set_multithreading_enabled(False),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                with work.autocast():
                    loss = unit(own)
                loss.backward(factor)
                loss = loss.detach()
        except RuntimeError as error:  # what torch raises where memory runs out is one too
            self._why_off = str(error.__context__ or error).partition("\n")[0]
            del graph
            self.drop()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # tells the random numbers that no capture is under way
                factor.add_(1)
            return None
        finally:
            refresh()  # nothing has been computed yet
        self._pool = graph.pool()
        self._pool_bytes += torch.cuda.memory_reserved() - before
        self._largest = max(self._largest, batch.tokens)
        return _Captured(graph, own, factor, loss)

    def _make_room(self, tokens: int) -> None:
        """Before a pass beside the pool, which takes about as much as the pool's of as many tokens."""
        if not self._captured:
            return
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        free = min(free, int(torch.cuda.get_per_process_memory_fraction() * total) - reserved)
        free += reserved - torch.cuda.memory_allocated() - self._pool_bytes
        if free < self._pool_bytes * tokens / self._largest:
            seen = set(self._seen)
            self.drop()
            self._seen = seen  # they have run before, and may be captured as soon as they come

    def _hold(self) -> None:
        """Give every gradient a place that stays; what is there of this step stays too."""
        there = [parameter.grad for parameter in self._parameters]
        first = self._parameters[0]
        sizes = [parameter.numel() for parameter in self._parameters]
        self._flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        parts = self._flat.split(sizes)
        self._gradients = [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]
        for gradient, old in zip(self._gradients, there, strict=True):
            if old is not None:
                gradient.copy_(old)
        self._take()

    def _take(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
