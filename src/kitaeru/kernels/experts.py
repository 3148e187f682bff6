"""A mixture's experts with frozen weights in few bits: each token goes through the k experts its router chose.

    both = x_t W1_e^T       active = act(gate) * up       y_t = sum over its experts of  w_te * active W2_e^T

T tokens of width h; E experts of width f; W1 [E, 2f, h], gate above up, and W2 [E, h, f] are expanded for the time of a
product, one expert (or a few) at a time, forward and again backward. What is kept for the backward pass: x, which the
router reads too, gate and up of each of the S = T k pairs of a token and an expert, and the adapters' thin results. The
product with W2 is not: the gradient of w_te is <active, dy W2>, whose second factor the backward pass has anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitaeru.kernels.frozen import Stored, Weights, expand
from kitaeru.kernels.gated import Activation, Kept, gated, gated_backward
from kitaeru.kernels.rows import Rows
from kitaeru.plan.stored import EXPANDED_AT_ONCE_BYTES, NF4_BLOCK, NF4_SECOND_BLOCK


@dataclass(frozen=True)
class Stack:
    """E weights of shape (N, K) as they lie in memory; each tensor has E first.

    kind "int8": `data` int8 [E, N, K], `absmax` fp32 [E, N]. "nf4": `data` uint8 [E, N, K / 2]; `absmax` uint8 [E, P],
    of each 64 values, P a multiple of 256; `absmax_scale` fp32 [E, P / 256]; the rest as in `Stored`.
    """

    kind: Literal["int8", "nf4"]
    shape: tuple[int, int, int]
    data: Tensor
    absmax: Tensor
    code: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: float = 0.0

    def stored(self, first: int, count: int = 1) -> Stored:
        """`count` experts from `first` on as one weight (count N, K). Several only where none is padded."""
        _, n, k = self.shape
        rows = slice(first, first + count)
        if self.kind == "int8":
            return Stored("int8", (count * n, k), self.data[rows].view(-1, k), self.absmax[rows].reshape(-1))
        assert self.absmax_scale is not None
        absmax = self.absmax[rows].reshape(-1)[: count * n * k // NF4_BLOCK]
        return Stored(
            "nf4", (count * n, k), self.data[rows].reshape(-1), absmax, self.code, self.absmax_code,
            self.absmax_scale[rows].reshape(-1), self.absmax_offset,
        )  # fmt: skip

    def expanded(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """[count, N, K] of experts that follow each other."""
        _, n, k = self.shape
        whole = self.kind == "int8" or n * k // NF4_BLOCK % NF4_SECOND_BLOCK == 0
        parts = (self.stored(first, count),) if whole else tuple(self.stored(first + i) for i in range(count))
        return expand(Weights(parts), None, None, 0, dtype, transposed=False).view(count, n, k)


@dataclass(frozen=True)
class Adapter:
    """A LoRA on a stack, as PEFT keeps it: `a` [E r, K], and `b` [N, r E] with the expert as the fastest index."""

    a: Tensor
    b: Tensor
    scaling: float

    def thin(self, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [E, r, K] and B [E, N, r]."""
        a = self.a.detach().to(dtype).view(experts, -1, self.a.shape[1])
        return a, self.b.detach().to(dtype).view(len(self.b), -1, experts).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Routing:
    """Pairs of token and expert in the order of the experts: `slots` [S] are their places in [T, k] laid out flat.

    `ends` int32 [E] is where each expert's pairs end, and `bounds` [E + 1] the same on the host, from 0.
    """

    slots: Tensor
    ends: Tensor
    bounds: tuple[int, ...]
    k: int

    @property
    def tokens(self) -> Tensor:
        """The token of each pair."""
        return self.slots // self.k

    def back(self, pairs: Tensor) -> Tensor:
        """The sum over each token's pairs: [S, n] to [T, n]."""
        places = torch.empty_like(self.slots)
        places[self.slots] = torch.arange(len(self.slots), device=self.slots.device)
        return pairs[places].view(-1, self.k, pairs.shape[1]).sum(1)

    def busy(self) -> Iterator[tuple[int, slice]]:
        """The experts that have tokens, each with its pairs."""
        for expert in range(len(self.bounds) - 1):
            if self.bounds[expert] < self.bounds[expert + 1]:
                yield expert, slice(self.bounds[expert], self.bounds[expert + 1])


