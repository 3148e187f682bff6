"""The thin products of an adapter: x P^T beside x, and the gradients of A and B.

x: Rows [T, K]; P: [R, K], as `kernels.copies` has it: all A that read x, one below the other; on the way back all B,
transposed. Where x lies turned, what the kernels give for A and B is turned back.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from kitaeru.kernels.copies import Copy, Share, Shares
from kitaeru.kernels.frozen import write_adapter
from kitaeru.kernels.rows import Rows
from kitaeru.kernels.triton_or_none import cdiv, launch, power_of_two, tl, triton, use_triton

# Programs that share a sum, over tokens for the gradients and over columns for x P^T, so that the whole device is busy:
# a GPU that has little to read for each of its processors waits for memory.
PROGRAMS = 264
# Columns of a program that sums over tokens, and of one that adds such sums up.
TILE, FEW = 256, 64
# Row blocks whose programs can count who is done, of x P^T; with more there is enough to do for each.
COUNTERS = 4096


def project_reference(x: Rows, p: Copy) -> Tensor:
    """The definition: x P^T [T, R] in the dtype of the wide P; the further columns of x are filled with it."""
    wide = p.wide.dtype if p.wide.dtype == torch.float64 else torch.float32
    thin = (x.values.to(wide) @ p.wide.T.to(wide)).to(p.wide.dtype)
    if x.data.shape[1] > x.width:
        write_adapter(thin, x.scale, x.data, x.width, weight=False)
    return thin


def project(x: Rows, p: Copy) -> Tensor:
    """The same in one pass over x."""
    if not use_triton(x.data):
        return project_reference(x, p)
    wide, eight = p.wide, x.scale is not None
    tokens, rank, extra = len(x.data), len(wide), x.data.shape[1] - x.width
    out = torch.empty((tokens, rank), dtype=wide.dtype, device=wide.device)
    block, columns = 64 if tokens >= 4096 else 16, 128
    blocks, padded = cdiv(tokens, block), power_of_two(max(rank, 16))
    parts = 1 if blocks > COUNTERS else max(1, min(PROGRAMS // blocks, x.width // (4 * columns)))
    each = cdiv(cdiv(x.width, columns), parts) * columns
    parts = cdiv(x.width, each)
    sums = torch.empty((parts, tokens, padded), dtype=torch.float32, device=wide.device) if parts > 1 else None
    launch(
        _project, (blocks, parts),
        x.data, x.scale, p.digits if eight else wide, p.scale, out, sums, _counters(wide.device), x.data.stride(0),
        tokens, x.width, rank, extra, each, parts,
        EIGHT=eight, FP8=x.data.dtype == torch.float8_e4m3fn, SPLIT=parts > 1, ROWS=block, COLUMNS=columns, RANK=padded,
        EXTRA=power_of_two(extra) if extra else 0, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@cache
def _counters(device: torch.device) -> Tensor:
    """How many programs of each block of rows are done: 0 between kernels."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def gradients_reference(x: Rows, thin: Tensor, dthin: Tensor, dy: Rows, shares: Shares) -> list[tuple[Tensor, Tensor]]:
    """The definition. Of each adapter's A [r, K] and B [N, r], fp32: thin = x A^T and its gradient dthin are [T, R] for
    all adapters side by side, dy [T, N] is the gradient of the site's result.
    """
    result = []
    inputs, upstream = x.values, dy.values
    wide = torch.float64 if upstream.dtype == torch.float64 else torch.float32
    for s in shares.each:
        own = slice(s.row, s.row + s.rank)
        of_a = dthin[:, own].to(wide).T @ inputs.to(wide)
        of_b = upstream[:, s.column : s.column + s.outputs].to(wide).T @ thin[:, own].to(wide)
        result.append((of_a, of_b * s.scaling))
    return result


def gradients(x: Rows, thin: Tensor, dthin: Tensor, dy: Rows, shares: Shares) -> list[tuple[Tensor, Tensor]]:
    """The same, for three adapters at most in one pass over x and one over dy; parts of the sums over tokens are added
    in a fixed order.
    """
    if not use_triton(dy.data):
        return gradients_reference(x, thin, dthin, dy, shares)
    width, rank = x.width, shares.rank
    of_a = _outer_parts(dthin, x, _whole(rank, width))
    of_b = _outer_parts(thin, dy, shares)
    sizes = [rank * width, *[s.outputs * s.rank for s in shares.each]]
    whole = torch.empty(sum(sizes), dtype=torch.float32, device=thin.device)
    launch(
        _add_up, (cdiv(width, FEW) + shares.tiles(FEW), cdiv(rank, 16)),
        of_a, of_b, whole, of_a.shape[0], of_b.shape[0], rank, width, of_b.shape[1], dy.width,
        *shares.arguments[3:], *shares.scalings,
        TURNED_A=x.turned, TURNED_B=dy.turned, SHARES=len(shares.each), COLUMNS=FEW, ROWS=16, num_warps=4,
    )  # fmt: skip
    first, *rest = whole.split(sizes)
    downs = first.view(rank, width).split([s.rank for s in shares.each])
    return [(down, up.view(-1, s.rank)) for s, down, up in zip(shares.each, downs, rest, strict=True)]


