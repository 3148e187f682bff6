"""`kitaeru monitor`: a run as it goes on, from another terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kitaeru.cli.text import console
from kitaeru.errors import UsageError
from kitaeru.events import Event, RunFinished, parse
from kitaeru.i18n import N_, tr
from kitaeru.report.live import live_view

_POLL_SECONDS = 0.25
_SILENT_SECONDS = 120.0


def run(
    folder: Annotated[Path, Parameter(name="run", help=N_("The run folder, for example runs/NAME."))],
    *,
    follow: Annotated[
        bool, Parameter(help=N_("Go on until the run ends. --no-follow: show what there is, and end."))
    ] = True,
    plain: Annotated[bool, Parameter(negative="", help=N_("Plain lines instead of the live view."))] = False,
) -> int:
    """Show a run from its events; 0 when it has ended well or goes on, 1 when it has failed."""
    path = folder / "events.jsonl"
    if not path.is_file() and not (follow and (folder / "plan.json").is_file()):
        raise UsageError(
            tr("{path} is not the folder of a run: it has no events.jsonl.", path=folder),
            remedy=tr("Give the folder that training named, for example `kitaeru monitor runs/NAME`."),
        )
    last: Event | None = None
    with live_view(console(), plain=plain or None) as view:

        def silent(seconds: float) -> None:
            view.phase(tr("Nothing new for {seconds:.0f} s: the run may have been killed", seconds=seconds), 0, 0)

        for event in events(path, follow=follow, silent=silent):
            view(event)
            last = event
    return 1 if isinstance(last, RunFinished) and last.outcome == "failed" else 0


def events(
    path: Path, *, follow: bool, silent: Callable[[float], None] = lambda _: None, poll_seconds: float = _POLL_SECONDS
) -> Iterator[Event]:
    """The events of a file as it grows, until the run has ended and nothing follows; a line half written is waited for.

    `silent` is told, once each time, when nothing has come for two minutes.
    """
    rest, ended, heard, told = b"", False, time.monotonic(), False
    place = 0
    while True:
        new = _since(path, place)
        place += len(new)
        *lines, rest = (rest + new).split(b"\n")
        for line in lines:
            event = _event(line)
            if event is not None:
                ended = isinstance(event, RunFinished)
                yield event
        if ended or not follow:
            return
        if new:
            heard, told = time.monotonic(), False
        elif not told and time.monotonic() - heard > _SILENT_SECONDS:
            silent(time.monotonic() - heard)
            told = True
        time.sleep(poll_seconds)


def _since(path: Path, place: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(place)
            return file.read()
    except FileNotFoundError:  # the run has not begun yet
        return b""


def _event(line: bytes) -> Event | None:
    try:
        return parse(line.decode("utf-8", errors="replace"))
    except ValueError:  # cut short by a kill
        return None
