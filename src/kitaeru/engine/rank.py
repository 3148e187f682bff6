"""The life of one process among several: it meets the others, trains, and leaves a record of how it ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kitaeru import errors
from kitaeru.engine.ladder import RUNG
from kitaeru.engine.place import Place
from kitaeru.engine.run import Phase, Result, Run, train
from kitaeru.errors import Interrupted, KitaeruError, TrainingError
from kitaeru.events import Listener
from kitaeru.files import write_atomic, write_json
from kitaeru.i18n import tr
from kitaeru.parallel.pulse import Lost
from kitaeru.parallel.world import World, join, leave, lost_contact

LOST_EXIT = 75
# One rank's death is an error on all: the first to notice waits, so that the one that died is found first.
VICTIM_SECONDS = 3.0
# On another host it is found by its silence.
VICTIM_SECONDS_OVER_HOSTS = 14.0


@dataclass(frozen=True)
class Record:
    """How a rank is doing, in `logs/rank-N.json`. `state`: running, done, failed, victim (another rank failed) or lost
    (it has found `rank` of `host` lost). `error`: what, where and remedy, with the class's name and exit code.
    """

    rank: int
    host: str
    pid: int
    restarts: int = 0
    state: str = "running"
    step: int = 0
    what: str = ""
    where: str | None = None
    remedy: str | None = None
    kind: str = ""
    exit_code: int = 1

    def error(self) -> KitaeruError:
        """The error that ended the rank."""
        plain = (
            "TrainingError",
            "RankLostError",
            "SteppedDownError",
            "CheckpointError",
            "PlanError",
            "ModelError",
            "DataError",
            "UsageError",
            "Interrupted",
        )
        cls = getattr(errors, self.kind) if self.kind in plain else KitaeruError
        error: KitaeruError = cls(self.what, where=self.where, remedy=self.remedy)
        error.exit_code = self.exit_code
        return error


def records(folder: Path, restarts: int | None = None) -> list[Record]:
    """The records of all ranks of a run (of its attempt number `restarts`), by rank."""
    found = []
    for path in (folder / "logs").glob("rank-*.json"):
        try:
            found.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted((r for r in found if restarts in (None, r.restarts)), key=lambda r: r.rank)


def work(run: Run, place: Place, store: Any, listeners: Sequence[Listener], phase: Phase | None = None) -> Result:
    """Train as one of several processes.

    Raises:
        KitaeruError: as `train`.
    """
    layout = run.plan.layout
    if layout.processes != place.size:
        raise TrainingError(
            tr(
                "The plan is for {planned} processes, and {count} were started.",
                planned=layout.processes,
                count=place.size,
            ),
            remedy=tr(
                "Start {planned}, or plan anew with --set limits.devices={count}.",
                planned=layout.processes,
                count=place.size,
            ),
        )
    note = partial(_note, run.folder, Record(place.rank, socket.gethostname(), os.getpid(), place.restarts))
    note()
    where = {"rank": place.rank, "size": place.size, "local_rank": place.local_rank, "local_size": place.local_size}
    world = None
    try:
        world = join(store, device=layout.device, on_loss=partial(_leave_lost, run.folder, note), **where)
        _same_data(run, world)
        result = train(run, listeners, phase, world)
        world.wait()
        note(state="done")
    except KitaeruError as error:
        state = "done" if isinstance(error, Interrupted) else "failed"
        note(state=state, **_told(error))
        raise
    except BaseException as error:
        victim = lost_contact(error)
        note(state="victim" if victim else "failed", what=f"{type(error).__name__}: {error}")
        if victim:
            time.sleep(VICTIM_SECONDS if place.size == place.local_size else VICTIM_SECONDS_OVER_HOSTS)
        raise
    finally:
        if world is not None:
            leave(world)
    return result


def _told(error: KitaeruError) -> dict[str, Any]:
    return {
        "what": error.what,
        "where": error.where,
        "remedy": error.remedy,
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
    }


def _note(folder: Path, first: Record, **changes: Any) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "logs" / f"rank-{first.rank}.json", {**asdict(first), **changes})


def _same_data(run: Run, world: World) -> None:
    """Ranks on other hosts have read their own files.

    Raises:
        DataError: these hold something else.
    """
    prints = world.each_of((world.host, run.data.train.fingerprint))
    other = next((host for host, own in prints if own != prints[0][1]), None)
    if other is not None:
        raise errors.DataError(
            tr("The training data on {host} is not that on {first}.", host=other, first=prints[0][0]),
            remedy=tr("Give every host the same files, under the same path."),
        )


def _leave_lost(folder: Path, note: Any, lost: Lost) -> None:
    """Another rank is lost: say which, and end at once; a collective that waits for it never comes back."""
    what = lost_text(lost.rank, lost.host, lost.step, lost.why) if lost.host else lost.why
    if lost.word:  # its host has stepped down, and so must this one
        write_atomic(folder / RUNG, lost.word)
    note(state="lost", what=what, step=lost.step, kind=lost.kind, remedy=lost_remedy())
    if lost.process and lost.host == socket.gethostname():
        with suppress(ProcessLookupError, PermissionError):
            os.kill(lost.process, signal.SIGKILL)  # one that is stopped would keep whoever waits for it
    os._exit(LOST_EXIT)


def lost_text(rank: int, host: str, step: int, why: str) -> str:
    """A sentence that names a lost rank."""
    return tr("Rank {rank} on {host} is lost after step {step}: {why}.", rank=rank, host=host, step=step, why=why)


def lost_remedy() -> str:
    """What to do then."""
    return tr("Go on from the last checkpoint with --resume; --set limits.max_restarts=3 does so by itself.")
