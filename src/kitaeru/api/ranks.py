"""A run on several devices, as people see it: the main process shows it, the others write a log."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kitaeru.errors import Interrupted, KitaeruError, RankLostError, SteppedDownError, TrainingError, UsageError
from kitaeru.events import Event
from kitaeru.hardware import Hardware, united
from kitaeru.i18n import language, set_language, tr
from kitaeru.recipe.types import Recipe
from kitaeru.report.live import live_view
from kitaeru.report.trackers import trackers

if TYPE_CHECKING:
    from kitaeru.engine.hosts import Leader, Member, Team
    from kitaeru.engine.place import Place
    from kitaeru.engine.run import Result, Run

_RUN_KEY = "kitaeru/run"
# A script may train several times in the same processes, which share one store: what each run says in it is kept apart.
_RUNS = count()


@dataclass(frozen=True)
class Show:
    """How a run is shown: in plain lines in any case, and with a line for so many steps (else by time)."""

    plain: bool = False
    every: int | None = None


SHOWN = Show()


def start(run: Run, leader: Leader, *, resume: bool, show: Show) -> str:
    """Start the processes of a prepared run on this host, the first or the only one, and wait for the end; the outcome.

    Raises:
        KitaeruError: as `engine.launch.launch`; Interrupted when a person stopped it.
    """
    from kitaeru.engine.launch import launch, tell_failed

    deaths, last, size = 0, None, run.plan.layout.processes
    leader.publish(run.folder)
    while True:
        try:
            team = leader.meet(run.folder, size, resume=resume, restarts=deaths)
        except TrainingError:
            if last is not None:  # why the host is missing says more than that it is
                tell_failed(run.folder, last)
                raise last from None
            raise
        try:
            answer = launch(run.folder, _worker, (str(run.folder), show, language()), team)
            break
        except SteppedDownError as error:  # each time a rung lower, so there is an end to it
            leader.over(run.folder, error)
        except RankLostError as error:
            leader.over(run.folder, error)
            deaths, last = deaths + 1, error
            if deaths > run.wish.limits.max_restarts:
                tell_failed(run.folder, error)
                raise
            Console(highlight=False).print(str(error), markup=False)
        except KitaeruError as error:
            leader.over(run.folder, error)
            tell_failed(run.folder, error)
            raise
        resume = True
    return _outcome(answer)


def help_out(member: Member, *, show: Show) -> Path:
    """Start the processes of this host, not the first one, as often as the first one begins; the run's folder.

    Raises:
        KitaeruError: as `start`.
    """
    from kitaeru.engine.hosts import EndedError, LeaderGoneError
    from kitaeru.engine.launch import launch
    from kitaeru.engine.run import reopen

    last: KitaeruError | None = None
    restarts = 0
    member.come()
    while True:
        try:
            folder = member.folder()
            with live_view(Console(highlight=False), show.plain or None, show.every) as view:
                run = reopen(folder, resume=False, main=False, phase=view.phase)  # tokenises, if it has to
            restarts = run.wish.limits.max_restarts
            team = member.meet(folder)
            answer = launch(folder, _worker, (str(folder), show, language()), team)
            break
        except EndedError as ended:
            why = tr("The first host has ended the run: {why}", why=str(ended) or tr("it is finished"))
            raise last or TrainingError(why) from None
        except LeaderGoneError as gone:
            last = last or TrainingError(tr("The first host does not answer: {error}", error=gone))
            if not restarts:
                raise last from None
            member.come()
        except KitaeruError as error:
            last = error
            member.over(folder, error)
            if restarts:
                Console(highlight=False).print(str(error), markup=False)
    _outcome(answer)
    return folder


def _outcome(answer: tuple[str, ...]) -> str:
    outcome, *words = answer
    if outcome == "interrupted":
        raise Interrupted(words[0], remedy=words[1])
    return outcome


def _worker(folder: str, show: Show, lang: str, team: Team) -> tuple[str, ...]:
    """What each of them does. An interruption is no failure: it comes back as an answer."""
    from kitaeru.engine.launch import begin_worker
    from kitaeru.engine.place import meet

    begin_worker(team.agent)
    set_language(lang)
    place = team.place()
    try:
        return (follow(Path(folder), place, meet(place), resume=team.resume, show=show).outcome,)
    except Interrupted as error:
        return ("interrupted", error.what, error.remedy or "")


def join(wish: Recipe, place: Place, *, resume: bool, show: Show) -> Result | None:
    """Train as one of several processes that somebody else started. None: the main one could not, and has said why.

    Only the main process reads the recipe's data for the first time and plans; the others wait for its run folder.

    Raises:
        KitaeruError: as `follow`.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    from kitaeru.engine.hosts import packed, unpacked
    from kitaeru.engine.place import meet
    from kitaeru.engine.run import prepare
    from kitaeru.machine.probe import probe

    store = PrefixStore(f"run-{next(_RUNS)}", meet(place))
    store.set(f"machine/{place.rank}", "" if place.local_rank else json.dumps(probe().to_dict()))
    if place.rank == 0:
        said = ""
        try:
            with live_view(Console(highlight=False), show.plain or None, show.every) as view:
                again = resume or (place.restarts > 0 and wish.output is not None)
                hardware = _machines(store, place)
                run = prepare(for_size(wish, place.size), resume=again, phase=view.phase, hardware=hardware)
                said = packed(run.folder)
        finally:
            store.set(_RUN_KEY, said)
    else:
        store.wait([_RUN_KEY], timedelta(days=2))
        said = store.get(_RUN_KEY).decode()
    return follow(unpacked(said), place, store, resume=resume, show=show) if said else None


def _machines(store: Any, place: Place) -> Hardware:
    """All hosts as one machine: the first process of each has told the store what its host is."""
    said = [store.get(f"machine/{rank}").decode() for rank in range(place.size)]
    machines = [Hardware.from_dict(json.loads(text)) for text in said if text]
    return united(machines) if len(machines) > 1 else machines[0]


def for_size(wish: Recipe, size: int) -> Recipe:
    """The wish for as many devices as there are processes."""
    if wish.limits.devices not in (None, size):
        raise UsageError(
            tr(
                "The recipe asks for {wished} devices, and {count} processes were started.",
                wished=wish.limits.devices,
                count=size,
            ),
            remedy=tr("Leave `limits.devices` out, or start as many processes."),
        )
    return wish.model_copy(update={"limits": wish.limits.model_copy(update={"devices": size})})


def follow(folder: Path, place: Place, store: Any, *, resume: bool, show: Show) -> Result:
    """Train the run that lies in `folder`, with all that a person sees if this is the main process.

    Raises:
        KitaeruError: training cannot go on.
    """
    from kitaeru.engine.rank import work
    from kitaeru.engine.run import reopen

    resume = resume or place.restarts > 0
    if place.rank > 0:
        _into_log(folder / "logs" / f"rank-{place.rank}.log")
        run = reopen(folder, resume=resume, main=False)
        return work(run, place, store, [_write])
    with live_view(Console(highlight=False), show.plain or None, show.every) as view:
        run = reopen(folder, resume=resume, main=True, phase=view.phase)
        if place.restarts:
            view.phase(tr("Started again after a process died ({count})", count=place.restarts), 0, 0)
        followers = trackers(run.plan.recipe.track, folder, run.wish.model_dump(mode="json"), notify=view)
        try:
            return work(run, place, store, [view, *followers], view.phase)
        finally:
            for follower in followers:
                follower.close()


def _into_log(path: Path) -> None:
    """Whatever this process and its libraries say goes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _write(event: Event) -> None:
    print(event.to_json(), flush=True)
