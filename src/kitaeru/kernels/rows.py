"""Matrices of activations, a row for each token, in the numbers that the next matrix product takes.

`Rows` is [T, K] in 16 or 32 bits, FP8 (e4m3) or INT8; the 8-bit ones have one fp32 scale for each row. It has room for
E further columns on the right: what an adapter adds to a product `x W^T` is a product too, `(x A^T) B^T`, so with
`x A^T` written beside x and B beside W one matrix product gives the sum. In FP8 B is written as a high and a low part,
each beside a copy of `x A^T`: what is trained keeps about 8 significant bits, so that small updates are seen.

INT8 rows are turned before they are rounded (kernels/turned.py): what reads them reads `turn(x)`.

FP8 scales leave a factor of 4 below the largest number that e4m3 holds (a floating-point format loses nothing by it),
which is the room that the adapter's columns need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kitaeru.kernels.triton_or_none import launch, power_of_two, tl, triton, use_triton
from kitaeru.kernels.turned import turn

if triton is not None:
    from kitaeru.kernels.turned import turned

Arithmetic = Literal["16bit", "fp8", "int8"]
FP8_MOST = 448.0
FP8_TOP = 112.0
INT8_TOP = 127.0
TINY = 1e-12


@dataclass(frozen=True)
class Rows:
    """`data` [T, K + E], `scale` fp32 [T] for 8-bit data (value = data * scale), K, and whether they lie turned."""

    data: Tensor
    scale: Tensor | None
    width: int
    turned: bool = False

    @property
    def values(self) -> Tensor:
        """The first K columns, turned back, in fp32 or wider for 8-bit data, as they are otherwise."""
        own = self.data[:, : self.width]
        wide = own if self.scale is None else own.float() * self.scale[:, None]
        return turn(wide) if self.turned else wide

    def part(self, rows: slice) -> Rows:
        """Some of the rows, in the same memory."""
        return replace(self, data=self.data[rows], scale=None if self.scale is None else self.scale[rows])


def storage(arithmetic: Arithmetic, compute: torch.dtype) -> torch.dtype:
    """The dtype of `Rows.data`."""
    return {"16bit": compute, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[arithmetic]


def top(dtype: torch.dtype) -> float:
    """What the largest number of a row becomes; 0 for data without a scale."""
    return {torch.float8_e4m3fn: FP8_TOP, torch.int8: INT8_TOP}.get(dtype, 0.0)


def turns(dtype: torch.dtype) -> bool:
    """Whether what products read in this dtype is turned: FP8 gains nothing by it."""
    return dtype == torch.int8


def row_block(width: int) -> int:
    """Columns that a kernel holds which holds a whole row: a power of two, and what one warp turns at least."""
    return max(512, power_of_two(width))


def row_warps(block: int) -> int:
    """Warps for a kernel that holds a whole row: 16 numbers a thread, 32 from 8,192 columns on."""
    return block // 512 if block <= 4096 else min(16, block // 1024)


def empty_rows(tokens: int, width: int, extra: int, dtype: torch.dtype, like: Tensor, *, plain: bool = False) -> Rows:
    """Rows to be filled, on the device of `like`; `plain`: not turned, for what no product reads."""
    data = torch.empty((tokens, width + extra), dtype=dtype, device=like.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=like.device) if top(dtype) else None
    return Rows(data, scale, width, turns(dtype) and not plain)


def put_rows(values: Tensor, rows: Rows) -> Rows:
    """Write values [T, K] into `rows`, rounded to nearest; the reference for every kernel that ends in 8 bits."""
    if rows.scale is None:
        rows.data[:, : rows.width] = values
        return rows
    largest = top(rows.data.dtype)
    values = turn(values.float()) if rows.turned else values
    scale = (values.float().abs().amax(1) / largest).clamp_min(TINY)
    scaled = values.float() / scale[:, None]
    rows.data[:, : rows.width] = scaled.round() if rows.data.dtype == torch.int8 else scaled
    rows.scale.copy_(scale)
    return rows


def round_rows(values: Tensor, dtype: torch.dtype, extra: int = 0) -> Rows:
    """Values [T, K] as `Rows` of a dtype, with E further columns that are not written; K % 64 == 0 for INT8."""
    rows = empty_rows(len(values), values.shape[1], extra, dtype, values)
    if not use_triton(values):
        return put_rows(values, rows)
    block = row_block(rows.width)
    launch(
        _round, (len(values),),
        values, rows.data, rows.scale, values.stride(0), rows.data.stride(0), rows.width,
        TOP=top(dtype), INT8=dtype == torch.int8, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return rows


if triton is not None:

    @triton.jit
    def most_of_16(values):  # type: ignore[no-untyped-def]
        """The largest size among each 16 neighbours, which one thread holds: [N] to [N / 16]."""
        return tl.max(tl.reshape(tl.abs(values), (values.numel // 16, 16)), 1)

    @triton.jit
    def store_rounded(pointer, values, mask, INT8: tl.constexpr):  # type: ignore[no-untyped-def]
        """Store fp32 values in the pointer's dtype, INT8 rounded half to even as torch does."""
        if INT8:
            # 1.5 * 2**23: adding it leaves no room for a fraction, so the sum's lowest bits are the rounded integer.
            values = (values + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)

    @triton.jit
    def _round(x, y, scale, x_stride, y_stride, width, TOP: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        x += row * x_stride
        y += row * y_stride
        at = tl.arange(0, BLOCK)
        values = tl.load(x + at, mask=at < width, other=0)
        if INT8:
            values = turned(values)
        values = values.to(tl.float32)
        if TOP > 0:
            step = tl.maximum(tl.max(tl.abs(values), 0) / TOP, 1e-12)
            tl.store(scale + row, step)
            values *= 1.0 / step
        store_rounded(y + at, values, at < width, INT8)
