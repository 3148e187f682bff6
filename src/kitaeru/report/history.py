"""A run as its events tell it, sorted for people who look back: what the page and the closing summary are made from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from kitaeru.errors import UsageError
from kitaeru.events import (
    DataReady,
    Evaluated,
    Event,
    Notice,
    Preflight,
    RunFinished,
    RunStarted,
    Sample,
    Saved,
    Step,
    SteppedDown,
    read,
)
from kitaeru.i18n import tr
from kitaeru.report.wording import stepped_text

_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True)
class Answers:
    """One question, and what the model said to it before and after training; None where it was not asked."""

    prompt: str
    before: str | None
    after: str | None
    after_step: int


@dataclass(frozen=True)
class History:
    """The events of one run. Works for a run that is still going, was killed, or was resumed several times."""

    events: tuple[Event, ...]

    @classmethod
    def load(cls, run_dir: Path) -> History:
        """Read `run_dir/events.jsonl`, steps that a later start made void left out.

        Raises:
            UsageError: there is no such run folder.
        """
        path = run_dir / "events.jsonl"
        if not path.is_file():
            raise UsageError(
                tr("{path} is not the folder of a run: it has no events.jsonl.", path=run_dir),
                remedy=tr("Give the folder that training named, for example `kitaeru report runs/NAME`."),
            )
        return cls(tuple(read(path)))

    def of(self, kind: type[_E]) -> list[_E]:
        """All events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def started(self) -> RunStarted | None:
        """The last start."""
        return next(reversed(self.of(RunStarted)), None)

    @property
    def finished(self) -> RunFinished | None:
        """How it ended; None when it is still going or was killed."""
        return next(reversed(self.of(RunFinished)), None)

    @property
    def steps(self) -> list[Step]:
        """Each step once, in order."""
        return sorted({event.step: event for event in self.of(Step)}.values(), key=lambda event: event.step)

    @property
    def evaluations(self) -> list[Evaluated]:
        """Each validation once, in order."""
        return sorted({event.step: event for event in self.of(Evaluated)}.values(), key=lambda event: event.step)

    @property
    def checkpoints(self) -> list[Saved]:
        """Each checkpoint once, in order."""
        return sorted({event.step: event for event in self.of(Saved)}.values(), key=lambda event: event.step)

    @property
    def data(self) -> dict[str, DataReady]:
        """What was read, by split; the last start's word counts."""
        return {event.split: event for event in self.of(DataReady)}

    @property
    def notices(self) -> list[Notice]:
        """All notices, and where memory ran out; one that every start repeats is kept once."""
        found = [
            Notice(time=event.time, level="warning", text=stepped_text(event), step=event.step)
            if isinstance(event, SteppedDown)
            else event
            for event in self.events
            if isinstance(event, Notice | SteppedDown)
        ]
        return list({(event.level, event.text, event.step): event for event in found}.values())

    @property
    def preflight(self) -> Preflight | None:
        """What the largest micro-batch took before the last start."""
        return next(reversed(self.of(Preflight)), None)

    @property
    def before(self) -> Evaluated | None:
        """The validation before the first step."""
        return next((event for event in self.evaluations if event.step == 0), None)

    @property
    def after(self) -> Evaluated | None:
        """The validation of the result: of the best step when the run says which it is, else the last one."""
        trained = [event for event in self.evaluations if event.step > 0]
        if self.finished and self.finished.best_step:
            chosen = [event for event in trained if event.step == self.finished.best_step]
            return chosen[0] if chosen else next(reversed(trained), None)
        return next(reversed(trained), None)

    @property
    def best(self) -> Evaluated | None:
        """The lowest validation loss."""
        finite = [event for event in self.evaluations if math.isfinite(event.loss)]
        return min(finite, key=lambda event: event.loss, default=None)

    @property
    def answers(self) -> list[Answers]:
        """The questions that were asked, in order, each with the first and the last answer."""
        samples = self.of(Sample)
        before = {event.prompt: event for event in samples if event.step == 0}
        after = {event.prompt: event for event in samples if event.step > 0}
        answers = []
        for prompt in dict.fromkeys(event.prompt for event in samples):
            first, last = before.get(prompt), after.get(prompt)
            answers.append(
                Answers(
                    prompt, first.answer if first else None, last.answer if last else None, last.step if last else 0
                )
            )
        return answers

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return sum(event.tokens for event in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps: the first step's warm-up and a moment's hiccup do not move it. 0 without steps."""
        return median([event.tokens_per_second for event in self.steps] or [0.0])

    @property
    def peak_bytes(self) -> int:
        """The measured peak."""
        return max((event.peak_bytes for event in self.steps), default=0)

    @property
    def seconds(self) -> float:
        """Time at work, over all starts: from each start to the last event that counts before the next one."""
        total, start, last = 0.0, 0.0, 0.0
        for event in self.events:
            if isinstance(event, RunStarted):
                total, start = total + max(0.0, last - start), event.time
            last = event.time
            start = start or last
        return total + max(0.0, last - start)


def history(source: Path | Iterable[Event] | History) -> History:
    """A History from a run folder, from events, or from itself."""
    if isinstance(source, History):
        return source
    return History.load(source) if isinstance(source, Path) else History(tuple(source))
