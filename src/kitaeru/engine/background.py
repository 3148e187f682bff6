"""Work that goes on while training does, in another thread; one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """What was done is told by `done`, on the thread that asks: an error of the work is raised there.

    The thread is none of Python's daemons: a program that ends lets it finish.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._answer: T | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], T]) -> None:
        """Begin; what was started before must have been taken in (`done`)."""
        assert self._thread is None

        def run() -> None:
            try:
                self._answer = work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="background")
        self._thread.start()

    def done(self, *, wait: bool) -> T | None:
        """What the work gave, once; None while there is none or it goes on (with `wait` until it is done)."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread, answer, error = None, self._answer, self._error
        self._answer = self._error = None
        if error is not None:
            raise error
        return answer
