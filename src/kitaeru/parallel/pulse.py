"""Signs of life: every rank says each second what it is doing, and looks at what the others say.

A collective waits for a rank that will never come, and does not say which. So each rank has a thread that tells the
common store a beat and how far the rank has come, and watches the others; whoever sees one lost says so and leaves,
which takes the rest along.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kitaeru.i18n import tr

BEAT_SECONDS = 1.0
# A thread can be kept from running that long by a library that holds Python's lock; at work none does for so long.
SILENT_SECONDS = {"working": 12.0, "waiting": 12.0, "free": 120.0}
# A micro-batch may take that many times the longest one so far, and at least so many seconds.
STUCK_TIMES, STUCK_SECONDS, FIRST_SECONDS, COLLECTIVE_SECONDS = 10.0, 15.0, 900.0, 120.0
# A host that is cut off hears nothing, not even that a connection has closed.
CUT_OFF_SECONDS = 15
# What a host leaves in the store when one of its ranks has failed.
OVER = "over"


@dataclass(frozen=True)
class Lost:
    """A rank that is not coming any more; `process` is its number on its host. Where another host has told of it, `why`
    is the whole sentence and `host` is empty; `kind` is the error's class, and `word` is for whoever starts the ranks
    again.
    """

    rank: int
    host: str
    process: int
    step: int
    why: str
    kind: str = "RankLostError"
    word: str = ""


@dataclass
class _Seen:
    beat: str = ""
    place: tuple[str, str] = ("", "")
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)


class Pulse:
    """This rank's beats and its eyes on the others (`peers`: host and process of each, by rank).

    `on_loss` is called once, from the watching thread. `working(step)` is said before each micro-batch, `waiting()`
    before ranks wait for each other, `free()` before anything else that may take long (loading, saving, answering), in
    which no rank is called stuck.
    """

    def __init__(self, store: Any, rank: int, peers: list[tuple[str, int]], on_loss: Callable[[Lost], None]) -> None:
        self._store, self._rank, self._peers, self._on_loss = store, rank, peers, on_loss
        self._beat, self._moves, self._state, self._step = 0, 0, "free", 0
        self._longest, self._began = 0.0, 0.0
        self._seen = [_Seen() for _ in peers]
        self._lock = threading.Lock()
        self._stop, self._telling = threading.Event(), threading.Lock()
        self._say()
        self._rounds = 0
        for target in (self._live, self._guard):
            threading.Thread(target=target, name="pulse", daemon=True).start()

    def working(self, step: int) -> None:
        """A micro-batch of the step after `step` begins."""
        self._lap()
        was_free = self._state == "free"
        self._state, self._step, self._began = "working", step, time.monotonic()
        self._moves += 1
        if was_free:  # from now on silence counts: said at once too
            self._say()

    def waiting(self) -> None:
        """What follows needs the other ranks."""
        self._lap()
        self._state, self._moves = "waiting", self._moves + 1

    def free(self) -> None:
        """What follows takes as long as it takes; said at once, since the thread may not get to it."""
        self._lap()
        self._state, self._moves = "free", self._moves + 1
        self._say()

    def stop(self) -> None:
        """The rank has done its work."""
        self._stop.set()
        self._state = "done"
        with suppress(Exception):
            self._say()

    def _lap(self) -> None:
        if self._state == "working":
            self._longest = max(self._longest, time.monotonic() - self._began)

    def _say(self) -> None:
        with self._lock:
            self._beat += 1
            words = (self._beat, self._moves, self._state, self._step, f"{self._longest:.3f}")
            self._store.set(f"pulse/{self._rank}", " ".join(str(word) for word in words))

    def _live(self) -> None:
        keys = [f"pulse/{rank}" for rank in range(len(self._peers))]
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._say()
                lost = self._look(self._store.multi_get(keys)) if self._store.check(keys) else None
                if self._store.check([OVER]):
                    lost = Lost(**json.loads(self._store.get(OVER)))
                self._rounds += 1
            except Exception as error:
                if self._stop.is_set():
                    return
                why = tr("the connection to it broke ({error})", error=str(error).splitlines()[0])
                lost = Lost(0, *self._peers[0], self._step, why)
            if lost is not None:
                self._tell(lost)
                return

    def _guard(self) -> None:
        """The other thread may be waiting for an answer that never comes."""
        rounds, silent = 0, 0
        while not self._stop.wait(BEAT_SECONDS):
            silent = silent + 1 if rounds == self._rounds else 0  # counted: a held lock of Python's stops both threads
            rounds = self._rounds
            if silent >= CUT_OFF_SECONDS:
                why = tr("no answer for {seconds} s; its host is down, or this one is cut off", seconds=silent)
                self._tell(Lost(0, *self._peers[0], self._step, why))
                return

    def _tell(self, lost: Lost) -> None:
        with self._telling:
            if not self._stop.is_set():
                self._on_loss(lost)
                self._stop.set()

    def _look(self, values: list[bytes]) -> Lost | None:
        now = time.monotonic()
        said = [value.decode().split() for value in values]
        states = [words[2] for words in said]
        for seen, (beat, moves, state, *_) in zip(self._seen, said, strict=True):
            if beat != seen.beat:
                seen.beat, seen.heard = beat, now
            if (moves, state) != seen.place or "free" in states:
                seen.place, seen.moved = (moves, state), now
        for rank, (_, _, state, step, longest) in enumerate(said):
            why = self._trouble(rank, state, float(longest), now)
            if why:
                return Lost(rank, *self._peers[rank], int(step), why)
        if set(states) == {"waiting"} and all(now - seen.moved > COLLECTIVE_SECONDS for seen in self._seen):
            why = tr("all ranks wait for each other; the connection between them does not work")
            return Lost(self._rank, *self._peers[self._rank], self._step, why)
        return None

    def _trouble(self, rank: int, state: str, longest: float, now: float) -> str:
        seen = self._seen[rank]
        if state != "done" and now - seen.heard > SILENT_SECONDS[state]:
            if self._peers[rank][0] == self._peers[self._rank][0]:
                return tr("no sign of life for {seconds:.0f} s", seconds=now - seen.heard)
            return tr(
                "no sign of life for {seconds:.0f} s; its host is down, or cut off from the network",
                seconds=now - seen.heard,
            )
        limit = max(STUCK_SECONDS, STUCK_TIMES * longest) if longest else FIRST_SECONDS
        if state == "working" and now - seen.moved > limit:
            return tr("stuck in a micro-batch for {seconds:.0f} s", seconds=now - seen.moved)
        return ""


class NoPulse:
    """A process alone has nobody to tell."""

    def working(self, step: int) -> None:
        """Nothing."""

    def waiting(self) -> None:
        """Nothing."""

    def free(self) -> None:
        """Nothing."""
