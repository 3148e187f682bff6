"""How long the parts of a step take, without slowing it down: the clock on a CPU, events in the stream on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Marks moments of a step on a device; `between` may be asked once the device has come past both marks."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: dict[str, torch.cuda.Event | float] = {}
        self.data_seconds = 0.0
        self._data_before = 0.0

    def begin(self) -> None:
        """A new step."""
        self._marks.clear()
        self.data_seconds = 0.0

    def mark(self, name: str) -> None:
        """This moment: on a GPU, when it has done all that it was given so far."""
        if name == "begin":
            self._data_before = self.data_seconds
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def own_seconds(self) -> float:
        """From the mark "begin" to the mark "own", without the data made in between."""
        seconds = self.between("begin", "own")
        # A GPU goes on while the host makes the next micro-batch.
        return seconds if self._on_gpu else max(0.0, seconds - (self.data_seconds - self._data_before))

    def between(self, first: str, second: str) -> float:
        """Seconds from one mark to the other; 0 when one was not made."""
        a, b = self._marks.get(first), self._marks.get(second)
        if a is None or b is None:
            return 0.0
        if isinstance(a, float) and isinstance(b, float):
            return b - a
        assert isinstance(a, torch.cuda.Event)
        assert isinstance(b, torch.cuda.Event)
        b.synchronize()
        return float(a.elapsed_time(b)) / 1000

    @contextmanager
    def data(self) -> Iterator[None]:
        """Time of the host that goes into data."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.data_seconds += time.perf_counter() - started