def route(index: Tensor, experts: int) -> Routing:
    """The order in which experts compute. `index` [T, k]. The host waits once, for how many tokens each expert has."""
    flat = index.reshape(-1)
    ends = torch.bincount(flat, minlength=experts).cumsum(0)
    return Routing(flat.argsort(stable=True), ends.int(), (0, *ends.tolist()), index.shape[1])


def experts_reference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    adapters: tuple[Adapter | None, Adapter | None] = (None, None),
) -> Tensor:
    """The definition, differentiable: whole weights W1 [E, 2f, h] and W2 [E, h, f], adapters added to them."""
    whole = []
    for stack, adapter in zip((gate_up, down), adapters, strict=True):
        if adapter is not None:
            a = adapter.a.view(len(stack), -1, stack.shape[2])
            b = adapter.b.view(stack.shape[1], -1, len(stack))
            stack = stack + adapter.scaling * torch.einsum("nre,erk->enk", b, a).to(stack.dtype)
        whole.append(stack)
    result = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, place = torch.where(index == expert)
        gate, up = F.linear(x[token], whole[0][expert]).chunk(2, -1)
        active = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
        y = F.linear(active, whole[1][expert]) * weights[token, place, None]
        result = result.index_add(0, token, y.to(x.dtype))
    return result


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Stack,
    down: Stack,
    activation: Activation,
    adapters: tuple[Adapter | None, Adapter | None] = (None, None),
) -> Tensor:
    """The same with packed weights: x [T, h], the router's `index` and `weights` [T, k] to [T, h]."""
    trained = [t for adapter in adapters if adapter is not None for t in (adapter.a, adapter.b)]
    result: Tensor = _Experts.apply(x, weights, index, (gate_up, down), activation, adapters, *trained)  # type: ignore[no-untyped-call]
    return result


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, stacks: Any, activation: Activation, adapters: Any, *_: Any
    ) -> Tensor:
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):  # kernels start where x is
            routing = route(index, stacks[0].shape[0])
            both, thin1 = _site(x[routing.tokens], stacks[0], adapters[0], routing)
            active = gated(both, activation, x.dtype, 0, x.dtype)[0].data
            y, thin2 = _site(active, stacks[1], adapters[1], routing)
            del active
            y.mul_(weights.reshape(-1)[routing.slots, None])
            result = routing.back(y)
        ctx.save_for_backward(x, weights, routing.slots, routing.ends, both, thin1, thin2)
        ctx.bounds, ctx.of = routing.bounds, (stacks, activation, adapters)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, slots, ends, both, thin1, thin2 = ctx.saved_tensors
        (gate_up, down), activation, (adapter1, adapter2) = ctx.of
        routing = Routing(slots, ends, ctx.bounds, weights.shape[1])
        tokens, by = routing.tokens, weights.reshape(-1)[slots, None]
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):  # kernels start where x is
            g = upstream[0][tokens]
            of_active, dthin2 = _site_backward(g, down, adapter2, routing)
            gate, up = both.chunk(2, 1)
            kept = Kept(Rows(gate, None, gate.shape[1]), Rows(up, None, up.shape[1]))
            of_both, active = gated_backward(of_active, kept, activation, x.dtype, 0)
            of_weights = of_active.mul_(active.data).sum(1, dtype=torch.float32)
            del of_active, kept, gate, up, both
            d_both = of_both.data.mul_(by)  # everything up to here was without the router's weights
            del of_both
            second: list[Tensor | None] = []
            if adapter2 is not None and dthin2 is not None:
                second = _gradients(active.data, thin2, dthin2.mul_(by), g.mul_(by), adapter2, routing)
            del active, g
            d_x, dthin1 = _site_backward(d_both, gate_up, adapter1, routing)
            first: list[Tensor | None] = []
            if adapter1 is not None and dthin1 is not None:
                first = _gradients(x[tokens], thin1, dthin1, d_both, adapter1, routing)
            del d_both
            d_weights = torch.empty_like(weights)
            d_weights.view(-1)[slots] = of_weights.to(weights.dtype)
            dx = routing.back(d_x) if ctx.needs_input_grad[0] else None
        return dx, d_weights, None, None, None, None, *first, *second


