"""The thin products of an adapter: x P^T beside x, and the gradients of A and B.

x: Rows [T, K]; P: [R, K] in 16 bits (all A that read x, one below the other; on the way back all B, transposed). Where
x lies turned, the kernels read P turned, and what they give for A and B is turned back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitaeru.kernels.frozen import write_adapter
from kitaeru.kernels.rows import Rows
from kitaeru.kernels.triton_or_none import tl, triton, use_triton
from kitaeru.kernels.turned import turn

# Programs that share the sum over tokens, so that the whole device is busy; of rows wider than WIDE more, in smaller
# tiles (tried on an H100 with 8,192 tokens: 110 microseconds against 78 at 14,336 columns).
PROGRAMS, WIDE = 264, 8192


def project_reference(x: Rows, p: Tensor) -> Tensor:
    """The definition: x P^T [T, R] in the dtype of P; the further columns of x are filled with it."""
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    thin = (x.values.to(wide) @ p.T.to(wide)).to(p.dtype)
    if x.data.shape[1] > x.width:
        write_adapter(thin, x.scale, x.data, x.width, weight=False)
    return thin


def project(x: Rows, p: Tensor) -> Tensor:
    """The same in one pass over x."""
    if not use_triton(x.data):
        return project_reference(x, p)
    tokens, rank = len(x.data), len(p)
    out = torch.empty((tokens, rank), dtype=p.dtype, device=p.device)
    block = 64 if tokens >= 4096 else 16
    p = turn(p) if x.turned else p
    _project[(triton.cdiv(tokens, block),)](
        x.data, x.scale, p, out, x.data.stride(0), tokens, x.width, rank,
        SCALED=x.scale is not None, ROWS=block, COLUMNS=256, RANK=triton.next_power_of_2(max(rank, 16)),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if x.data.shape[1] > x.width:
        write_adapter(out, x.scale, x.data, x.width, weight=False)
    return out


def outer_reference(p: Tensor, x: Rows) -> Tensor:
    """The definition: p^T x, fp32 [R, K], from p [T, R] and x [T, K]."""
    values = x.values
    return p.to(values.dtype if values.dtype == torch.float64 else torch.float32).T @ values.to(
        values.dtype if values.dtype == torch.float64 else torch.float32
    )


def outer(p: Tensor, x: Rows) -> Tensor:
    """The same in one pass over x; parts of the sum over tokens are added in a fixed order."""
    if not use_triton(x.data):
        return outer_reference(p, x)
    tokens, rank = p.shape
    wide = x.width > WIDE
    columns, block = 128, 128 if x.scale is not None and not wide else 64
    across = triton.cdiv(x.width, columns)
    parts = max(1, min(triton.cdiv(PROGRAMS * (4 if wide else 1), across), triton.cdiv(tokens, 4 * block)))
    each = triton.cdiv(triton.cdiv(tokens, block), parts) * block
    out = torch.empty((parts, rank, x.width), dtype=torch.float32, device=p.device)
    _outer[(across, parts)](
        p, x.data, x.scale, out, p.stride(0), x.data.stride(0), tokens, x.width, rank, each,
        SCALED=x.scale is not None, ROWS=block, COLUMNS=columns, RANK=triton.next_power_of_2(max(rank, 16)),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    total = out[0] if parts == 1 else out.sum(0)
    return turn(total) if x.turned else total


if triton is not None:

    @triton.jit
    def _project(  # type: ignore[no-untyped-def]
        x, scale, p, out, x_stride, tokens, width, rank,
        SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = tl.arange(0, RANK)
        column = tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, RANK], tl.float32)
        for start in range(0, width, COLUMNS):
            k = start + column
            values = tl.load(x + row * x_stride + k[None, :], mask=(row < tokens) & (k[None, :] < width), other=0.0)
            factor = tl.load(
                p + at[:, None] * width + k[None, :], mask=(at[:, None] < rank) & (k[None, :] < width), other=0.0
            )
            total = tl.dot(values.to(p.dtype.element_ty), tl.trans(factor), total)
        if SCALED:
            total *= tl.load(scale + row, mask=row < tokens, other=0.0)
        at = at[None, :]
        tl.store(out + row * rank + at, total.to(out.dtype.element_ty), mask=(row < tokens) & (at < rank))

    @triton.jit
    def _outer(  # type: ignore[no-untyped-def]
        p, x, scale, out, p_stride, x_stride, tokens, width, rank, each,
        SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        at = tl.arange(0, RANK)
        first = tl.program_id(1) * each
        total = tl.zeros([RANK, COLUMNS], tl.float32)
        for start in range(first, min(first + each, tokens), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            inside = row < tokens
            left = tl.load(
                p + row[:, None] * p_stride + at[None, :], mask=inside[:, None] & (at[None, :] < rank), other=0
            )
            if SCALED:
                by = tl.load(scale + row, mask=inside, other=0)
                left = (left.to(tl.float32) * by[:, None]).to(p.dtype.element_ty)
            values = tl.load(
                x + row[:, None] * x_stride + column[None, :],
                mask=inside[:, None] & (column[None, :] < width),
                other=0.0,
            )
            total = tl.dot(tl.trans(left), values.to(p.dtype.element_ty), total)
        place = (tl.program_id(1) * rank + at[:, None]).to(tl.int64) * width + column[None, :]
        tl.store(out + place, total, mask=(at[:, None] < rank) & (column[None, :] < width))
