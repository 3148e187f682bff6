"""Plain lines: for logs, pipes and terminals that cannot redraw. No control characters, nothing is written twice."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console

from kitaeru.events import Devices, Event, RunStarted, Step
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan
from kitaeru.report.lines import event_line, plan_lines
from kitaeru.report.progress import Progress
from kitaeru.report.usage import device_text, reading_text
from kitaeru.report.wording import (
    bytes_text,
    clean,
    clock_text,
    count_text,
    loss_text,
    number_text,
    rate_text,
    run_name,
)

_STEP_SECONDS = 2.0
_PHASE_SECONDS = 5.0
_LOOK_SECONDS = 30.0


class PlainView:
    """Writes a line for every notice, validation and save; for a step at most every two seconds, or every so many."""

    def __init__(self, console: Console, every: int | None = None) -> None:
        self._console = console
        self._every = every
        self._progress = Progress()
        self._last_step_time = self._last_look_time = float("-inf")
        self._phase: tuple[str, float] = ("", float("-inf"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __call__(self, event: Event) -> None:
        """Write what `event` is worth."""
        self._progress.see(event)
        if isinstance(event, RunStarted):
            parts = (run_name(event), event.model, event.method, event.strategy, event.device)
            self._write(" · ".join(("kitaeru", *parts)))
        if isinstance(event, Step):
            self._step(event)
            return
        if isinstance(event, Devices):
            self._devices(event)
            return
        line = event_line(event)
        if line is not None:
            self._write(line.plain)

    def phase(self, name: str, done: int, total: int) -> None:
        """A line when a phase begins, every five seconds, and when it ends."""
        last_name, last_time = self._phase
        now = time.monotonic()
        ended = bool(total) and done >= total
        if name == last_name and not ended and now - last_time < _PHASE_SECONDS:
            return
        # An ended phase is forgotten, so that one of the same name starts with a line again.
        self._phase = ("", now) if ended else (name, now)
        counted = f"{count_text(done)}/{count_text(total)}" if total else count_text(done)
        self._write(f"{name}: {counted}" if done or total else f"{name} …")

    def show_plan(self, plan: Plan) -> None:
        """Write the plan."""
        first, *rest = plan_lines(plan)
        self._write(first.plain)
        for line in rest:
            self._write("  " + line.plain)

    def _step(self, step: Step) -> None:
        now = time.monotonic()
        due = step.step % self._every == 0 if self._every else now - self._last_step_time >= _STEP_SECONDS
        if step.step != self._progress.total and not due:
            return
        self._last_step_time = now
        left = self._progress.seconds_left(time.time())
        line = tr(
            "step {step}/{total}  loss {loss}  lr {rate}  grad {norm}  {speed} tokens/s  {memory}  {time} left",
            step=step.step,
            total=self._progress.total,
            loss=loss_text(step.loss),
            rate=rate_text(step.learning_rate),
            norm=number_text(step.grad_norm),
            speed=count_text(step.tokens_per_second),
            memory=bytes_text(step.peak_bytes),
            time=clock_text(left if left is not None else float("nan")),
        )
        self._write(line)

    def _devices(self, look: Devices) -> None:
        now = time.monotonic()
        if now - self._last_look_time >= _LOOK_SECONDS:
            self._last_look_time = now
            told = (f"{device_text(reading.device)} {reading_text(reading)}" for reading in look.readings)
            self._write("  ".join((f"[{look.host}]", *told)))

    def _write(self, line: str) -> None:
        self._console.print(clean(line), markup=False, highlight=False, emoji=False, soft_wrap=True, style="none")
