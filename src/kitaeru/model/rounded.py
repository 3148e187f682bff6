"""Trained linear layers of the decoder, two of their three products in 8 bits (full training).

    y = x W^T    dx = dy W    FP8 or INT8, a scale for each row of both sides (kernels.rows)
    dW = dy^T x               16 bits, as it always is: x and dy as they come

Weights, gradients and moments stay what they are. A weight is rounded for the time of one product, W in the forward
pass and W^T in the backward pass, wherever a strategy has put it by then. x stays in 16 bits for dW, once for all that
read it, and they round it once (docs/notes/0024).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kitaeru.kernels.product import product
from kitaeru.kernels.rows import Arithmetic, Rows, round_rows, storage
from kitaeru.kernels.turned import TURN
from kitaeru.model.layers import layers_of
from kitaeru.model.load import config_dict
from kitaeru.shape import ModelShape, Reads

# The names of `FusedLayer`'s sites, by what the linear layers of each read.
SITES: dict[Reads, str] = {"attention_in": "qkv", "attention_out": "out", "mlp_in": "both", "mlp_mid": "down"}
# Sides of a weight are multiples of this: FP8 products read 16 bytes at a time, INT8 turns so many neighbours.
SIDES: dict[Arithmetic, int] = {"16bit": 1, "fp8": 16, "int8": TURN}


@dataclass
class RoundedSite:
    """Trained linear layers that read the same tensor; in 16 bits if a side of one has an odd number for 8. `compute`:
    the width of what goes in and comes out.
    """

    modules: tuple[nn.Linear, ...]
    arithmetic: Arithmetic
    compute: torch.dtype
    _read: tuple[weakref.ref[Tensor], Tensor, Rows, int] | None = None

    def __post_init__(self) -> None:
        sides = [side for module in self.modules for side in (module.in_features, module.out_features)]
        if any(side % SIDES[self.arithmetic] for side in sides):
            self.arithmetic = "16bit"

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        """The result [..., N] of one of the linear layers for x [..., K]."""
        read, rows = self._rounded(x)
        y: Tensor = _Linear.apply(read, module.weight, rows, self)  # type: ignore[no-untyped-call]
        return y if module.bias is None else y + module.bias.to(y.dtype)

    def _rounded(self, x: Tensor) -> tuple[Tensor, Rows]:
        """x in the width of the products, and its rows in 8 bits: made for the first reader, let go of by the last."""
        known, self._read = self._read, None
        if known is not None and known[0]() is x:
            _, read, rows, left = known
        else:
            read, left = x.to(self.compute), len(self.modules)
            with torch.autocast(x.device.type, enabled=False):
                rows = self.rounded(_flat(read.detach()))
        if left > 1:
            self._read = (weakref.ref(x), read, rows, left - 1)
        return read, rows

    def rounded(self, values: Tensor) -> Rows:
        """Values [T, K] in 8 bits."""
        return round_rows(values, storage(self.arithmetic, self.compute))


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).contiguous()


def _turned_over(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W^T [K, N] of its own, cast on the way."""
    return torch.empty(weight.shape[::-1], dtype=dtype, device=weight.device).copy_(weight.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Rows, site: RoundedSite) -> Tensor:
        ctx.site = site
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            w = site.rounded(weight)
            return product(rows, w.data, w.scale, site.compute).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        site: RoundedSite = ctx.site
        dy, dx, dw = _flat(upstream[0]), None, None
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                rows, w = site.rounded(dy), site.rounded(_turned_over(weight, site.compute))
                dx = product(rows, w.data, w.scale, site.compute).view(x.shape)
                del rows, w
            if ctx.needs_input_grad[1]:
                dw = (dy.t() @ _flat(x)).to(weight.dtype)
        return dx, dw, None, None


@dataclass
class RoundedLayer:
    """The sites of one decoder layer by name; without `on` its linear layers compute as they did."""

    sites: dict[str, RoundedSite]
    on: bool = True

    @property
    def in_8_bits(self) -> bool:
        """Whether any of its products are computed in 8 bits."""
        return any(site.arithmetic != "16bit" for site in self.sites.values())

    def widen(self, site: str) -> None:
        """Compute one of "qkv", "out", "both" and "down" in 16 bits from now on."""
        if site in self.sites:
            self.sites[site].arithmetic = "16bit"


def round_products(model: PreTrainedModel, arithmetic: Arithmetic, compute: torch.dtype) -> tuple[RoundedLayer, ...]:
    """Let the trained linear layers of the decoder's layers compute in 8 bits; none if there are none that are known.

    Only modules that are torch's own `nn.Linear` are taken, on their instances: what they compute is known. Each is
    asked for its weight when it is called, since a strategy may put it there for the time of a layer.
    """
    found = layers_of(model)
    names = {linear.name: SITES[linear.reads] for linear in ModelShape.from_config(config_dict(model.config)).linears()}
    layers = []
    for layer in found[1] if found else ():
        members: dict[str, list[nn.Linear]] = {}
        for name, module in _linears(layer):
            if name in names:
                members.setdefault(names[name], []).append(module)
        sites = {name: RoundedSite(tuple(each), arithmetic, compute) for name, each in members.items()}
        layers.append(RoundedLayer(sites))
        for site in sites.values():
            for module in site.modules:
                _install(layers[-1], site, module)
    return tuple(layer for layer in layers if layer.in_8_bits)


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in layer.named_modules():
        if type(module) is nn.Linear and module.weight.requires_grad:
            yield path.rpartition(".")[2], module


def _install(layer: RoundedLayer, site: RoundedSite, module: nn.Linear) -> None:
    def forward(x: Tensor) -> Tensor:
        if not layer.on or site.arithmetic == "16bit":
            return F.linear(x, module.weight, module.bias)
        return site(module, x)

    module.__dict__["forward"] = forward
