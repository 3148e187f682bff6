"""Frozen weights as they are stored, and their passing form for one matrix product.

A weight W [N, K] is stored in 16 or 32 bits, in 8 (INT8, a scale for each row) or in 4 (NF4, a scale for each 64
values, these in 8 bits again). A product wants it in the numbers of its input, with the summed dimension last: W for
the forward pass, W^T for the backward pass. `expand` writes that into a tensor that lives as long as the product. It
has a scale for each of its rows, and E further columns for an adapter (see kernels/rows.py). In INT8 its rows are
turned (kernels/turned.py), as those of the input are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kitaeru.kernels.rows import FP8_MOST, TINY, top, turns
from kitaeru.kernels.triton_or_none import tl, triton, use_triton
from kitaeru.kernels.turned import turn
from kitaeru.plan.stored import NF4_BLOCK, NF4_SECOND_BLOCK

if triton is not None:
    from kitaeru.kernels.rows import store_rounded
    from kitaeru.kernels.turned import turned


@dataclass(frozen=True)
class Stored:
    """A weight of shape (N, K) as it lies in memory.

    kind "16bit": `data` [N, K]. "int8": `data` int8 [N, K] and `absmax` fp32 [N], value = data * absmax / 127. "nf4":
    `data` uint8, two values a byte, the first in the high half, in the order of the rows; `code` fp32 [16]; `absmax` of
    each 64 values, either fp32 or uint8, which stands for absmax_code[absmax] * absmax_scale[of 256] + absmax_offset.
    """

    kind: Literal["16bit", "int8", "nf4"]
    shape: tuple[int, int]
    data: Tensor
    absmax: Tensor | None = None
    code: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_offset: float = 0.0

    def values(self) -> Tensor:
        """The weight in fp32 [N, K]; wider than that only if it is stored so."""
        if self.kind == "16bit":
            return self.data if self.data.dtype == torch.float64 else self.data.float()
        assert self.absmax is not None
        if self.kind == "int8":
            return self.data.float() * (self.absmax / 127)[:, None]
        assert self.code is not None
        byte = torch.arange(256, device=self.code.device)
        pairs = torch.stack([self.code[byte >> 4], self.code[byte & 15]], 1)
        numbers = pairs.index_select(0, self.data.reshape(-1).int()).view(-1, NF4_BLOCK)
        absmax = self.absmax.reshape(-1)
        if absmax.dtype == torch.uint8:
            assert self.absmax_code is not None
            assert self.absmax_scale is not None
            by = self.absmax_scale.repeat_interleave(NF4_SECOND_BLOCK)[: len(absmax)]
            absmax = self.absmax_code[absmax.long()] * by + self.absmax_offset
        return (numbers * absmax[:, None]).reshape(self.shape)


@dataclass(frozen=True)
class Scales:
    """Of a group of weights that share their input: a scale for each row of W [N] and of W^T [K]; None in 16 bits."""

    forward: Tensor | None
    backward: Tensor | None


def scales_of(weights: Sequence[Stored], dtype: torch.dtype) -> Scales:
    """Scales with which the largest value of every row (turned, for INT8) becomes the top of `dtype`.

    The weights are frozen: once.
    """
    largest = top(dtype)
    if not largest:
        return Scales(None, None)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for weight in weights:
        values = weight.values()
        for sizes, each in ((rows, values), (columns, values.T)):
            sizes.append((turn(each) if turns(dtype) else each).abs().amax(1))
    return Scales((torch.cat(rows) / largest).clamp_min(TINY), (torch.stack(columns).amax(0) / largest).clamp_min(TINY))


def expand_reference(
    weights: Sequence[Stored],
    scale: Tensor | None,
    adapter: Tensor,
    extra: int,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    """The definition. Weights (N_i, K) become [N, K + E], N the sum; transposed [K, N + E].

    `adapter`: [N, R], what an adapter's x A^T is multiplied by, or transposed [K, R].
    """
    whole = torch.cat([weight.values() for weight in weights])
    whole = whole.T if transposed else whole
    whole = turn(whole) if turns(dtype) else whole
    out = torch.zeros((whole.shape[0], whole.shape[1] + extra), dtype=dtype, device=adapter.device)
    by = torch.ones(len(whole), device=adapter.device) if scale is None else scale
    scaled = whole / by[:, None]
    out[:, : whole.shape[1]] = scaled.round() if dtype == torch.int8 else scaled
    if extra:
        write_adapter(adapter, scale, out, whole.shape[1], weight=True)
    return out


def adapter_columns(values: Tensor, extra: int, dtype: torch.dtype, *, weight: bool) -> Tensor:
    """[rows, R] as the E further columns: themselves in 16 bits; in FP8 high and low part on the weight's side, the
    high part twice on the other.
    """
    columns = torch.zeros((len(values), extra), dtype=dtype, device=values.device)
    rank = values.shape[1]
    if dtype != torch.float8_e4m3fn:
        columns[:, :rank] = values
        return columns
    wide = values.float().clamp(-FP8_MOST, FP8_MOST)
    high = ((wide.view(torch.int32) + 0x80000) & -0x100000).view(torch.float32)  # rounded to e4m3's 4 significant bits
    columns[:, : 2 * rank] = torch.cat([high, wide - high if weight else high], 1)
    return columns


def write_adapter(values: Tensor, scale: Tensor | None, out: Tensor, width: int, *, weight: bool) -> None:
    """Write values [rows, R], divided by the rows' scale, into the further columns of `out` [rows, width + E]."""
    extra = out.shape[1] - width
    if not use_triton(out):
        scaled = values if scale is None else values / scale[:, None]
        out[:, width:] = adapter_columns(scaled, extra, out.dtype, weight=weight)
        return
    rows, rank = values.shape
    _extend[(triton.cdiv(rows, 32),)](
        values, scale, out, values.stride(0), values.stride(1), out.stride(0), rows, width, rank, extra,
        SCALED=scale is not None, FP8=out.dtype == torch.float8_e4m3fn, WEIGHT=weight, ROWS=32,
        EXTRA=triton.next_power_of_2(extra), num_warps=4,
    )  # fmt: skip


