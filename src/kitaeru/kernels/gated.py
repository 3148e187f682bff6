"""The gated activation of an MLP, act(gate) * up, with its result rounded for the next product.

both: [T, 2f], gate left and up right. act is SiLU or the tanh form of GELU. Backward needs `both`, in full or rounded
to 8 bits (`Kept`), and gives the gradient of `both` and, again, the activated product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitaeru.kernels.rows import Rows, empty_rows, put_rows, row_block, top
from kitaeru.kernels.triton_or_none import launch, tl, triton, use_triton

if triton is not None:
    from kitaeru.kernels.rows import most_of_16, store_rounded
    from kitaeru.kernels.turned import turned

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Kept:
    """What backward needs of gate and up: [T, f] each, in one dtype."""

    gate: Rows
    up: Rows


def gated_reference(
    both: Tensor, activation: Activation, dtype: torch.dtype, extra: int, keep: torch.dtype
) -> tuple[Rows, Kept]:
    """The definition: the product as Rows, and gate and up as they are kept."""
    gate, up = both.chunk(2, 1)
    product = ACTIVATIONS[activation](gate.float()) * up.float()
    rows = put_rows(product, empty_rows(len(product), product.shape[1], extra, dtype, both))
    return rows, _keep(both, keep)


def gated(both: Tensor, activation: Activation, dtype: torch.dtype, extra: int, keep: torch.dtype) -> tuple[Rows, Kept]:
    """The same in one pass (and a second one over what is in the cache). Kept in full, `both` itself is kept."""
    if not use_triton(both):
        return gated_reference(both, activation, dtype, extra, keep)
    tokens, width = len(both), both.shape[1] // 2
    rows = empty_rows(tokens, width, extra, dtype, both)
    kept = _keep(both, keep) if keep == both.dtype else _room(both, keep)
    launch(
        _gated, (tokens,),
        both, rows.data, rows.scale, kept.gate.data, kept.gate.scale, kept.up.scale, rows.data.stride(0), width,
        TOP=top(dtype), INT8=dtype == torch.int8, KEEP_TOP=top(keep), KEEP_INT8=keep == torch.int8,
        SILU=activation == "silu", **tile(width, backward=False, turns=rows.turned, caches=_caches(both.device)),
    )  # fmt: skip
    return rows, kept


def gated_backward_reference(
    upstream: Tensor, kept: Kept, activation: Activation, dtype: torch.dtype, extra: int
) -> tuple[Rows, Rows]:
    """The definition: the gradient of `both` [T, 2f] as Rows with E further columns, and the product [T, f] as
    Rows, not turned.
    """
    gate = kept.gate.values.float().detach().requires_grad_()
    with torch.enable_grad():
        active = ACTIVATIONS[activation](gate)
        (slope,) = torch.autograd.grad(active.sum(), gate)
    up, above = kept.up.values.float(), upstream.float()
    gradient = torch.cat([above * up * slope, above * active.detach()], 1)
    product = active.detach() * up
    return (
        put_rows(gradient, empty_rows(len(gradient), gradient.shape[1], extra, dtype, upstream)),
        put_rows(product, empty_rows(len(product), product.shape[1], 0, dtype, upstream, plain=True)),
    )


def gated_backward(
    upstream: Tensor, kept: Kept, activation: Activation, dtype: torch.dtype, extra: int
) -> tuple[Rows, Rows]:
    """The same in one pass (and a second one over what is in the cache)."""
    if not use_triton(upstream):
        return gated_backward_reference(upstream, kept, activation, dtype, extra)
    tokens, width = upstream.shape
    gradient = empty_rows(tokens, 2 * width, extra, dtype, upstream)
    product = empty_rows(tokens, width, 0, dtype, upstream, plain=True)
    launch(
        _gated_backward, (tokens,),
        upstream, kept.gate.data, kept.gate.scale, kept.up.data, kept.up.scale, kept.gate.data.stride(0),
        gradient.data, gradient.scale, product.data, product.scale, gradient.data.stride(0), width,
        SCALED=kept.gate.scale is not None, TOP=top(dtype), INT8=dtype == torch.int8, SILU=activation == "silu",
        **tile(width, backward=True, turns=gradient.turned, caches=_caches(upstream.device)),
    )  # fmt: skip
    return gradient, product


# Columns at a time, and for each thread, of the forward and of the backward kernel: the fastest of eight on an H100
# (benchmarks/row_kernels.py), for numbers that are not turned and for such that are.
TILES = {False: ((16384, 32), (8192, 16)), True: ((8192, 32), (2048, 16))}
# For such that are turned, where the cache holds few rows.
FEW_ROWS = (8192, 16)


def tile(width: int, *, backward: bool, turns: bool, caches: bool) -> dict[str, int]:
    """The second pass over a row is to find it in the cache: unless this `caches` the rows of all programs, few at a
    time, with many warps for each. One stage: loads that a product follows would otherwise go through shared memory.
    """
    most, each = TILES[turns][backward] if caches or not turns else FEW_ROWS
    block = min(most, row_block(width))
    if block < most:  # not tried with so many a thread
        each = 16
    return {"BLOCK": block, "num_warps": block // (32 * each), "num_stages": 1}


@cache
def _caches(device: torch.device) -> bool:
    """Whether the second cache holds several rows for each multiprocessor: 50 MB on an H100, 6 on an RTX A5000."""
    return bool(torch.cuda.get_device_properties(device).L2_cache_size > 32 << 20)


# The definitions.
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def _keep(both: Tensor, keep: torch.dtype) -> Kept:
    gate, up = both.chunk(2, 1)
    if keep == both.dtype:
        return Kept(Rows(gate, None, gate.shape[1]), Rows(up, None, up.shape[1]))
    room = _room(both, keep)
    return Kept(put_rows(gate, room.gate), put_rows(up, room.up))


def _room(both: Tensor, keep: torch.dtype) -> Kept:
    """Room for gate and up in one [T, 2f] tensor."""
    tokens, width = len(both), both.shape[1] // 2
    data = torch.empty(both.shape, dtype=keep, device=both.device)
    scales = torch.empty((2, tokens), dtype=torch.float32, device=both.device)
    return Kept(Rows(data[:, :width], scales[0], width), Rows(data[:, width:], scales[1], width))


if triton is not None:
    _K: tl.constexpr = tl.constexpr(math.sqrt(2 / math.pi))

    @triton.jit
    def _sigmoid(x):  # type: ignore[no-untyped-def]
        """1 / (1 + e^-x) in 5 instructions where the library's needs 12; 0 below -44."""
        d = 1 + tl.exp2(x * -1.4426950408889634)
        return tl.rsqrt(d * d)

    @triton.jit
    def _act_and_slope(gate, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
        if SILU:
            s = _sigmoid(gate)
            active = gate * s
            return active, s + active * (1 - s)
        inner = _K * (gate + 0.044715 * gate * gate * gate)
        t = 2 * _sigmoid(2 * inner) - 1
        slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * _K * (1 + 0.134145 * gate * gate)
        return 0.5 * gate * (1 + t), slope

    @triton.jit
    def _gated(  # type: ignore[no-untyped-def]
        both, rows, scale, kept, gate_scale, up_scale, rows_stride, width,
        TOP: tl.constexpr, INT8: tl.constexpr, KEEP_TOP: tl.constexpr, KEEP_INT8: tl.constexpr, SILU: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        both += row * 2 * width
        kept += row * 2 * width
        columns = tl.arange(0, BLOCK)
        factor, by_gate, by_up = 1.0, 1.0, 1.0
        if TOP > 0 or KEEP_TOP > 0:
            largest = tl.zeros([BLOCK // 16], tl.float32)
            largest_gate = tl.zeros([BLOCK // 16], tl.float32)
            largest_up = tl.zeros([BLOCK // 16], tl.float32)
            for start in range(0, width, BLOCK):
                at = start + columns
                gate = tl.load(both + at, mask=at < width, other=0.0).to(tl.float32)
                up = tl.load(both + width + at, mask=at < width, other=0.0).to(tl.float32)
                active, _ = _act_and_slope(gate, SILU)
                result = active * up
                if INT8:
                    result = turned(result)
                largest = tl.maximum(largest, most_of_16(result))
                largest_gate = tl.maximum(largest_gate, most_of_16(gate))
                largest_up = tl.maximum(largest_up, most_of_16(up))
            if TOP > 0:
                step = tl.maximum(tl.max(largest, 0) / TOP, 1e-12)
                tl.store(scale + row, step)
                factor = 1.0 / step
            if KEEP_TOP > 0:
                gate_step = tl.maximum(tl.max(largest_gate, 0) / KEEP_TOP, 1e-12)
                up_step = tl.maximum(tl.max(largest_up, 0) / KEEP_TOP, 1e-12)
                tl.store(gate_scale + row, gate_step)
                tl.store(up_scale + row, up_step)
                by_gate = 1.0 / gate_step
                by_up = 1.0 / up_step
        last = (width - 1) // BLOCK * BLOCK
        for start in range(0, width, BLOCK):  # backwards: what was read last is in the cache
            at = last - start + columns
            inside = at < width
            gate = tl.load(both + at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(both + width + at, mask=inside, other=0.0).to(tl.float32)
            active, _ = _act_and_slope(gate, SILU)
            result = active * up
            if INT8:
                result = turned(result)
            store_rounded(rows + row * rows_stride + at, result * factor, inside, INT8)
            if KEEP_TOP > 0:
                store_rounded(kept + at, gate * by_gate, inside, KEEP_INT8)
                store_rounded(kept + width + at, up * by_up, inside, KEEP_INT8)

    @triton.jit
    def _gated_backward(  # type: ignore[no-untyped-def]
        upstream, gates, gate_scale, ups, up_scale, kept_stride, gradient, gradient_scale, product, product_scale,
        gradient_stride, width,
        SCALED: tl.constexpr, TOP: tl.constexpr, INT8: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        upstream += row * width
        gates += row * kept_stride
        ups += row * kept_stride
        gradient += row * gradient_stride
        product += row * width
        columns = tl.arange(0, BLOCK)
        by_gate, by_up, factor, product_factor = 1.0, 1.0, 1.0, 1.0
        if SCALED:
            by_gate = tl.load(gate_scale + row)
            by_up = tl.load(up_scale + row)
        if TOP > 0:
            largest = tl.zeros([BLOCK // 16], tl.float32)
            largest_product = tl.zeros([BLOCK // 16], tl.float32)
            for start in range(0, width, BLOCK):
                at = start + columns
                gate = tl.load(gates + at, mask=at < width, other=0.0).to(tl.float32) * by_gate
                up = tl.load(ups + at, mask=at < width, other=0.0).to(tl.float32) * by_up
                above = tl.load(upstream + at, mask=at < width, other=0.0).to(tl.float32)
                active, slope = _act_and_slope(gate, SILU)
                of_gate, of_up = above * up * slope, above * active
                if INT8:
                    of_gate = turned(of_gate)
                    of_up = turned(of_up)
                largest = tl.maximum(largest, tl.maximum(most_of_16(of_gate), most_of_16(of_up)))
                largest_product = tl.maximum(largest_product, most_of_16(active * up))
            step = tl.maximum(tl.max(largest, 0) / TOP, 1e-12)
            product_step = tl.maximum(tl.max(largest_product, 0) / TOP, 1e-12)
            tl.store(gradient_scale + row, step)
            tl.store(product_scale + row, product_step)
            factor = 1.0 / step
            product_factor = 1.0 / product_step
        last = (width - 1) // BLOCK * BLOCK
        for start in range(0, width, BLOCK):  # backwards: what was read last is in the cache
            at = last - start + columns
            inside = at < width
            gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32) * by_gate
            up = tl.load(ups + at, mask=inside, other=0.0).to(tl.float32) * by_up
            above = tl.load(upstream + at, mask=inside, other=0.0).to(tl.float32)
            active, slope = _act_and_slope(gate, SILU)
            of_gate, of_up = above * up * slope, above * active
            if INT8:
                of_gate = turned(of_gate)
                of_up = turned(of_up)
            store_rounded(gradient + at, of_gate * factor, inside, INT8)
            store_rounded(gradient + width + at, of_up * factor, inside, INT8)
            store_rounded(product + at, active * up * product_factor, inside, INT8)
