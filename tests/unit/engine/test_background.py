"""Work in another thread: told once, its errors raised where it is asked for."""

from __future__ import annotations

import threading

import pytest

from kitaeru.engine.background import Background


def test_training_goes_on_meanwhile():
    gate, behind = threading.Event(), Background[int]()
    assert behind.done(wait=True) is None
    behind.start(lambda: 7 if gate.wait(10) else 0)
    assert behind.done(wait=False) is None
    gate.set()
    assert behind.done(wait=True) == 7
    assert behind.done(wait=True) is None


def test_an_error_is_raised_once():
    behind = Background[int]()

    def fails() -> int:
        raise OSError("disk")

    behind.start(fails)
    with pytest.raises(OSError, match="disk"):
        behind.done(wait=True)
    behind.start(lambda: 1)
    assert behind.done(wait=True) == 1
