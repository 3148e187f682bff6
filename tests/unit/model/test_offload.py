"""Layers that are computed again, some or all, their inputs on the device or in the host's memory: the same numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kitaeru.model import offload
from kitaeru.model.offload import Host
from kitaeru.plan.activations import LEAVING

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])


@DEVICES
def test_what_is_put_comes_back_in_any_order(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE_BYTES", 1 << 12)
    host = Host(torch.device(device))
    for turn in range(2):  # the second time round in the pieces of the first
        host.begin()
        sent = [torch.full((3, 700 + i), i + turn, dtype=torch.bfloat16, device=device) for i in range(6)]
        wanted = [tensor.clone() for tensor in sent]
        held = [host.put(tensor) for tensor in sent]
        assert sum(one.tensor is not None for one in held) == LEAVING
        del sent
        for i in (5, 4, 2, 3, 1, 0) if turn else range(5, -1, -1):
            torch.testing.assert_close(held[i].take(), wanted[i], rtol=0, atol=0)
        torch.testing.assert_close(held[2].take(), wanted[2], rtol=0, atol=0)
        del held
        host.begin()
        assert len(host.pieces) == 6 * 2


@DEVICES
def test_the_next_one_is_sent_for_while_one_is_at_work(device: str) -> None:
    host = Host(torch.device(device))
    held = [host.put(torch.full((64,), float(i), device=device)) for i in range(6)]
    held[5].take()
    held[4].take()
    assert [one.tensor is not None for one in held] == [False, False, False, True, False, False]
    held[3].take()
    assert [one.tensor is not None for one in held] == [False, False, True, False, False, False]


@DEVICES
def test_a_pass_that_failed_leaves_nothing_behind(device: str) -> None:
    host = Host(torch.device(device))
    lost = [host.put(torch.zeros(64, device=device)) for _ in range(4)]
    lost[3].take()
    host.begin()
    assert all(one.tensor is None for one in lost)
    del lost
    held = host.put(torch.ones(64, device=device))
    assert held.before is None
    assert float(held.take().sum()) == 64


@pytest.mark.gpu
def test_a_busy_device_computes_the_same() -> None:
    """Copies beside products that keep the device busy and memory that is given out again at once."""
    torch.manual_seed(0)
    size, layers = 2048, 8
    weights = [torch.randn(size, size, device="cuda") / size**0.5 for _ in range(layers)]

    def run(host: Host | None) -> Tensor:
        x = torch.linspace(-1, 1, 8192 * size, device="cuda").view(8192, size).requires_grad_()
        if host is not None:
            host.begin()
        call = checkpoint if host is None else host.checkpointed(checkpoint)
        y = x
        for weight in weights:
            y = call(lambda h, w=weight: torch.tanh(h @ w), y, use_reentrant=False)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return gradient

    expected, host = run(None), Host(torch.device("cuda"))
    for _ in range(5):
        torch.testing.assert_close(run(host), expected, rtol=0, atol=0)


def test_a_checkpoint_keeps_its_input_in_the_host_s_memory() -> None:
    host = Host(torch.device("cpu"))
    put: list[torch.Size] = []
    x = torch.randn(5, 8, requires_grad=True)
    scale = torch.randn(5, 8, requires_grad=True)
    original = host.put
    host.put = lambda tensor: (put.append(tensor.shape), original(tensor))[1]  # type: ignore[method-assign, func-returns-value]
    call = host.checkpointed(partial(checkpoint, use_reentrant=False))
    call(lambda h, s: (h * s).tanh(), x, scale).sum().backward()
    assert put == [x.shape]
    expected = torch.autograd.grad((x * scale).tanh().sum(), (x, scale))
    assert x.grad is not None
    torch.testing.assert_close((x.grad, scale.grad), expected)
    with torch.no_grad():
        call(lambda h, s: h * s, x, scale)
    assert len(put) == 1