@lru_cache(maxsize=64)
def _whole(rank: int, width: int) -> Shares:
    """All columns at once, for A."""
    return Shares((Share(0, rank, 0, width, 1.0),))


def _outer_parts(p: Tensor, x: Rows, shares: Shares) -> Tensor:
    """p^T x [parts, r, K], r the largest rank: of each share's columns of x with its own columns of p, summed over some
    of the tokens each; turned as x is.
    """
    tokens, tiles, eight, block = p.shape[0], shares.tiles(TILE), x.scale is not None, 64
    parts = max(1, min(cdiv(PROGRAMS, tiles), cdiv(tokens, 4 * block)))
    each = cdiv(cdiv(tokens, block), parts) * block
    out = torch.empty((parts, shares.largest, x.width), dtype=torch.float32, device=p.device)
    launch(
        _outer, (tiles, parts),
        p, x.data, x.scale, out, p.stride(0), x.data.stride(0), tokens, x.width, shares.largest, each,
        *shares.arguments, EIGHT=eight, FP8=x.data.dtype == torch.float8_e4m3fn, SHARES=len(shares.each), ROWS=block,
        COLUMNS=TILE, RANK=power_of_two(max(shares.largest, 16)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


if triton is not None:
    from kitaeru.kernels.frozen import high_part
    from kitaeru.kernels.neighbours import located, picked
    from kitaeru.kernels.turned import turned
    from kitaeru.kernels.words import parted

    @triton.jit
    def _project(  # type: ignore[no-untyped-def]
        x, scale, p, p_scale, out, sums, done, x_stride, tokens, width, rank, extra, each, parts,
        EIGHT: tl.constexpr, FP8: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        RANK: tl.constexpr, EXTRA: tl.constexpr,
    ):  # fmt: skip
        # Of some rows the sum over some columns; who is the last of these rows adds all up, in their order.
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = tl.arange(0, RANK)
        column = tl.arange(0, COLUMNS)
        kind: tl.constexpr = tl.int32 if EIGHT and not FP8 else tl.float32
        exact: tl.constexpr = 128 if FP8 else None  # tensor cores of sm_90 add FP8 up in 14 bits: so many, then in 32
        total = tl.zeros([ROWS, RANK], kind)
        rest = tl.zeros([ROWS, RANK], kind)
        first = tl.program_id(1) * each
        for start in range(first, min(first + each, width), COLUMNS):
            k = start + column
            values = tl.load(x + row * x_stride + k[None, :], mask=(row < tokens) & (k[None, :] < width), other=0.0)
            there = (at[:, None] < rank) & (k[None, :] < width)
            factor = tl.load(p + at[:, None] * width + k[None, :], mask=there, other=0.0)
            total = tl.dot(values, tl.trans(factor), total, max_num_imprecise_acc=exact, out_dtype=kind)
            if EIGHT:
                second = tl.load(p + (rank + at[:, None]) * width + k[None, :], mask=there, other=0.0)
                rest = tl.dot(values, tl.trans(second), rest, max_num_imprecise_acc=exact, out_dtype=kind)
        at = at[None, :]
        if EIGHT:
            second_counts: tl.constexpr = 1.0 if FP8 else 1.0 / 254.0
            total = total.to(tl.float32) + rest.to(tl.float32) * second_counts
        if SPLIT:
            place = sums + row * RANK + at
            tl.store(place + tl.program_id(1).to(tl.int64) * tokens * RANK, total, mask=row < tokens)
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter = done + tl.program_id(0)
            if tl.atomic_add(counter, 1) == parts - 1:
                tl.store(counter, 0)
                total = tl.zeros([ROWS, RANK], tl.float32)
                for _ in range(parts):
                    total += tl.load(place, mask=row < tokens, other=0.0, cache_modifier=".cg")
                    place += tokens * RANK
                _write_thin(
                    total, x, scale, p_scale, out, row, at, x_stride, tokens, width, rank, extra, EIGHT, FP8, ROWS,
                    EXTRA,
                )  # fmt: skip
        else:
            _write_thin(
                total, x, scale, p_scale, out, row, at, x_stride, tokens, width, rank, extra, EIGHT, FP8, ROWS, EXTRA
            )

    @triton.jit
    def _write_thin(  # type: ignore[no-untyped-def]
        total, x, scale, p_scale, out, row, at, x_stride, tokens, width, rank, extra,
        EIGHT: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, EXTRA: tl.constexpr,
    ):  # fmt: skip
        if EIGHT:
            by = tl.load(scale + row, mask=row < tokens, other=1.0)
            total *= by * tl.load(p_scale + at, mask=at < rank, other=0.0)
        inside = (row < tokens) & (at < rank)
        thin = total.to(out.dtype.element_ty)
        tl.store(out + row * rank + at, thin, mask=inside)
        if EXTRA > 0:
            # `adapter_columns` of this side.
            place = x + row * x_stride + width
            beside = thin.to(tl.float32)
            if FP8:
                beside = high_part(beside * (1.0 / by))
                tl.store(place + rank + at, beside.to(x.dtype.element_ty), mask=inside)
            tl.store(place + at, beside.to(x.dtype.element_ty), mask=inside)
            more = tl.arange(0, EXTRA)[None, :]
            empty = (more >= (2 * rank if FP8 else rank)) & (more < extra)
            tl.store(place + more, tl.zeros([ROWS, EXTRA], x.dtype.element_ty), mask=(row < tokens) & empty)

    @triton.jit
    def _outer(  # type: ignore[no-untyped-def]
        p, x, scale, out, p_stride, x_stride, tokens, width, rank, each,
        row_0, row_1, row_2, rank_0, rank_1, rank_2, column_0, column_1, column_2, outputs_0, outputs_1, outputs_2,
        EIGHT: tl.constexpr, FP8: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        RANK: tl.constexpr,
    ):  # fmt: skip
        # Numbers of 8 bits are read in pairs: even columns and odd ones have a sum each.
        number, tile = located(tl.program_id(0), outputs_0, outputs_1, outputs_2, COLUMNS, SHARES)
        skip = picked(number, row_0, row_1, row_2, SHARES)
        own = picked(number, rank_0, rank_1, rank_2, SHARES)
        begin = picked(number, column_0, column_1, column_2, SHARES)
        outputs = picked(number, outputs_0, outputs_1, outputs_2, SHARES)
        at = tl.arange(0, RANK)
        first = tl.program_id(1) * each
        size: tl.constexpr = 2 if EIGHT else 1
        unit = tile * (COLUMNS // size) + tl.arange(0, COLUMNS // size)
        there = unit < outputs // size
        unit += begin // size
        if EIGHT:
            x = x.to(tl.pointer_type(tl.int16))
        total = tl.zeros([RANK, COLUMNS // size], tl.float32)
        odd = total
        for start in range(first, min(first + each, tokens), ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            inside = row < tokens
            left = tl.load(
                p + row[:, None] * p_stride + skip + at[None, :], mask=inside[:, None] & (at[None, :] < own), other=0
            )
            values = tl.load(
                x + row[:, None] * (x_stride // size) + unit[None, :], mask=inside[:, None] & there[None, :], other=0
            )
            if EIGHT:
                # FP8 comes times 2**-120: 2**100 of it here, where no number is far from 1, and the rest at the end.
                by = tl.load(scale + row, mask=inside, other=0) * (2.0**100 if FP8 else 1.0)
                left = (left.to(tl.float32) * by[:, None]).to(tl.bfloat16)
                values, second = parted(values, FP8)
                odd = tl.dot(tl.trans(left), second, odd)
            total = tl.dot(tl.trans(left), values.to(left.dtype), total)
        if EIGHT:
            total = tl.reshape(tl.join(total, odd), (RANK, COLUMNS)) * (2.0**20 if FP8 else 1.0)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        there = column < outputs
        column += begin
        place = (tl.program_id(1) * rank + at[:, None]).to(tl.int64) * width + column[None, :]
        tl.store(out + place, total, mask=(at[:, None] < own) & there[None, :])

    @triton.jit
    def _add_up(  # type: ignore[no-untyped-def]
        of_a, of_b, out, parts_a, parts_b, rank, width, rank_b, width_b,
        rank_0, rank_1, rank_2, column_0, column_1, column_2, outputs_0, outputs_1, outputs_2,
        scaling_0, scaling_1, scaling_2,
        TURNED_A: tl.constexpr, TURNED_B: tl.constexpr, SHARES: tl.constexpr, COLUMNS: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        # A tile of all A [R, K], or of one share's B [N, r], which is the transposed sum.
        tile, parts, count, across, begin = tl.program_id(0), of_a, parts_a, width, 0
        own, outputs, scaling, down, right = rank, width, 1.0, width, 1
        turns = TURNED_A
        tiles = tl.cdiv(width, COLUMNS)
        if tile >= tiles:
            tile -= tiles
            out += rank * width
            turns = TURNED_B
            parts, count, rank, across, down = of_b, parts_b, rank_b, width_b, 1
            number, tile = located(tile, outputs_0, outputs_1, outputs_2, COLUMNS, SHARES)
            own = picked(number, rank_0, rank_1, rank_2, SHARES)
            begin = picked(number, column_0, column_1, column_2, SHARES)
            outputs = picked(number, outputs_0, outputs_1, outputs_2, SHARES)
            scaling = picked(number, scaling_0, scaling_1, scaling_2, SHARES)
            if SHARES > 1:
                out += tl.where(number > 0, rank_0 * outputs_0, 0)
            if SHARES > 2:
                out += tl.where(number > 1, rank_1 * outputs_1, 0)
            right = own
        at = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (at < own) & (column < outputs)
        place = parts + at * across + begin + column
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for _ in tl.range(count, loop_unroll_factor=4):
            total += tl.load(place, mask=mask, other=0.0)
            place += rank * across
        if (TURNED_A or TURNED_B) and turns:
            total = turned(total)
        tl.store(out + at * down + column * right, total * scaling, mask=mask)
