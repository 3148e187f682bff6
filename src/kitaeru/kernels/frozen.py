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
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kitaeru.kernels.rows import FP8_MOST, TINY, top, turns
from kitaeru.kernels.triton_or_none import cdiv, launch, tl, triton, use_triton
from kitaeru.kernels.turned import turn
from kitaeru.plan.stored import NF4_BLOCK, NF4_SECOND_BLOCK

if triton is not None:
    from kitaeru.kernels.neighbours import located, picked
    from kitaeru.kernels.rows import store_rounded
    from kitaeru.kernels.turned import turned
    from kitaeru.kernels.words import crossed, looked_up, scaled_code


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

    @property
    def nested(self) -> bool:
        """Whether the absmax of its blocks are in 8 bits themselves."""
        return self.absmax is not None and self.absmax.dtype == torch.uint8

    @property
    def outputs(self) -> int:
        """N."""
        return self.shape[0]

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
        if self.nested:
            assert self.absmax_code is not None
            assert self.absmax_scale is not None
            by = self.absmax_scale.repeat_interleave(NF4_SECOND_BLOCK)[: len(absmax)]
            absmax = self.absmax_code[absmax.long()] * by + self.absmax_offset
        return (numbers * absmax[:, None]).reshape(self.shape)


def padded(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Up to three items, None for those that are not there: a kernel's arguments for each."""
    a, b, c = [*items] + [None] * (3 - len(items))
    return a, b, c


def three(items: Sequence[Any], name: str) -> tuple[Any, Any, Any]:
    """An attribute of up to three items, likewise."""
    return padded([getattr(item, name) for item in items])


@dataclass(frozen=True)
class _Group:
    """Neighbours that are stored alike, three at most, as the kernel takes them."""

    members: tuple[Stored, ...]

    @cached_property
    def outputs(self) -> int:
        return sum(m.shape[0] for m in self.members)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        names = ("data", "absmax", "absmax_scale", "absmax_offset", "outputs")
        first = self.members[0]
        return (*[value for name in names for value in three(self.members, name)], first.code, first.absmax_code)


@dataclass(frozen=True)
class Weights:
    """Weights (N_i, K) that share their input, one below the other: (N, K), N the sum."""

    each: tuple[Stored, ...]

    @cached_property
    def groups(self) -> tuple[_Group, ...]:
        """Neighbours that are stored alike, for one kernel each."""
        groups = list[_Group]()
        for weight in self.each:
            last = groups[-1].members if groups else ()
            if last and len(last) < 3 and (last[0].kind, last[0].nested) == (weight.kind, weight.nested):
                groups[-1] = _Group((*last, weight))
            else:
                groups.append(_Group((weight,)))
        return tuple(groups)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return sum(weight.shape[0] for weight in self.each), self.each[0].shape[1]


@dataclass(frozen=True)
class Scales:
    """Of a group of weights that share their input: a scale for each row of W [N] and of W^T [K]; None in 16 bits."""

    forward: Tensor | None
    backward: Tensor | None


def scales_of(weights: Weights, dtype: torch.dtype) -> Scales:
    """Scales with which the largest value of every row (turned, for INT8) becomes the top of `dtype`. In FP8 64 rows
    of W^T, one block of NF4, have one scale: a floating-point format loses nothing by it (see `_expand_words`).

    The weights are frozen: once.
    """
    largest = top(dtype)
    if not largest:
        return Scales(None, None)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for weight in weights.each:
        values = weight.values()
        for sizes, each in ((rows, values), (columns, values.T)):
            sizes.append((turn(each) if turns(dtype) else each).abs().amax(1))
    across = torch.stack(columns).amax(0)
    if dtype == torch.float8_e4m3fn:
        across = across.view(-1, NF4_BLOCK).amax(1).repeat_interleave(NF4_BLOCK)
    return Scales((torch.cat(rows) / largest).clamp_min(TINY), (across / largest).clamp_min(TINY))


def expand_reference(
    weights: Weights,
    scale: Tensor | None,
    adapter: Tensor | None,
    extra: int,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    """The definition. Weights (N_i, K) become [N, K + E], N the sum; transposed [K, N + E].

    `adapter`: [N, R], what an adapter's x A^T is multiplied by, or transposed [K, R]; without E nothing.
    """
    whole = torch.cat([weight.values() for weight in weights.each])
    whole = whole.T if transposed else whole
    whole = turn(whole) if turns(dtype) else whole
    out = torch.zeros((whole.shape[0], whole.shape[1] + extra), dtype=dtype, device=whole.device)
    by = torch.ones(len(whole), device=whole.device) if scale is None else scale
    scaled = whole / by[:, None]
    out[:, : whole.shape[1]] = scaled.round() if dtype == torch.int8 else scaled
    if extra:
        assert adapter is not None
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
    scaled = values if scale is None else values / scale[:, None]
    out[:, width:] = adapter_columns(scaled, out.shape[1] - width, out.dtype, weight=weight)


def expand(
    weights: Weights,
    scale: Tensor | None,
    adapter: Tensor | None,
    extra: int,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> Tensor:
    """The same in one pass, for each three weights that are stored alike."""
    first = weights.each[0].data
    if not use_triton(first):
        return expand_reference(weights, scale, adapter, extra, dtype, transposed=transposed)
    outputs, inputs = weights.shape
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    out = torch.empty((rows, columns + extra), dtype=dtype, device=first.device)
    fp8 = dtype == torch.float8_e4m3fn
    further: tuple[Any, ...] = (None, 0, 0, 0)
    if extra:
        assert adapter is not None
        further = (adapter, adapter.stride(0), adapter.stride(1), adapter.shape[1])
    done = 0
    for group in weights.groups:
        # A transposed weight's further columns lie beside all weights: the first group writes them.
        beside = extra > 0 and not (transposed and done)
        kind, nested = group.members[0].kind, group.members[0].nested
        at_once = 256 if fp8 and kind == "nf4" and transposed else 128
        tiles, blocks = sum([cdiv(m.outputs, at_once) for m in group.members]), inputs // NF4_BLOCK
        launch(
            _expand, (tiles + (beside and transposed), blocks + (beside and not transposed)),
            *group.arguments, scale, out, out.stride(0), inputs, done,
            *further, columns, extra,
            KIND={"16bit": 0, "int8": 1, "nf4": 2}[kind], NESTED=nested, SCALED=scale is not None,
            INT8=dtype == torch.int8, FP8=fp8, TRANSPOSED=transposed, WEIGHTS=len(group.members), ROWS=at_once,
            BESIDE=beside, num_warps=4,
        )  # fmt: skip
        done += group.outputs
    return out


if triton is not None:

    @triton.jit
    def _expand(  # type: ignore[no-untyped-def]
        data, data_1, data_2, absmax, absmax_1, absmax_2, absmax_scale, absmax_scale_1, absmax_scale_2,
        absmax_offset, absmax_offset_1, absmax_offset_2, outputs, outputs_1, outputs_2,
        code, absmax_code, scale, out, out_stride, inputs, done,
        adapter, adapter_row, adapter_rank, rank, width, extra,
        KIND: tl.constexpr, NESTED: tl.constexpr, SCALED: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr,
        TRANSPOSED: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr,
        BESIDE: tl.constexpr,
    ):  # fmt: skip
        # Each program: a tile of rows of one of the weights, and one block of 64 columns; or further columns.
        tile, block = tl.program_id(0), tl.program_id(1)
        number, tile = located(tile, outputs, outputs_1, outputs_2, ROWS, WEIGHTS)
        data = picked(number, data, data_1, data_2, WEIGHTS)
        if KIND > 0:
            absmax = picked(number, absmax, absmax_1, absmax_2, WEIGHTS)
        if NESTED:
            absmax_scale = picked(number, absmax_scale, absmax_scale_1, absmax_scale_2, WEIGHTS)
            absmax_offset = picked(number, absmax_offset, absmax_offset_1, absmax_offset_2, WEIGHTS)
        if WEIGHTS > 1:
            done += tl.where(number > 0, outputs, 0)
        if WEIGHTS > 2:
            done += tl.where(number > 1, outputs_1, 0)
        outputs = picked(number, outputs, outputs_1, outputs_2, WEIGHTS)
        if BESIDE:
            if TRANSPOSED:
                beside = tile * ROWS >= outputs
                row = block * 64 + tl.arange(0, 64)
                inside = row < inputs
            else:
                beside = block * 64 >= inputs
                row = done + tile * ROWS + tl.arange(0, ROWS)
                inside = row < done + outputs
            if beside:
                _write_beside(
                    adapter, scale, out, row, inside, adapter_row, adapter_rank, out_stride, width, rank, extra,
                    SCALED, FP8,
                )  # fmt: skip
            else:
                _expand_tile(
                    data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs,
                    inputs, done, tile, block, KIND, NESTED, SCALED, INT8, FP8, TRANSPOSED, ROWS,
                )  # fmt: skip
        else:
            _expand_tile(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs,
                inputs, done, tile, block, KIND, NESTED, SCALED, INT8, FP8, TRANSPOSED, ROWS,
            )  # fmt: skip

    @triton.jit
    def _expand_tile(  # type: ignore[no-untyped-def]
        data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs, inputs, done,
        tile, block,
        KIND: tl.constexpr, NESTED: tl.constexpr, SCALED: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr,
        TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        if KIND == 2 and FP8:
            _expand_words(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs, inputs,
                done, tile, block, NESTED, TRANSPOSED, ROWS,
            )  # fmt: skip
        else:
            _expand_numbers(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs, inputs,
                done, tile, block, KIND, NESTED, SCALED, INT8, TRANSPOSED, ROWS,
            )  # fmt: skip

    @triton.jit
    def _largest(absmax, absmax_scale, absmax_offset, absmax_code, which, inside, NESTED: tl.constexpr):  # type: ignore[no-untyped-def]
        """The absmax of some blocks of NF4."""
        if NESTED:
            number = tl.load(absmax + which, mask=inside, other=0).to(tl.int32)
            by = tl.load(absmax_code + number) * tl.load(absmax_scale + which // 256, mask=inside, other=0.0)
            by += absmax_offset
        else:
            by = tl.load(absmax + which, mask=inside, other=0.0)
        return by

    @triton.jit
    def _words_of(  # type: ignore[no-untyped-def]
        data, absmax, absmax_scale, absmax_offset, code, absmax_code, which, inside, scale, NESTED: tl.constexpr
    ):
        # Some blocks of NF4 as FP8: [blocks, 8] words of the first four values of each 8, and of the other four. A
        # block has one scale, so all it can hold are 16 numbers: these are rounded, and looked up.
        by = _largest(absmax, absmax_scale, absmax_offset, absmax_code, which, inside, NESTED) * (1.0 / scale)
        at = which[:, None] * 8 + tl.arange(0, 8)[None, :]
        packed = tl.load(data.to(tl.pointer_type(tl.int32)) + at, mask=inside[:, None], other=0)
        return looked_up(
            packed, scaled_code(code, 0, by)[:, None], scaled_code(code, 4, by)[:, None],
            scaled_code(code, 8, by)[:, None], scaled_code(code, 12, by)[:, None],
        )  # fmt: skip

    @triton.jit
    def _expand_words(  # type: ignore[no-untyped-def]
        data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs, inputs, done,
        tile, block, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        # NF4 to FP8, four numbers a word.
        word = out.to(tl.pointer_type(tl.int32))
        blocks = inputs // 64
        if TRANSPOSED:
            row = (tile * ROWS + 4 * tl.arange(0, ROWS // 4)).to(tl.int64)
            inside = row < outputs
            by = tl.load(scale + block * 64)
            which = row * blocks + block
            a, a_1 = _words_of(data, absmax, absmax_scale, absmax_offset, code, absmax_code, which, inside, by, NESTED)
            b, b_1 = _words_of(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, which + blocks, inside, by, NESTED
            )
            c, c_1 = _words_of(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, which + 2 * blocks, inside, by, NESTED
            )
            d, d_1 = _words_of(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, which + 3 * blocks, inside, by, NESTED
            )
            column = block * 64 + 8 * tl.arange(0, 8)
            step = out_stride // 4
            place = word + column[None, :].to(tl.int64) * step + (done + row[:, None]) // 4
            for half in tl.static_range(2):
                if half == 0:
                    e, f, g, h = crossed(a, b, c, d)
                else:
                    e, f, g, h = crossed(a_1, b_1, c_1, d_1)
                tl.store(place, e, mask=inside[:, None])
                tl.store(place + step, f, mask=inside[:, None])
                tl.store(place + 2 * step, g, mask=inside[:, None])
                tl.store(place + 3 * step, h, mask=inside[:, None])
                place += out_stride
        else:
            # As many programs as if each had ROWS rows of one block; it has ROWS blocks that lie side by side.
            which = (block * tl.cdiv(outputs, ROWS) + tile) * ROWS + tl.arange(0, ROWS)
            row = which // blocks
            inside = row < outputs
            by = tl.load(scale + done + row, mask=inside, other=1.0)
            first, second = _words_of(
                data, absmax, absmax_scale, absmax_offset, code, absmax_code, which.to(tl.int64), inside, by, NESTED
            )
            words = tl.reshape(tl.join(first, second), (ROWS, 16))
            place = word + (done + row).to(tl.int64) * (out_stride // 4) + (which - row * blocks) * 16
            tl.store(place[:, None] + tl.arange(0, 16)[None, :], words, mask=inside[:, None])

    @triton.jit
    def _expand_numbers(  # type: ignore[no-untyped-def]
        data, absmax, absmax_scale, absmax_offset, code, absmax_code, scale, out, out_stride, outputs, inputs, done,
        tile, block,
        KIND: tl.constexpr, NESTED: tl.constexpr, SCALED: tl.constexpr, INT8: tl.constexpr,
        TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        # One absmax a row.
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < outputs
        first = block * 64
        column = first + tl.arange(0, 64)
        by = tl.full([ROWS], 1.0, tl.float32)
        if KIND == 2:
            which = row * (inputs // 64) + block
            by = _largest(absmax, absmax_scale, absmax_offset, absmax_code, which, inside, NESTED)
        if KIND == 1:
            by = tl.load(absmax + row, mask=inside, other=0.0) * (1.0 / 127.0)
        if SCALED and not TRANSPOSED:
            by *= 1.0 / tl.load(scale + done + row, mask=inside, other=1.0)
        if KIND == 2:
            pair = tl.arange(0, 32)
            at = row[:, None] * (inputs // 2) + block * 32 + pair[None, :]
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
    def high_part(values):  # type: ignore[no-untyped-def]
        """What e4m3 can hold of fp32 values. By its bits: a round trip through fp8 registers has given wrong numbers
        (ptxas 12.8).
        """
        bits = tl.minimum(tl.maximum(values, -448.0), 448.0).to(tl.int32, bitcast=True)
        return ((bits + 0x80000) & -0x100000).to(tl.float32, bitcast=True)

    @triton.jit
    def _write_beside(  # type: ignore[no-untyped-def]
        values, scale, out, row, inside, row_stride, rank_stride, out_stride, width, rank, extra,
        SCALED: tl.constexpr, FP8: tl.constexpr,
    ):  # fmt: skip
        # `adapter_columns` of the weight's side, for some rows.
        row, inside = row.to(tl.int64)[:, None], inside[:, None]
        by = 1.0
        if SCALED:
            by = 1.0 / tl.load(scale + row, mask=inside, other=1.0)
        parts: tl.constexpr = 2 if FP8 else 1
        for start in range(0, extra, 16):
            at = start + tl.arange(0, 16)[None, :]
            there = inside & (at < parts * rank)
            result = tl.load(values + row * row_stride + (at % rank) * rank_stride, mask=there, other=0.0)
            result = result.to(tl.float32) * by
            if FP8:
                high = high_part(result)
                low = tl.minimum(tl.maximum(result, -448.0), 448.0) - high
                result = tl.where(at >= rank, low, high)
            tl.store(out + row * out_stride + width + at, result.to(out.dtype.element_ty), mask=inside)
