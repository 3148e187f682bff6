"""Frozen linear layers that read the same tensor, with their adapters, as one matrix product each way.

"qkv" and gate and up are such sites of several layers, the attention's and the MLP's output projections of one each.
Adapters are PEFT's modules; their A and B stay the parameters that are trained, saved and exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from kitaeru.i18n import tr
from kitaeru.kernels.adapter import gradients, project
from kitaeru.kernels.copies import Copy, Share, Shares, copy_adapters, empty_copy
from kitaeru.kernels.frozen import Scales, Stored, Weights, expand, scales_of, write_adapter
from kitaeru.kernels.product import product
from kitaeru.kernels.rows import Arithmetic, Rows, storage, turns
from kitaeru.kernels.turned import TURN
from kitaeru.plan.fused import extra_columns
from kitaeru.plan.stored import NF4_BLOCK

# Optimizer steps of this process: a fused optimizer changes weights without telling their version counters.
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def refresh() -> None:
    """Let every site copy its adapters when they are next asked for."""
    _count_step()


class UnfitError(Exception):
    """Why a module is left as it is, for people: the run goes on."""


@dataclass(frozen=True)
class Member:
    """One linear layer (N, K) of a site. `a` [r, K] and `b` [N, r] are trained; None: it has no adapter."""

    stored: Stored
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0


@dataclass
class Site:
    """Linear layers that share their input, in one arithmetic; in 16 bits where INT8 is wanted and a side is
    not a multiple of 64.

    `dtype`: of the rows it takes; `extra`: further columns of these, and of the gradients it is given; `outputs`:
    columns of its result; `parameters`: what is trained, A and B of each adapted member. All are worked out once.

    `holds`: expanded weights are held once they are made, 1 or 2 bytes a weight for each pass, instead of for one
    product; by default on a CPU, whose references expand slowly.
    """

    members: tuple[Member, ...]
    arithmetic: Arithmetic
    compute: torch.dtype
    holds: bool = False
    dtype: torch.dtype = field(init=False)
    extra: int = field(init=False)
    outputs: int = field(init=False)
    parameters: list[Tensor] = field(init=False)
    scales: Scales = field(init=False)
    bias: Tensor | None = field(init=False)
    weights: Weights = field(init=False)
    shares: Shares = field(init=False)
    _seen: tuple[int, ...] = ()
    _thin: tuple[Copy, Copy] | None = None
    _held: dict[bool, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = Weights(tuple(m.stored for m in self.members))
        self.outputs = self.weights.shape[0]
        self.dtype = storage(self.arithmetic, self.compute)
        if turns(self.dtype) and any(side % TURN for m in self.members for side in m.stored.shape):
            self.arithmetic, self.dtype = "16bit", self.compute
        self.scales = scales_of(self.weights, self.dtype)
        self.holds = self.holds or self.members[0].stored.data.device.type == "cpu"
        biases = [m.bias for m in self.members]
        whole = None
        if any(bias is not None for bias in biases):
            parts = [
                m.stored.data.new_zeros(m.stored.shape[0], dtype=self.compute) if m.bias is None else m.bias
                for m in self.members
            ]
            whole = torch.cat([part.to(self.compute) for part in parts])
        self.bias = whole
        shares, row, column = list[Share](), 0, 0
        for m in self.members:
            if m.a is not None and m.b is not None:
                shares.append(Share(row, len(m.a), column, len(m.b), m.scaling))
                row += len(m.a)
            column += m.stored.shape[0]
        self.shares = Shares(tuple(shares))
        self.extra = extra_columns(self.arithmetic, self.rank)
        self.parameters = [p for m in self.members if m.a is not None and m.b is not None for p in (m.a, m.b)]

    @property
    def rank(self) -> int:
        """The sum of the adapters' ranks."""
        return self.shares.rank

    def thin(self) -> tuple[Copy, Copy]:
        """All A, one below the other [R, K], and all B, each in its own rows, scaled and transposed [R, N]."""
        seen = (_steps, *[p._version for p in self.parameters])
        if self._thin is None:
            sizes = (self.weights.shape[1], self.outputs)
            device = self.parameters[0].device
            down, up = (empty_copy(self.rank, size, self.compute, self.dtype, device) for size in sizes)
            self._thin = (down, up)
        if seen != self._seen:
            with torch.no_grad():
                copy_adapters(self.shares, self.parameters, *self._thin)
            self._seen = seen
        return self._thin

    def forward(self, x: Rows) -> tuple[Tensor, Tensor | None]:
        """The result [T, N], and x A^T [T, R] for `gradients`. Writes the further columns of x."""
        if not self.rank:
            w = self._expanded(x.data, transposed=False)
            return self._biased(product(x, w, self.scales.forward, self.compute)), None
        down, up = self.thin()
        thin = project(x, down)
        w = self._expanded(up.wide.T, transposed=False)
        apart = None if self.extra else (thin, up.wide.T)
        return self._biased(product(x, w, self.scales.forward, self.compute, apart)), thin

    def backward(self, dy: Rows, *, needs_input: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of x [T, K] (if it is needed), and that of x A^T [T, R]. Writes the further columns of dy."""
        thin, wide = None, dy.data
        if self.rank:
            down, up = self.thin()
            thin, wide = project(dy, up), down.wide
        if not needs_input:
            return None, thin
        w = self._expanded(wide.T, transposed=True)
        apart = None if self.extra or thin is None else (thin, wide.T)
        return product(dy, w, self.scales.backward, self.compute, apart), thin

    def _expanded(self, adapter: Tensor, *, transposed: bool) -> Tensor:
        """The weights as the product of one pass reads them, the adapter's columns beside them."""
        scale = self.scales.backward if transposed else self.scales.forward
        held = self._held.get(transposed)
        if held is None:
            held = expand(self.weights, scale, adapter, self.extra, self.dtype, transposed=transposed)
            if self.holds:
                self._held[transposed] = held
        elif self.extra:
            write_adapter(adapter, scale, held, held.shape[1] - self.extra, weight=True)
        return held

    def gradients(self, x: Rows, thin: Tensor | None, dthin: Tensor | None, dy: Rows) -> list[Tensor]:
        """The gradients of `parameters`, fp32."""
        if thin is None or dthin is None:
            return []
        return [g for pair in gradients(x, thin, dthin, dy, self.shares) for g in pair]

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y.add_(self.bias)


def site_of(modules: Sequence[nn.Module], arithmetic: Arithmetic, compute: torch.dtype) -> Site:
    """The site that these linear layers make.

    Raises:
        UnfitError: one of them does something else than a frozen linear layer with a plain LoRA.
    """
    return Site(tuple(_member(module) for module in modules), arithmetic, compute)


def _member(module: Any) -> Member:
    if not isinstance(module, LoraLayer):
        return Member(*_base(module))
    names = module.active_adapters
    if len(names) != 1 or module.merged:
        raise UnfitError(tr("{count} adapters on one layer", count=len(names)))
    name = names[0]
    dropout = module.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        raise UnfitError(tr("dropout in the adapter"))
    if module.lora_variant or module.lora_bias.get(name):
        raise UnfitError(tr("an adapter that is not a plain LoRA"))
    a, b = module.lora_A[name], module.lora_B[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        raise UnfitError(tr("an adapter that is not a plain LoRA"))
    stored, bias = _base(module.get_base_layer())
    return Member(stored, bias, a.weight, b.weight, float(module.scaling[name]))


def _base(module: Any) -> tuple[Stored, Tensor | None]:
    kind = type(module).__name__
    weight, bias = module.weight, getattr(module, "bias", None)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise UnfitError(tr("a base weight that is trained"))
    shape = (module.out_features, module.in_features)
    if shape[1] % NF4_BLOCK or shape[0] % 16:
        raise UnfitError(tr("a weight of {rows} x {columns}", rows=shape[0], columns=shape[1]))
    if kind == "Linear" and type(module) is nn.Linear:
        return Stored("16bit", shape, weight.data), bias
    if kind == "Linear8bitLt":
        state = module.state
        data = weight.data if weight.data.dtype == torch.int8 else state.CB
        absmax = state.SCB if state.SCB is not None else getattr(weight, "SCB", None)
        if data is None or absmax is None:
            raise UnfitError(tr("an 8-bit weight that is not there yet"))
        return Stored("int8", shape, data, absmax.float()), bias
    state = getattr(weight, "quant_state", None)
    if kind != "Linear4bit" or state is None or state.quant_type != "nf4" or state.blocksize != NF4_BLOCK:
        raise UnfitError(tr("a base layer of type {kind}", kind=kind))
    if not state.nested:
        return Stored("nf4", shape, weight.data, state.absmax.float(), state.code.float()), bias
    inner = state.state2
    return (
        Stored(
            "nf4",
            shape,
            weight.data,
            state.absmax,
            state.code.float(),
            inner.code.float(),
            inner.absmax.float(),
            float(state.offset),
        ),
        bias,
    )
