"""What a run should be told while there is time to do something: rules over the last steps and readings.

Each rule is a pure function from what was seen lately to a sentence with advice, or None. `Alarms` feeds them, and says
each thing once until it has been over for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from kitaeru.events import Devices, Event, Notice, Reading, Step
from kitaeru.i18n import tr

_STEPS, _READINGS = 60, 12
# The first steps compile, allocate and warm up.
_WARM_UP = 3
_WORTH_SECONDS = 0.2


@dataclass(frozen=True)
class Seen:
    """The last steps (oldest first, warm-up left out) and the last looks at the devices of this host."""

    steps: Sequence[Step] = ()
    looks: Sequence[Devices] = ()

    def of(self, device: str) -> list[Reading]:
        """The readings of one device, oldest first."""
        return [reading for look in self.looks for reading in look.readings if reading.device == device]

    @property
    def gpus(self) -> list[str]:
        """The GPUs that were looked at."""
        return [r.device for r in self.looks[-1].readings if r.device != "host"] if self.looks else []


@dataclass(frozen=True)
class Alarm:
    """`cause` tells alarms apart that mean the same device or rank."""

    cause: str
    text: str


Rule = Callable[[Seen], Iterator[Alarm]]


def unused_gpu(seen: Seen) -> Iterator[Alarm]:
    """A visible card that this run does not compute on."""
    if len(seen.looks) < 2 or len(seen.gpus) < 2:
        return
    idle = [r for r in seen.looks[-1].readings if r.device != "host" and not r.used and (r.utilisation or 0) < 0.05]
    if idle:
        names = ", ".join(f"{r.device} ({r.name})" for r in idle)
        yield Alarm(
            "unused",
            tr(
                "This run does not use GPU {names}. With it training could be faster, or the model larger: "
                "see `kitaeru plan`, and `limits.devices` in the recipe.",
                names=names,
            ),
        )


def idle_gpu(seen: Seen) -> Iterator[Alarm]:
    """A card of the run that mostly waits."""
    for device in seen.gpus:
        readings = seen.of(device)
        shares = [r.utilisation for r in readings if r.used and r.utilisation is not None]
        if len(seen.steps) >= 5 and len(shares) >= 6 and mean(shares) < 0.4:
            yield Alarm(
                f"idle {device}",
                tr(
                    "GPU {device} computes only {share:.0%} of the time. Larger micro-batches "
                    "(`limits.micro_batch_tokens`) or fewer, larger steps keep it busy.",
                    device=device,
                    share=mean(shares),
                ),
            )


def throttled(seen: Seen) -> Iterator[Alarm]:
    """A clock held down by heat or by the power supply in half of the looks or more."""
    for device in seen.gpus:
        readings = seen.of(device)[-6:]
        hot = [r for r in readings if "thermal" in r.throttles]
        weak = [r for r in readings if "power brake" in r.throttles]
        if len(readings) >= 4 and 2 * len(hot) >= len(readings):
            yield Alarm(
                f"hot {device}",
                tr(
                    "GPU {device} slows down because of heat ({celsius:.0f} °C, clock at {share:.0%}). More air, or "
                    "a lower power limit: sudo nvidia-smi -i {device} -pl WATTS",
                    device=device,
                    celsius=hot[-1].celsius or 0.0,
                    share=hot[-1].clock_share or 0.0,
                ),
            )
        elif len(readings) >= 4 and 2 * len(weak) >= len(readings):
            yield Alarm(
                f"brake {device}",
                tr(
                    "GPU {device} is slowed down by the power supply. Check its cables, and that the supply is strong "
                    "enough for all cards.",
                    device=device,
                ),
            )


def memory_near_limit(seen: Seen) -> Iterator[Alarm]:
    """Almost no memory left, on a card or in RAM."""
    for reading in seen.looks[-1].readings if seen.looks else ():
        share = reading.memory_share
        if share is None or share < 0.96 or not (reading.used or reading.device == "host"):
            continue
        if reading.device == "host":
            text = tr(
                "{share:.0%} of the RAM is taken. At the end of it the kernel kills the run: end other programs, or "
                "lower `limits.micro_batch_tokens`.",
                share=share,
            )
        else:
            text = tr(
                "The memory of GPU {device} is {share:.0%} full. Others on it may have to go (nvidia-smi), or "
                "`limits.memory_gb` makes the plan leave more room.",
                device=reading.device,
                share=share,
            )
        yield Alarm(f"memory {reading.device}", text)


def data_starvation(seen: Seen) -> Iterator[Alarm]:
    """Steps that wait for their data."""
    steps = seen.steps[-20:]
    if not _worth_it(steps):
        return
    share = sum(s.data_seconds for s in steps) / sum(s.seconds for s in steps)
    busy = [r.utilisation for d in seen.gpus for r in seen.of(d)[-4:] if r.used and r.utilisation is not None]
    if share > 0.25 and (not busy or mean(busy) < 0.8):
        yield Alarm(
            "data",
            tr(
                "{share:.0%} of the time goes into putting data together. Put the data and the token cache on a local "
                "disk, or give the run more cores.",
                share=share,
            ),
        )


def waiting_for_others(seen: Seen) -> Iterator[Alarm]:
    """Steps that wait for gradients of other ranks."""
    steps = [s for s in seen.steps[-20:] if len(s.rank_seconds) > 1]
    if not _worth_it(steps):
        return
    share = sum(s.wait_seconds for s in steps) / sum(s.seconds for s in steps)
    if share > 0.35 and _slowest(steps)[1] <= 1.25:
        yield Alarm(
            "wait",
            tr(
                "{share:.0%} of the time goes into exchanging gradients. `kitaeru doctor` measures the links; a larger "
                "`train.global_batch_tokens` or `method: lora` exchanges less often or less.",
                share=share,
            ),
        )


def slow_rank(seen: Seen) -> Iterator[Alarm]:
    """One rank on whose passes all others wait."""
    steps = [s for s in seen.steps[-20:] if len(s.rank_seconds) > 1]
    if not _worth_it(steps):
        return
    rank, factor = _slowest(steps)
    if factor > 1.25:
        yield Alarm(
            f"slow {rank}",
            tr(
                "Rank {rank} needs {factor:.1f} times as long as the others, and they wait for it. Heat, another "
                "program on its GPU, or a slower card: `kitaeru doctor` looks.",
                rank=rank,
                factor=factor,
            ),
        )


def _worth_it(steps: Sequence[Step]) -> bool:
    """Whether there are enough steps to judge by, and long enough that a person would care."""
    return len(steps) >= 10 and mean(s.seconds for s in steps) >= _WORTH_SECONDS


def _slowest(steps: Sequence[Step]) -> tuple[int, float]:
    """The slowest rank, and how many times the median of the others it needs."""
    ranks = len(steps[-1].rank_seconds)
    own = [median(s.rank_seconds[r] for s in steps if len(s.rank_seconds) == ranks) for r in range(ranks)]
    worst = max(range(ranks), key=own.__getitem__)
    others = median(seconds for r, seconds in enumerate(own) if r != worst)
    return worst, own[worst] / others if others > 0 else 1.0


def unsteady_loss(seen: Seen) -> Iterator[Alarm]:
    """Several losses far above the usual one."""
    losses = [s.loss for s in seen.steps[-50:]]
    if len(losses) < 20:
        return
    usual = median(losses)
    spikes = [s.step for s in seen.steps[-50:] if s.loss > 1.5 * usual and s.loss > usual + 0.3]
    if len(spikes) >= 3:
        yield Alarm(
            "spikes",
            tr(
                "The loss jumped at steps {steps}. A lower `train.learning_rate`, more warm-up or a smaller "
                "`train.max_grad_norm` steadies it; `kitaeru data check` shows odd examples.",
                steps=", ".join(map(str, spikes[-5:])),
            ),
        )


def rising_loss(seen: Seen) -> Iterator[Alarm]:
    """A loss that goes up instead of down."""
    losses = [s.loss for s in seen.steps]
    if len(losses) < 45:
        return
    third = len(losses) // 3
    first, middle, last = median(losses[:third]), median(losses[third : 2 * third]), median(losses[2 * third :])
    if last > 1.1 * middle > 1.1 * 1.05 * first:
        yield Alarm(
            "rising",
            tr(
                "The loss has been rising for {count} steps ({first:.3f} → {last:.3f}). The learning rate is most "
                "likely too high: stop, and go on from the best checkpoint with a lower one.",
                count=len(losses),
                first=first,
                last=last,
            ),
        )


RULES: tuple[Rule, ...] = (
    unused_gpu,
    idle_gpu,
    throttled,
    memory_near_limit,
    data_starvation,
    waiting_for_others,
    slow_rank,
    unsteady_loss,
    rising_loss,
)


@dataclass
class Alarms:
    """A listener that says what the rules find, through `say`: each cause again only after `quiet` steps without it."""

    say: Callable[[Notice], None]
    quiet: int = 200
    _steps: deque[Step] = field(default_factory=lambda: deque(maxlen=_STEPS))
    _looks: deque[Devices] = field(default_factory=lambda: deque(maxlen=_READINGS))
    _count: int = 0
    _last: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Take `event` in, and judge."""
        if isinstance(event, Devices):
            self._looks.append(event)
        elif isinstance(event, Step):
            self._count += 1
            if self._count > _WARM_UP:
                self._steps.append(event)
        else:
            return
        seen = Seen(tuple(self._steps), tuple(self._looks))
        for alarm in (alarm for rule in RULES for alarm in rule(seen)):
            before = self._last.get(alarm.cause)
            self._last[alarm.cause] = self._count
            if before is None or self._count - before > self.quiet:
                self.say(Notice(level="warning", text=alarm.text, step=event.step))
