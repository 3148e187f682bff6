"""What looks on while a run goes on: devices are read in another thread, and alarms come from what is seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kitaeru.engine.alarms import Alarms
from kitaeru.engine.build import Trainee
from kitaeru.engine.loop import Loop
from kitaeru.events import Devices, Event, Listener, Reading
from kitaeru.machine.sampler import Sampler, this_host
from kitaeru.plan.types import Plan


def observed(main: bool) -> Callable[[Listener], Listener]:
    """A way to emit that one thread takes at a time; on the main process, alarms follow the events they come from."""
    turn = threading.RLock()

    def around(emit: Listener) -> Listener:
        def say(event: Event) -> None:
            with turn:
                emit(event)

        alarms = Alarms(say) if main else None

        def emit_and_judge(event: Event) -> None:
            with turn:
                emit(event)
                if alarms is not None:
                    alarms(event)

        return emit_and_judge

    return around


@contextmanager
def looking(trainee: Trainee, loop: Loop) -> Iterator[None]:
    """While the run goes on, the first process of each host looks at its devices."""
    if trainee.world.local_rank > 0:
        yield
        return
    host, count = this_host(), trainee.plan.layout.devices
    used = range(min(count, torch.cuda.device_count())) if trainee.device.type == "cuda" else range(0)

    def tell(readings: tuple[Reading, ...]) -> None:
        trainee.emit(Devices(step=loop.progress.step, host=host, readings=readings))

    sampler = Sampler(tell, trainee.plan.recipe.track.device_seconds, used)
    try:
        yield
    finally:
        sampler.close()


def mfu_of_rate(plan: Plan) -> float:
    """What a rate in tokens/s is to be multiplied with to give the MFU, as the planner counts FLOP and peaks."""
    speed = plan.chosen.speed
    return speed.mfu / speed.tokens_per_second if speed is not None and speed.tokens_per_second else 0.0
