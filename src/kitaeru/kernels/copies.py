"""Adapters as kernels read them: where each lies in a site, and copies of A and B beside what is trained.

P: [R, K], all A of a site, one below the other; or all B, each in its own rows, scaled and transposed. What multiplies
rows in 8 bits (kernels/rows.py) is read as two numbers in 8 bits for each, a number and what it leaves over: so the
tensor cores take the rows as they lie in memory, and P keeps about 8 (FP8) or 15 (INT8) significant bits. Where rows
lie turned, so does that copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kitaeru.kernels.frozen import padded, three
from kitaeru.kernels.rows import FP8_MOST, INT8_TOP, TINY, top, turns
from kitaeru.kernels.triton_or_none import cdiv, launch, tl, triton, use_triton
from kitaeru.kernels.turned import turn

# What the largest first digit of a row of P is.
DIGIT_TOP = {torch.float8_e4m3fn: FP8_MOST, torch.int8: INT8_TOP}


@dataclass(frozen=True)
class Share:
    """An adapter's place in a site: its `rank` rows of all A from `row` on, its `outputs` columns of all B, transposed,
    from `column` on, and the factor of its product.
    """

    row: int
    rank: int
    column: int
    outputs: int
    scaling: float


@dataclass(frozen=True)
class Shares:
    """The adapters of a site, three at most."""

    each: tuple[Share, ...]

    @cached_property
    def rank(self) -> int:
        """The sum of all ranks."""
        return sum(s.rank for s in self.each)

    @cached_property
    def largest(self) -> int:
        """The largest rank."""
        return max(s.rank for s in self.each)

    def tiles(self, size: int) -> int:
        """Programs of `size` columns each over all columns of B."""
        return sum([cdiv(s.outputs, size) for s in self.each])

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Rows, ranks, columns and outputs as kernels take them."""
        return tuple(v for name in ("row", "rank", "column", "outputs") for v in three(self.each, name))

    @cached_property
    def scalings(self) -> tuple[Any, ...]:
        """Likewise."""
        return three(self.each, "scaling")


@dataclass(frozen=True)
class Copy:
    """P as kernels read it. `wide` [R, K] in 16 bits (32 or 64 where the layer computes in these). For rows in 8 bits
    also `digits` [2, R, K] in 8 bits and `scale` fp32 [R]: P = scale * (first + second * `second_digit`).
    """

    wide: Tensor
    digits: Tensor | None = None
    scale: Tensor | None = None


def second_digit(dtype: torch.dtype) -> float:
    """What a second digit counts, of a first one."""
    return 1 / 254 if dtype == torch.int8 else 1.0


def empty_copy(rank: int, width: int, compute: torch.dtype, dtype: torch.dtype, device: torch.device) -> Copy:
    """Room for P [R, K] for rows of `dtype`, all 0. With digits where rows are in 8 bits, and kernels read them."""
    wide = torch.zeros((rank, width), dtype=compute, device=device)
    if not top(dtype) or not use_triton(wide):
        return Copy(wide)
    digits = torch.zeros((2, rank, width), dtype=torch.uint8, device=device).view(dtype)
    return Copy(wide, digits, torch.zeros(rank, dtype=torch.float32, device=device))