def expand(
    weights: Sequence[Stored],
    scale: Tensor | None,
    adapter: Tensor,
    extra: int,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    """The same, one kernel for each weight and one for the adapter's columns."""
    first = weights[0].data
    if not use_triton(first):
        return expand_reference(weights, scale, adapter, extra, dtype, transposed=transposed)
    outputs, inputs = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    out = torch.empty((rows, columns + extra), dtype=dtype, device=first.device)
    done = 0
    for weight in weights:
        _expand_one(weight, scale, out, done, transposed)
        done += weight.shape[0]
    if extra:
        write_adapter(adapter, scale, out, columns, weight=True)
    return out


def _expand_one(weight: Stored, scale: Tensor | None, out: Tensor, done: int, transposed: bool) -> None:
    outputs, inputs = weight.shape
    nested = weight.absmax is not None and weight.absmax.dtype == torch.uint8
    rows = 128 if transposed or out.dtype == torch.int8 else 64
    _expand[(triton.cdiv(outputs, rows), inputs // NF4_BLOCK)](
        weight.data, weight.absmax, weight.code, weight.absmax_code, weight.absmax_scale, weight.absmax_offset,
        scale, out, out.stride(0), outputs, inputs, done,
        KIND={"16bit": 0, "int8": 1, "nf4": 2}[weight.kind], NESTED=nested, SCALED=scale is not None,
        INT8=out.dtype == torch.int8, TRANSPOSED=transposed, ROWS=rows, num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _expand(  # type: ignore[no-untyped-def]
        data, absmax, code, absmax_code, absmax_scale, absmax_offset, scale, out, out_stride, outputs, inputs, done,
        KIND: tl.constexpr, NESTED: tl.constexpr, SCALED: tl.constexpr, INT8: tl.constexpr,
        TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        # A tile of rows and one block of 64 columns: one absmax a row.
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < outputs
        first = tl.program_id(1) * 64
        column = first + tl.arange(0, 64)
        by = tl.full([ROWS], 1.0, tl.float32)
        if KIND == 2:
            which = row * (inputs // 64) + tl.program_id(1)
            if NESTED:
                number = tl.load(absmax + which, mask=inside, other=0).to(tl.int32)
                by = tl.load(absmax_code + number) * tl.load(absmax_scale + which // 256, mask=inside, other=0.0)
                by += absmax_offset
            else:
                by = tl.load(absmax + which, mask=inside, other=0.0)
        if KIND == 1:
            by = tl.load(absmax + row, mask=inside, other=0.0) * (1.0 / 127.0)
        if SCALED and not TRANSPOSED:
            by *= 1.0 / tl.load(scale + done + row, mask=inside, other=1.0)
        if KIND == 2:
            pair = tl.arange(0, 32)
            at = row[:, None] * (inputs // 2) + tl.program_id(1) * 32 + pair[None, :]
            packed = tl.load(data + at, mask=inside[:, None], other=0).to(tl.int32)
            high = tl.load(code + (packed >> 4)) * by[:, None]
            low = tl.load(code + (packed & 15)) * by[:, None]
            if SCALED and TRANSPOSED and not INT8:
                high *= (1.0 / tl.load(scale + first + 2 * pair))[None, :]
                low *= (1.0 / tl.load(scale + first + 2 * pair + 1))[None, :]
            values = tl.reshape(tl.join(high, low), (ROWS, 64))
        else:
            at = row[:, None] * inputs + column[None, :]
            values = tl.load(data + at, mask=inside[:, None], other=0).to(tl.float32) * by[:, None]
            if SCALED and TRANSPOSED and not INT8:
                values *= (1.0 / tl.load(scale + column))[None, :]
        if TRANSPOSED:
            values = tl.trans(values)
            pointer = out + column[:, None].to(tl.int64) * out_stride + done + row[None, :]
            mask = inside[None, :]
        else:
            pointer = out + (done + row[:, None]) * out_stride + column[None, :]
            mask = inside[:, None]
        if INT8:
            values = turned(values)
            if TRANSPOSED:
                values *= (1.0 / tl.load(scale + column))[:, None]
        store_rounded(pointer, values, mask, INT8)

    @triton.jit
    def _extend(  # type: ignore[no-untyped-def]
        values, scale, out, row_stride, rank_stride, out_stride, rows, width, rank, extra,
        SCALED: tl.constexpr, FP8: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, EXTRA: tl.constexpr,
    ):  # fmt: skip
        # The high part is taken by its bits: a round trip through fp8 registers has given wrong numbers (ptxas 12.8).
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = tl.arange(0, EXTRA)[None, :]
        parts: tl.constexpr = 2 if FP8 else 1
        inside = (row < rows) & (at < parts * rank)
        result = tl.load(values + row * row_stride + (at % rank) * rank_stride, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            result *= 1.0 / tl.load(scale + row, mask=row < rows, other=1.0)
        if FP8:
            result = tl.minimum(tl.maximum(result, -448.0), 448.0)
            bits = (result.to(tl.int32, bitcast=True) + 0x80000) & -0x100000
            high = bits.to(tl.float32, bitcast=True)
            if WEIGHT:
                result = tl.where(at >= rank, result - high, high)
            else:
                result = high
        mask = (row < rows) & (at < extra)
        tl.store(out + row * out_stride + width + at, result.to(out.dtype.element_ty), mask=mask)
