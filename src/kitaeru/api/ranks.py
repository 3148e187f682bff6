"""A run on several devices, as people see it: the main process shows it, the others write a log."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kitaeru.errors import Interrupted, SteppedDownError, UsageError
from kitaeru.events import Event
from kitaeru.i18n import language, set_language, tr
from kitaeru.recipe.types import Recipe
from kitaeru.report.live import live_view
from kitaeru.report.trackers import trackers

if TYPE_CHECKING:
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


def start(run: Run, *, resume: bool, show: Show) -> str:
    """Start the processes of a prepared run and wait for them; the outcome.

    Raises:
        KitaeruError: as `engine.launch.launch`; Interrupted when a person stopped it.
    """
    from kitaeru.engine.launch import launch

    while True:
        arguments = (str(run.folder), resume, show, language())
        try:
            answer = launch(run.folder, _worker, arguments, run.plan.layout.processes, run.wish.limits.max_restarts)
            break
        except SteppedDownError:  # each time a rung lower, so there is an end to it
            resume = True
    outcome, *words = answer
    if outcome == "interrupted":
        raise Interrupted(words[0], remedy=words[1])
    return str(outcome)


def _worker(folder: str, resume: bool, show: Show, lang: str) -> tuple[str, ...]:
    """What each of them does. An interruption is no failure: it comes back as an answer."""
    from kitaeru.engine.place import meet, placed

    set_language(lang)
    place = placed()
    assert place is not None
    try:
        return (follow(Path(folder), place, meet(place), resume=resume, show=show).outcome,)
    except Interrupted as error:
        return ("interrupted", error.what, error.remedy or "")


def join(wish: Recipe, place: Place, *, resume: bool, show: Show) -> Result | None:
    """Train as one of several processes that somebody else started. None: the main one could not, and has said why.

    Only the main process reads the recipe's data for the first time and plans; the others wait for its run folder.

    Raises:
        KitaeruError: as `follow`.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    from kitaeru.engine.place import meet
    from kitaeru.engine.run import prepare

    store = PrefixStore(f"run-{next(_RUNS)}", meet(place))
    if place.rank == 0:
        folder = ""
        try:
            with live_view(Console(highlight=False), show.plain or None, show.every) as view:
                again = resume or (place.restarts > 0 and wish.output is not None)
                folder = str(prepare(_for(wish, place.size), resume=again, phase=view.phase).folder)
        finally:
            store.set(_RUN_KEY, folder)
    else:
        from datetime import timedelta

        store.wait([_RUN_KEY], timedelta(days=2))
        folder = store.get(_RUN_KEY).decode()
    return follow(Path(folder), place, store, resume=resume, show=show) if folder else None


def _for(wish: Recipe, size: int) -> Recipe:
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
