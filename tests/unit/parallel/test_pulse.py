"""Signs of life, with the real store and short patience."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from kitaeru.parallel import pulse
from kitaeru.parallel.pulse import Lost, Pulse

PEERS = [("a", 100), ("b", 200)]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pulse, Pulse, list[Lost]]]:
    """Two ranks that watch each other through one store, and what they have seen lost."""
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(pulse, "SILENT_SECONDS", {"working": 0.4, "waiting": 0.4, "free": 1.2})
    monkeypatch.setattr(pulse, "STUCK_SECONDS", 0.4)
    monkeypatch.setattr(pulse, "COLLECTIVE_SECONDS", 0.6)
    store, seen = HashStore(), []
    made = [Pulse(store, rank, PEERS, seen.append) for rank in range(2)]
    yield made[0], made[1], seen
    for one in made:
        one.stop()


def wait_for(seen: list[Lost], seconds: float = 30.0) -> Lost:
    end = time.monotonic() + seconds
    while not seen and time.monotonic() < end:
        time.sleep(0.01)
    assert seen, "nobody was missed"
    return seen[0]


def test_one_that_falls_silent_is_named(pair: tuple[Pulse, Pulse, list[Lost]]) -> None:
    first, second, seen = pair
    first.waiting()
    second.working(7)
    time.sleep(0.1)
    second._stop.set()  # as if the process were stopped: its thread says nothing more
    lost = wait_for(seen)
    assert (lost.rank, lost.host, lost.process, lost.step) == (1, "b", 200, 7)


def test_one_that_is_stuck_while_its_thread_lives_is_named(pair: tuple[Pulse, Pulse, list[Lost]]) -> None:
    first, second, seen = pair
    second.working(3)
    time.sleep(0.01)
    second.working(4)  # the first micro-batch gives the measure
    first.waiting()
    lost = wait_for(seen)
    assert (lost.rank, lost.step) == (1, 4)


def test_all_waiting_for_each_other_is_a_broken_connection(pair: tuple[Pulse, Pulse, list[Lost]]) -> None:
    first, second, seen = pair
    first.waiting()
    second.waiting()
    assert "connection" in wait_for(seen).why


def test_nobody_is_missed_while_one_loads_or_saves(pair: tuple[Pulse, Pulse, list[Lost]]) -> None:
    first, second, seen = pair
    first.working(1)
    first.working(2)
    second.free()
    time.sleep(0.9)
    assert not seen


def test_one_that_is_done_is_not_missed(pair: tuple[Pulse, Pulse, list[Lost]]) -> None:
    first, second, seen = pair
    second.stop()
    first.free()
    time.sleep(1.5)
    assert not seen
