"""Where the numbers go beside `events.jsonl`: TensorBoard files, Prometheus, W&B, MLflow and trackio, each through its
own client.

A tracker is a listener with `close`. It can fail (no network, no login, a full disk): then it is dropped with one
notice, and training goes on. Only the recipe is handed to them, never the environment.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from kitaeru.events import Event, Notice
from kitaeru.i18n import tr
from kitaeru.recipe.types import TrackSection

_QUEUED = 10_000

Notify = Callable[[Notice], None]


class Tracker(Protocol):
    """A listener that must be closed."""

    name: str

    def __call__(self, event: Event) -> None:
        """Take `event` in."""
        ...

    def close(self) -> None:
        """Write what is left and let go."""
        ...


def trackers(
    section: TrackSection, run_dir: Path, config: dict[str, Any], notify: Notify | None = None
) -> list[Tracker]:
    """The trackers that `section` names, guarded: none of them can stop or stall training.

    Args:
        section: which ones.
        run_dir: the run folder; TensorBoard files go to `run_dir/tensorboard`.
        config: the recipe as plain data.
        notify: gets a Notice when a tracker fails or has an address to show (from another thread); default: the log.

    Raises:
        MissingLibraryError: a named tracker's client is not installed.
    """
    from kitaeru.report import hosted
    from kitaeru.report.prometheus import Prometheus
    from kitaeru.report.tensorboard import TensorBoard

    tell = notify or _log
    found: list[Tracker] = []
    if section.tensorboard:
        found.append(Guarded(TensorBoard(run_dir / "tensorboard", config), tell))
    if section.prometheus_port is not None:
        try:
            found.append(Guarded(Prometheus(section.prometheus_port, section.prometheus_address), tell))
        except OSError as error:  # most likely another run serves there
            text = tr("Prometheus gets no numbers of this run: port {port}: {error}", port=section.prometheus_port,
                      error=error.strerror or error)  # fmt: skip
            tell(Notice(level="warning", text=text))
    for project, make in (
        (section.wandb, hosted.Wandb),
        (section.mlflow, hosted.MLflow),
        (section.trackio, hosted.Trackio),
    ):
        if project is not None:
            found.append(Background(Guarded(make(project, run_dir, config, tell), tell), tell))
    return found


class Guarded:
    """A tracker whose first failure is told once and ends it, and it alone."""

    def __init__(self, tracker: Tracker, tell: Notify) -> None:
        self.name = tracker.name
        self._tracker = tracker
        self._tell = tell
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Pass `event` on while all is well."""
        self._try(lambda: self._tracker(event))

    def close(self) -> None:
        """Close the tracker; once it failed there is nothing left to close."""
        self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            # Marked first: the notice comes back to this listener as an event.
            self._failed = True
            reason = str(error).strip().splitlines()
            self._tell(
                Notice(
                    level="warning",
                    text=tr(
                        "{tracker} failed and gets no more numbers; training goes on. Reason: {reason}",
                        tracker=self.name,
                        reason=reason[0] if reason else type(error).__name__,
                    ),
                )
            )


class Background:
    """A tracker in a thread of its own: a slow network delays its numbers, never the training."""

    def __init__(self, tracker: Tracker, tell: Notify, close_seconds: float = 60.0) -> None:
        self.name = tracker.name
        self._tracker = tracker
        self._tell = tell
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Event | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Queue `event`; when ten thousand wait already, it is left out."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            return

    def close(self) -> None:
        """Wait for what is queued, a minute at most; say so when that was not enough."""
        try:
            self._queue.put(None, timeout=self._close_seconds)
            self._thread.join(self._close_seconds)
        except queue.Full:
            pass
        if self._thread.is_alive():
            text = tr("{tracker} answers too slowly: it did not get the last numbers.", tracker=self.name)
            self._tell(Notice(level="warning", text=text))

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            self._tracker(event)
        self._tracker.close()


def _log(notice: Notice) -> None:
    level = logging.WARNING if notice.level != "info" else logging.INFO
    logging.getLogger("kitaeru").log(level, notice.text)
