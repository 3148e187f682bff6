"""Where a run stands, gathered from its events: what the live view and the plain lines both show."""

from __future__ import annotations

from collections import deque

from kitaeru.events import Devices, Evaluated, Event, RunFinished, RunStarted, Step
from kitaeru.report.curve import smooth

_REMEMBERED = 2000


class Progress:
    """The latest of everything. Feed it every event."""

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.step: Step | None = None
        self.evaluated: Evaluated | None = None
        self.best: Evaluated | None = None
        self.finished: RunFinished | None = None
        self.peak_bytes = 0
        self.devices: dict[str, Devices] = {}
        self.losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._first: Step | None = None

    def see(self, event: Event) -> None:
        """Take `event` in."""
        match event:
            case RunStarted():
                self.started, self.step, self.finished, self._first = event, None, None, None
            case Step():
                self.step, self._first = event, self._first or event
                self.losses.append(event.loss)
                self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
            case Evaluated():
                self.evaluated = event
                if self.best is None or event.loss < self.best.loss:
                    self.best = event
            case Devices():
                self.devices[event.host] = event
            case RunFinished():
                self.finished = event

    @property
    def mfu(self) -> float | None:
        """Of the last step; None where the devices' peak is not known."""
        if self.step is None or self.started is None or not self.started.mfu_of_rate:
            return None
        return self.step.tokens_per_second * self.started.mfu_of_rate

    @property
    def done(self) -> int:
        """Steps done, those before a resume included."""
        if self.step:
            return self.step.step
        return self.started.resumed_step if self.started else 0

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.started.max_steps if self.started else 0

    @property
    def smoothed_loss(self) -> float | None:
        """The loss without its noise."""
        return smooth(list(self.losses)[-200:])[-1] if self.losses else None

    def seconds_left(self, now: float) -> float | None:
        """Time to the last step at the pace since the first one, validation and saving included; None before it."""
        if self.step is None or self._first is None:
            return None
        steps = self.step.step - self._first.step
        pace = (self.step.time - self._first.time) / steps if steps else self.step.seconds
        return max(0.0, pace * (self.total - self.step.step) - max(0.0, now - self.step.time))