def digits_reference(p: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition of `Copy.digits` and `Copy.scale`."""
    values = turn(p.float()) if turns(dtype) else p.float()
    scale = (values.abs().amax(1) / DIGIT_TOP[dtype]).clamp_min(TINY)
    scaled = values / scale[:, None]
    if dtype == torch.int8:
        first = scaled.round()
        return torch.stack([first, ((scaled - first) * 254).round()]).to(dtype), scale
    first = scaled.to(dtype).float()
    return torch.stack([first, scaled - first]).to(dtype), scale


def copy_reference(shares: Shares, parameters: Sequence[Tensor], down: Copy, up: Copy) -> None:
    """The definition: all A of a site into `down`, and all B, each in its own rows, scaled and transposed, into `up`.
    `parameters`: A [r, K] and B [N, r] of each adapter.
    """
    for s, a, b in zip(shares.each, parameters[::2], parameters[1::2], strict=True):
        rows = slice(s.row, s.row + s.rank)
        down.wide[rows].copy_(a)
        torch.mul(b.T, s.scaling, out=up.wide[rows, s.column : s.column + s.outputs])
    for copy in (down, up):
        if copy.digits is not None and copy.scale is not None:
            digits, scale = digits_reference(copy.wide, copy.digits.dtype)
            copy.digits.copy_(digits)
            copy.scale.copy_(scale)


def copy_adapters(shares: Shares, parameters: Sequence[Tensor], down: Copy, up: Copy) -> None:
    """The same in one kernel; digits from what is trained and not from its copy in 16 bits."""
    if not use_triton(down.wide):
        copy_reference(shares, parameters, down, up)
        return
    dtype = down.wide.dtype if down.digits is None else down.digits.dtype
    downs, ups = ([p.contiguous() for p in parameters[side::2]] for side in (0, 1))
    launch(
        _copy, (shares.rank, 2),
        *padded(downs), *padded(ups), down.wide, up.wide, down.digits, up.digits, down.scale, up.scale,
        shares.rank, down.wide.shape[1], up.wide.shape[1], *shares.arguments, *shares.scalings,
        SHARES=len(shares.each), TOP=DIGIT_TOP.get(dtype, 0.0), INT8=dtype == torch.int8, BLOCK=1024, num_warps=4,
    )  # fmt: skip


if triton is not None:
    from kitaeru.kernels.frozen import high_part
    from kitaeru.kernels.neighbours import picked
    from kitaeru.kernels.rows import store_rounded
    from kitaeru.kernels.turned import turned

    @triton.jit
    def _copy(  # type: ignore[no-untyped-def]
        a, a_1, a_2, b, b_1, b_2, down, up, down_digits, up_digits, down_scale, up_scale, rank, inputs, outputs,
        row_0, row_1, row_2, rank_0, rank_1, rank_2, column_0, column_1, column_2, outputs_0, outputs_1, outputs_2,
        scaling_0, scaling_1, scaling_2,
        SHARES: tl.constexpr, TOP: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # A row of all A, or of all B, transposed: of that its own adapter's columns.
        row = tl.program_id(0).to(tl.int64)
        number = row * 0
        if SHARES > 1:
            number += (row >= row_1).to(tl.int64)
        if SHARES > 2:
            number += (row >= row_2).to(tl.int64)
        source = picked(number, a, a_1, a_2, SHARES)
        inner = row - picked(number, row_0, row_1, row_2, SHARES)
        step, width, factor, begin, across, wide, digits, scale = (
            1,
            inputs,
            1.0,
            0,
            inputs,
            down,
            down_digits,
            down_scale,
        )
        first = inner * inputs
        if tl.program_id(1) == 1:
            source = picked(number, b, b_1, b_2, SHARES)
            step = picked(number, rank_0, rank_1, rank_2, SHARES)
            width = picked(number, outputs_0, outputs_1, outputs_2, SHARES)
            factor = picked(number, scaling_0, scaling_1, scaling_2, SHARES)
            begin = picked(number, column_0, column_1, column_2, SHARES)
            across, wide, digits, scale = outputs, up, up_digits, up_scale
            first = inner
        at = tl.arange(0, BLOCK)
        place = row * across + begin + at
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            inside = start + at < width
            values = tl.load(source + first + (start + at) * step, mask=inside, other=0.0).to(tl.float32) * factor
            tl.store(wide + place + start, values.to(wide.dtype.element_ty), mask=inside)
            if TOP > 0:
                if INT8:
                    values = turned(values)
                most = tl.maximum(most, tl.abs(values))
        if TOP > 0:
            unit = tl.maximum(tl.max(most, 0) / TOP, 1e-12)
            tl.store(scale + row, unit)
            for start in range(0, width, BLOCK):
                inside = start + at < width
                values = tl.load(source + first + (start + at) * step, mask=inside, other=0.0).to(tl.float32) * factor
                if INT8:
                    values = turned(values) * (1.0 / unit)
                    high = (values + 12582912.0) - 12582912.0  # rounded: see `store_rounded`
                    low = (values - high) * 254.0
                else:
                    values *= 1.0 / unit
                    high = high_part(values)
                    low = values - high
                store_rounded(digits + place + start, high, inside, INT8)
                store_rounded(digits + rank * across + place + start, low, inside, INT8)
