"""Packed experts against the same sums with whole weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kitaeru.kernels import experts as kernels
from kitaeru.kernels.experts import Adapter, Stack, experts, experts_reference, route
from kitaeru.model.experts import PackedExperts, fill

E, K, H = 4, 2, 64


def packed(bits: str, f: int, activation: str = "silu") -> PackedExperts:
    torch.manual_seed(0)
    module = PackedExperts(E, (f, H), activation, bits, torch.float32)  # type: ignore[arg-type]
    for name, shape in module.shapes.items():
        fill(module, name, torch.randn(shape) * shape[2] ** -0.5)
    return module


def inputs(tokens: int, experts_used: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """x, the router's choice (two different experts a token) and its weights."""
    torch.manual_seed(1)
    x = torch.randn(tokens, H).requires_grad_()
    index = torch.rand(tokens, experts_used).argsort(1)[:, :K]
    return x, index, torch.rand(tokens, K).requires_grad_()


def adapters(f: int, r: int) -> tuple[Adapter, Adapter]:
    def one(n: int, k: int, scaling: float) -> Adapter:
        a, b = torch.randn(E * r, k) * k**-0.5, torch.randn(n, r * E) * 0.1
        return Adapter(a.requires_grad_(), b.requires_grad_(), scaling)

    torch.manual_seed(2)
    return one(2 * f, H, 2.0), one(H, f, 0.5)


# f = 64: 64 x 64 weights, whose 64 scales are padded to 256; f = 512: runs of experts are expanded as one.
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize(
    ("bits", "f", "activation"), [("nf4", 64, "silu"), ("nf4", 512, "gelu_tanh"), ("int8", 64, "silu")]
)
def test_outputs_and_gradients(bits: str, f: int, activation: str, adapted: bool) -> None:
    module, both = packed(bits, f, activation), adapters(f, 4) if adapted else (None, None)
    x, index, weights = inputs(37)
    whole = [module.whole(name) for name in module.shapes]
    leaves = [x, weights, *(t for a in both if a is not None for t in (a.a, a.b))]
    upstream = torch.randn(37, H)
    found = []
    for run in (
        lambda: experts(
            x, index, weights, module.stack("gate_up_proj"), module.stack("down_proj"), module.activation, both
        ),
        lambda: experts_reference(x, index, weights, whole[0], whole[1], module.activation, both),
    ):
        y = run()
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_experts_without_tokens_are_not_expanded_and_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    module, both = packed("nf4", 64), adapters(64, 4)
    x, index, weights = inputs(11, experts_used=2)
    seen: list[int] = []
    original = Stack.expanded

    def watch(self: Stack, first: int, count: int, dtype: torch.dtype) -> Tensor:
        seen.extend(range(first, first + count))
        return original(self, first, count, dtype)

    monkeypatch.setattr(Stack, "expanded", watch)
    y = module(x, index, weights)
    assert sorted(seen) == [0, 0, 1, 1]  # two stacks
    seen.clear()
    y.sum().backward()
    assert sorted(seen) == [0, 0, 1, 1]
    y = experts(x, index, weights, module.stack("gate_up_proj"), module.stack("down_proj"), "silu", both)
    (of_a,) = torch.autograd.grad(y.sum(), both[0].a)
    assert of_a.view(E, -1)[:2].any(1).all()
    assert not of_a.view(E, -1)[2:].any()


def test_the_grouped_product_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on Hopper, with torch's own grouped product, here on the CPU."""
    module, both = packed("nf4", 512), adapters(512, 8)
    x, index, weights = inputs(40, experts_used=3)
    x16, upstream = x.detach().bfloat16().requires_grad_(), torch.randn(40, H).bfloat16()
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(kernels, "_grouped", lambda *_, grouped=grouped: grouped)
        monkeypatch.setattr(kernels, "EXPANDED_AT_ONCE_BYTES", 3 * 2 * 1024 * 64)  # three at a time, then one
        y = experts(x16, index, weights, module.stack("gate_up_proj"), module.stack("down_proj"), "silu", both)
        found.append([y, *torch.autograd.grad(y, [x16, weights, both[0].a, both[1].b], upstream)])
    for one, other in zip(*found, strict=True):
        assert (one - other).float().norm() <= 0.01 * other.float().norm()


def test_routing_is_in_the_order_of_experts_and_back() -> None:
    index = torch.tensor([[2, 0], [2, 3], [0, 2]])
    routing = route(index, 4)
    assert routing.bounds == (0, 2, 2, 5, 6)
    assert routing.slots.tolist() == [1, 4, 0, 2, 5, 3]
    assert routing.tokens.tolist() == [0, 2, 0, 1, 2, 1]
    assert [(e, r.start, r.stop) for e, r in routing.busy()] == [(0, 0, 2), (2, 2, 5), (3, 5, 6)]
    pairs = index.reshape(-1)[routing.slots, None].double()
    assert routing.back(pairs).reshape(-1).tolist() == [2, 5, 2]
