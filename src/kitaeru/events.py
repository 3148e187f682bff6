"""What happens during a run, as plain data: one JSON object a line in `events.jsonl`.

The engine emits events; listeners (live view, trackers, the report) see them and cannot steer. Times are seconds since
the epoch, sizes are bytes, lengths are tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """The base of all events; `kind` names the class in JSON."""

    kind: ClassVar[str]
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """One line of `events.jsonl`; a number that is not finite is written as null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return json.dumps({"kind": self.kind, **values}, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training is about to begin (or to go on, when `resumed_step` > 0: step events after it are void).

    A rate in tokens/s times `mfu_of_rate` is the share of the devices' peak spent on arithmetic that training cannot do
    without (MFU); 0 where the peak is not known.
    """

    kind: ClassVar[str] = "run_started"
    run: str
    model: str
    method: str
    strategy: str
    device: str
    max_steps: int
    resumed_step: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    trainable_parameters: int = 0
    total_parameters: int = 0
    mfu_of_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DataReady(Event):
    """What was read: examples, tokens, share of tokens that are trained, and what was left out and why.

    `kinds` says, for each source as the recipe names it, what form its rows were found to have.
    """

    kind: ClassVar[str] = "data_ready"
    split: str
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    characters: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    length_histogram: dict[str, int] = field(default_factory=dict)
    cached: bool = False
    kinds: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimizer step. `loss` is the mean over the trained tokens of the whole global batch, in nats.

    `device_peaks` are the peaks of each of several devices. Of `seconds` the main process spent `data_seconds` on
    putting micro-batches together and `wait_seconds` on gradients after its own work was done; `rank_seconds` is each
    rank's own work, its forward and backward passes.
    """

    kind: ClassVar[str] = "step"
    step: int
    loss: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    learning_rate: float
    grad_norm: float
    peak_bytes: int
    epoch: float
    seconds: float
    skipped: bool = False
    device_peaks: tuple[int, ...] = ()
    data_seconds: float = 0.0
    wait_seconds: float = 0.0
    rank_seconds: tuple[float, ...] = ()

    @property
    def idle_share(self) -> float | None:
        """The share of the step in which a rank, on average, computed no pass; None where it was not measured."""
        if not self.rank_seconds or not self.seconds > 0:
            return None
        return max(0.0, 1 - sum(self.rank_seconds) / len(self.rank_seconds) / self.seconds)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A device at one moment: a GPU by its number in CUDA's order, or "host" (all its cores, its RAM).

    None is "not known". `utilisation` is a share of the time, `clock_share` of the highest clock. `used`: this run
    computes on it. `throttles` says what holds its clock down.
    """

    device: str
    name: str
    used: bool = True
    utilisation: float | None = None
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    watts: float | None = None
    celsius: float | None = None
    clock_mhz: float | None = None
    clock_share: float | None = None
    pcie_to_bytes_s: float | None = None
    pcie_from_bytes_s: float | None = None
    throttles: tuple[str, ...] = ()

    @property
    def memory_share(self) -> float | None:
        """How full its memory is."""
        if self.memory_bytes is None or not self.memory_total_bytes:
            return None
        return self.memory_bytes / self.memory_total_bytes


@dataclass(frozen=True, kw_only=True)
class Devices(Event):
    """The devices of one host at one moment. `step` is the last finished step."""

    kind: ClassVar[str] = "devices"
    step: int
    host: str
    readings: tuple[Reading, ...]

    def __post_init__(self) -> None:
        plain = tuple(r if isinstance(r, Reading) else _reading(r) for r in self.readings)
        object.__setattr__(self, "readings", plain)

    @property
    def watts(self) -> float | None:
        """Power of all devices that were asked; None when none could tell."""
        told = [reading.watts for reading in self.readings if reading.watts is not None]
        return sum(told) if told else None


def _reading(value: dict[str, Any]) -> Reading:
    known = {f.name for f in fields(Reading)}
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in known}
    return Reading(**arguments)


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The validation loss after `step` steps (0 = before training)."""

    kind: ClassVar[str] = "evaluated"
    step: int
    loss: float
    tokens: int
    seconds: float
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """A checkpoint was written and verified."""

    kind: ClassVar[str] = "saved"
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sample(Event):
    """The model's answer to a fixed question after `step` steps (0 = before training)."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something a person should know: `level` is "info", "warning" or "error"; `text` is already translated."""

    kind: ClassVar[str] = "notice"
    level: str
    text: str
    step: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preflight(Event):
    """Before training, the largest micro-batch and an optimizer step were run once, and nothing changed by it.

    `peak_bytes` is what the fullest device took (on a CPU the process), `planned_bytes` what the plan says of it.
    """

    kind: ClassVar[str] = "preflight"
    tokens: int
    peak_bytes: int
    planned_bytes: int
    seconds: float
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class SteppedDown(Event):
    """Memory ran out after `step` finished steps, and the run goes on with less of it at a time: what it computes is
    the same. Told again when a run is started on a rung below its plan.
    """

    kind: ClassVar[str] = "stepped_down"
    step: int
    micro_batch_tokens: int
    activations: str
    planned_micro_batch_tokens: int
    planned_activations: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run ended: `outcome` is "finished", "interrupted", "stopped_early" or "failed"."""

    kind: ClassVar[str] = "run_finished"
    outcome: str
    step: int
    seconds: float
    reason: str = ""
    best_step: int = 0
    result: str = ""


Listener = Callable[[Event], None]
KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        RunStarted,
        DataReady,
        Step,
        Devices,
        Evaluated,
        Saved,
        Sample,
        Notice,
        Preflight,
        SteppedDown,
        RunFinished,
    )
}


def parse(line: str) -> Event | None:
    """The event in one line of `events.jsonl`; None for a kind or a field set this version does not know.

    Raises:
        ValueError: the line is not a JSON object (a line cut short by a kill).
    """
    value: Any = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    cls = KINDS.get(value.pop("kind", ""))
    if cls is None:
        return None
    known = {f.name for f in fields(cls)}
    arguments: dict[str, Any] = {k: _revive(v) for k, v in value.items() if k in known}
    try:
        return cls(**arguments)
    except TypeError:
        return None


def _revive(value: Any) -> Any:
    return math.nan if value is None else tuple(value) if isinstance(value, list) else value


def read(path: Path) -> Iterator[Event]:
    """All events of a run in order, void ones left out: those past the step from which a later start resumed.

    A last line cut short by a kill is skipped.
    """
    kept: list[Event] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = parse(line)
        except ValueError:
            continue
        if event is None:
            continue
        if isinstance(event, RunStarted):
            at = event.resumed_step  # at 0 everything is done anew, what was said of step 0 included
            kept = [e for e in kept if at and getattr(e, "step", 0) <= at and not isinstance(e, RunFinished)]
        kept.append(event)
    yield from kept


class EventLog:
    """A listener that appends each event to `events.jsonl`, one flushed line at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        end = self._file.seek(0, 2)
        if end:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def __call__(self, event: Event) -> None:
        """Append `event`."""
        self._file.write(event.to_json().encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; further events raise ValueError."""
        self._file.close()