def _site(x: Tensor, stack: Stack, adapter: Adapter | None, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """x W_e^T with the adapter's part [S, N], and x A_e^T [S, r]."""
    y = _frozen(x, stack, routing, transposed=False)
    if adapter is None:
        return y, None
    a, b = adapter.thin(stack.shape[0], x.dtype)
    thin = _each(x, a, routing, transposed=False)
    return y.add_(_each(thin, b, routing, transposed=False), alpha=adapter.scaling), thin


def _site_backward(dy: Tensor, stack: Stack, adapter: Adapter | None, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """The gradient of x [S, K], and that of x A_e^T [S, r]."""
    dx = _frozen(dy, stack, routing, transposed=True)
    if adapter is None:
        return dx, None
    a, b = adapter.thin(stack.shape[0], dy.dtype)
    dthin = _each(dy, b, routing, transposed=True).mul_(adapter.scaling)
    return dx.add_(_each(dthin, a, routing, transposed=True)), dthin


def _gradients(
    x: Tensor, thin: Tensor, dthin: Tensor, dy: Tensor, adapter: Adapter, routing: Routing
) -> list[Tensor | None]:
    """The gradients of A [E r, K] and B [N, r E]; zero for experts without tokens."""
    count = len(routing.bounds) - 1
    of_a, of_b = torch.zeros_like(adapter.a), torch.zeros_like(adapter.b)
    a, b = of_a.view(count, -1, of_a.shape[1]), of_b.view(len(of_b), -1, count)
    for expert, rows in routing.busy():
        a[expert] = dthin[rows].T @ x[rows]
        b[:, :, expert] = (dy[rows].T @ thin[rows]).mul_(adapter.scaling)
    return [of_a, of_b]


def _frozen(x: Tensor, stack: Stack, routing: Routing, *, transposed: bool) -> Tensor:
    """x W_e^T [S, N], or transposed x W_e [S, K], with each weight there for the time of its product."""
    count, n, k = stack.shape
    out = x.new_empty(len(x), k if transposed else n)
    if not _grouped(x, count, k, n):
        for expert, rows in routing.busy():
            w = stack.expanded(expert, 1, x.dtype)[0]
            torch.mm(x[rows], w if transposed else w.T, out=out[rows])
        return out
    step = max(1, EXPANDED_AT_ONCE_BYTES // (n * k * x.element_size()))
    for first in range(0, count, step):
        last = min(count, first + step)
        rows = slice(routing.bounds[first], routing.bounds[last])
        if rows.start == rows.stop:
            continue
        w = stack.expanded(first, last - first, x.dtype)
        w = w if transposed else w.transpose(1, 2)
        out[rows] = torch._grouped_mm(x[rows], w, offs=routing.ends[first:last] - rows.start)
    return out


def _each(x: Tensor, w: Tensor, routing: Routing, *, transposed: bool) -> Tensor:
    """x w_e^T with w [E, N, K] in the numbers of x; transposed x w_e."""
    count, n, k = w.shape
    if _grouped(x, count, k, n):
        return torch._grouped_mm(x, w if transposed else w.transpose(1, 2), offs=routing.ends)
    out = x.new_empty(len(x), k if transposed else n)
    for expert, rows in routing.busy():
        torch.mm(x[rows], w[expert] if transposed else w[expert].T, out=out[rows])
    return out


# A grouped product expands experts without tokens too: not for few tokens. Before Hopper torch's is a loop.
GROUPED_FROM = 4


def _grouped(x: Tensor, experts: int, *widths: int) -> bool:
    """Whether torch's grouped product takes this: bf16 on Hopper or later, rows of whole 16 bytes."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or len(x) < GROUPED_FROM * experts:
        return False
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return aligned and hasattr(torch, "_grouped_mm") and torch.cuda.get_device_capability(x.device)[0] >= 9
