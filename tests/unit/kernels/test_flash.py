"""Which flash attention is taken: tried with torch's own registry, and implementations that only say that they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import attention as implementations

from kitaeru.kernels import flash, flex
from kitaeru.kernels.packed_attention import Sight
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
        (layer,) = passes()
        assert [tuple(gradient.shape) for gradient in layer] == [(8, 4, 64), (8, 2, 64), (8, 2, 64)]
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


@pytest.mark.parametrize("sight", [Sight(), Sight(window=40), Sight(softcap=2.0), Sight(window=4096, softcap=2.0)])
def test_what_is_compared_is_right_for_what_a_cpu_has(sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: it sees another scale, another cap, and a window that is longer than what it compares."""
    shape = replace(SHAPE, sights=(Sight(), sight))
    assert flash._off(shape, CPU, torch.float32) < 1e-5
    exact = flash.packed_attention_reference

    def wrong(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, seen: Sight) -> Tensor:
        other = Sight(seen.window and seen.window - 10, 1.5 * seen.softcap)
        return exact(q, k, v, starts, 1.5 * scale if seen == Sight() else scale, other)

    monkeypatch.setattr(flash, "packed_attention_reference", wrong)
    assert flash._off(shape, CPU, torch.float32) > flash.CLOSE


def test_capped_scores_take_the_tiles_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none where none is, which is told with the reasons."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(flash, "_packed", lambda *_: ((), None, None))
    monkeypatch.setattr(flex, "tiles", None)
    capped, device = replace(SHAPE, sights=(Sight(softcap=50.0), Sight(4096, 50.0))), torch.device("cuda", 0)
    names = list(flex.TILES)
    for wrong in range(len(names) + 1):
        monkeypatch.setattr(flash, "_off", lambda *_, of=names[:wrong]: 0.3 if flex.tiles in of else 0.001)
        tried = flash.settle(capped, device, lambda _: 1.0)
        assert flex.tiles == (names[wrong] if wrong < len(names) else None)
        assert [t.name for t in tried] == names[: wrong + 1][::-1]
        assert [t.why for t in tried if t.name in names[:wrong]] == ["0.300"] * wrong
        assert (tried[0].seconds == 1.0) == (wrong < len(names))
    assert flash.settle(capped, CPU, lambda _: 1.0) == []


@pytest.mark.gpu
@pytest.mark.parametrize("sights", [(Sight(),), (Sight(), Sight(window=1024))])
def test_torchs_own_is_right_and_timed_on_a_gpu(sights: tuple[Sight, ...]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = Bench(device, 0.05, quick=True).time
    tried = flash._tried(None, flash.Shape(32, 8, 128, 128**-0.5, sights), device, timer, torch.bfloat16)
    assert 0 < tried.seconds < 1
    assert tried.why == ""


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("tiles", ["flex-small", "flex-smallest", ""])
def test_flex_attention_is_right_on_a_gpu(size: int, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of Gemma 2, in layers that see all and in such that see 1,024 tokens; without a name what is chosen."""
    monkeypatch.setattr(flex, "tiles", None)
    device = torch.device("cuda", torch.cuda.current_device())
    shape = flash.Shape(8, 4, size, 256**-0.5, (Sight(1024, 50.0), Sight(0, 50.0)))
    timer = Bench(device, 0.05, quick=True).time
    found = [flash._tried(tiles, shape, device, timer, torch.bfloat16)] if tiles else flash.settle(shape, device, timer)
    tried = found[0]
    assert tried.why == ""
    assert 0 < tried.seconds < 1
