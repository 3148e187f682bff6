"""Which flash attention is taken: tried with torch's own registry, and implementations that only say that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention as implementations

from kitaeru.kernels import flash
from kitaeru.machine.measure import Bench

CPU, SHAPE = torch.device("cpu"), flash.Shape(4, 2, 64, 0.125)


class Handle:
    """What an implementation gives torch; torch takes it off again."""

    removed = 0

    def remove(self) -> None:
        Handle.removed += 1


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], Any]]]:
    """Both implementations: registered in place of torch's own entries, and there."""
    from torch.nn.attention import _registry

    made: dict[str, Callable[[], Any]] = {"FA3": Handle, "FA4": Handle}
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", made)
    monkeypatch.setattr(flash, "installed", lambda _: ["FA3", "FA4"])
    yield made
    flash.use(None)


def answers(
    monkeypatch: pytest.MonkeyPatch, off: dict[str | None, float], seconds: dict[str | None, float]
) -> flash.Timer:
    """What is measured while each is active."""
    active = implementations.current_flash_attention_impl
    monkeypatch.setattr(flash, "MANY", (8,))
    monkeypatch.setattr(flash, "_off", lambda *_: off.get(active(), 0.001))

    def time(passes: Callable[[], Any]) -> float:
        assert [tuple(gradient.shape) for gradient in passes()] == [(8, 4, 64), (8, 2, 64), (8, 2, 64)]
        return seconds[active()]

    return time


@pytest.mark.parametrize(
    ("off", "seconds", "taken"),
    [
        ({}, {None: 3.0, "FA3": 1.0, "FA4": 2.0}, "FA3"),
        ({}, {None: 3.0, "FA3": 2.0, "FA4": 1.0}, "FA4"),
        ({"FA3": 0.4}, {None: 3.0, "FA3": 1.0, "FA4": 2.0}, "FA4"),  # wrong
        ({"FA3": float("nan"), "FA4": 0.021}, {None: 3.0, "FA3": 1.0, "FA4": 2.0}, None),
        ({}, {None: 1.0, "FA3": 0.98, "FA4": 1.2}, None),  # chance
    ],
)
def test_the_fastest_that_is_right_is_taken(
    registered: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    off: dict[str | None, float],
    seconds: dict[str | None, float],
    taken: str | None,
) -> None:
    tried = flash.settle(SHAPE, CPU, answers(monkeypatch, off, seconds))
    assert implementations.current_flash_attention_impl() == taken == tried[0].name
    assert {t.name for t in tried} == {None, "FA3", "FA4"}
    assert [t.seconds for t in tried[1:]] == sorted(t.seconds for t in tried[1:])


def test_one_that_cannot_be_loaded_is_passed_over(registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file\nand more")

    registered["FA3"] = broken
    tried = flash.settle(SHAPE, CPU, answers(monkeypatch, {}, {None: 3.0, "FA4": 1.0}))
    assert [t.name for t in tried] == ["FA4", None, "FA3"]
    assert tried[-1].why == "ImportError: libcudart.so.12: cannot open shared object file"


def test_where_none_is_installed_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_off", lambda *_: pytest.fail("tried"))
    assert flash.settle(SHAPE, CPU, lambda _: pytest.fail("timed")) == []
    assert implementations.current_flash_attention_impl() is None


def test_what_is_compared_is_right_for_torchs_own() -> None:
    """The comparison itself, by the kernels that a CPU has."""
    assert flash._off(SHAPE, CPU, torch.float32) < 1e-5
    wrong = flash.Shape(4, 2, 64, 0.125)
    exact = flash.packed_attention_reference
    try:
        flash.packed_attention_reference = lambda q, k, v, starts, scale: exact(q, k, v, starts, 1.5 * scale)
        assert flash._off(wrong, CPU, torch.float32) > flash.CLOSE
    finally:
        flash.packed_attention_reference = exact


@pytest.mark.gpu
def test_torchs_own_is_right_and_timed_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = Bench(device, 0.05, quick=True).time
    tried = flash._tried(None, flash.Shape(32, 8, 128, 128**-0.5), device, timer, torch.bfloat16)
    assert 0 < tried.seconds < 1
    assert tried.why == ""
