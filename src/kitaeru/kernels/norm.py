"""RMSNorm that adds a residual, rounds its result for the next product, and goes backward from what it rounded.

x, delta: [T, h]; weight [h]. y = (x + delta) * rstd * weight, rstd = 1 / sqrt(mean((x + delta)^2) + eps).
The weight is frozen: there is no gradient for it. Between two norms (`post`, as Gemma has them) delta is normed itself
before it is added.

Backward wants n = (x + delta) * rstd, and has y = n weight + what rounding has done, of variance s^2. Where the weight
is as small as that (a hundredth of its mean is common), y / weight is noise made large. The mean square of n is 1 by
definition, so the linear guess with the least error is n = y weight / (weight^2 + s^2). For numbers that were not
rounded to 8 bits it is y / weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kitaeru.kernels.rows import Rows, empty_rows, put_rows, row_block, row_warps, top
from kitaeru.kernels.triton_or_none import launch, tl, triton, use_triton

if triton is not None:
    from kitaeru.kernels.rows import store_rounded
    from kitaeru.kernels.turned import turned


@dataclass(frozen=True)
class Normed:
    """What backward needs of a norm whose result has been added: that result, rounded and not turned, and its rstd."""

    rows: Rows
    rstd: Tensor


def norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, extra: int
) -> tuple[Tensor, Rows, Tensor]:
    """The definition: (x + delta, y as Rows, rstd fp32 [T])."""
    total = x if delta is None else x + delta
    wide = total.float()
    rstd = torch.rsqrt(wide.square().mean(1) + eps)
    y = wide * rstd[:, None] * weight.float()
    return total, put_rows(y, empty_rows(len(x), x.shape[1], extra, dtype, x)), rstd


def norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, extra: int
) -> tuple[Tensor, Rows, Tensor]:
    """The same in one pass over memory. Without `delta` the first result is x itself."""
    if not use_triton(x):
        return norm_reference(x, delta, weight, eps, dtype, extra)
    total = x if delta is None else torch.empty_like(x)
    rows, rstd = _room(x, dtype, extra)
    _launch(x, delta, total, eps, weight, rows, rstd)
    return total, rows, rstd


def add_normed_reference(x: Tensor | None, delta: Tensor, post: Tensor, eps: float, keep: torch.dtype) -> Normed:
    """The definition: to x, in place, delta * rstd * post is added, in the dtype of delta, and kept in `keep`. Without
    an x it is only kept.
    """
    wide = delta.float()
    rstd = torch.rsqrt(wide.square().mean(1) + eps)
    y = (wide * rstd[:, None] * post.float()).to(delta.dtype)
    if x is not None:
        x += y
    return Normed(put_rows(y, empty_rows(len(delta), delta.shape[1], 0, keep, delta, plain=True)), rstd)


def add_normed(x: Tensor | None, delta: Tensor, post: Tensor, eps: float, keep: torch.dtype) -> Normed:
    """The same in one pass over memory."""
    if not use_triton(delta):
        return add_normed_reference(x, delta, post, eps, keep)
    normed = Normed(*_room(delta, keep, plain=True))
    _launch(x, delta, x, eps, post=post, normed=normed)
    return normed


def sandwich_reference(
    x: Tensor,
    delta: Tensor,
    post: Tensor,
    keep: torch.dtype,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    extra: int,
) -> tuple[Tensor, Normed, Rows, Tensor]:
    """The definition: `add_normed`, but not in place, and the norm of the sum."""
    total = x.clone()
    normed = add_normed_reference(total, delta, post, eps, keep)
    _, rows, rstd = norm_reference(total, None, weight, eps, dtype, extra)
    return total, normed, rows, rstd


def sandwich(
    x: Tensor,
    delta: Tensor,
    post: Tensor,
    keep: torch.dtype,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    extra: int,
) -> tuple[Tensor, Normed, Rows, Tensor]:
    """The same in one pass over memory."""
    if not use_triton(x):
        return sandwich_reference(x, delta, post, keep, weight, eps, dtype, extra)
    total, normed = torch.empty_like(x), Normed(*_room(delta, keep, plain=True))
    rows, rstd = _room(x, dtype, extra)
    _launch(x, delta, total, eps, weight, rows, rstd, post, normed)
    return total, normed, rows, rstd


def _room(like: Tensor, dtype: torch.dtype, extra: int = 0, *, plain: bool = False) -> tuple[Rows, Tensor]:
    """For rows of the shape of `like`, and for what each was multiplied by."""
    rows = empty_rows(len(like), like.shape[1], extra, dtype, like, plain=plain)
    return rows, torch.empty(len(like), dtype=torch.float32, device=like.device)


def _launch(
    x: Tensor | None,
    delta: Tensor | None,
    total: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    rows: Rows | None = None,
    rstd: Tensor | None = None,
    post: Tensor | None = None,
    normed: Normed | None = None,
) -> None:
    some = x if delta is None else delta
    assert some is not None
    tokens, width = some.shape
    block, kept = row_block(width), None if normed is None else normed.rows
    dtype, keep = (torch.float32 if one is None else one.data.dtype for one in (rows, kept))
    launch(
        _norm, (tokens,),
        x, delta, total, weight, None if rows is None else rows.data, None if rows is None else rows.scale, rstd,
        post, None if kept is None else kept.data, None if kept is None else kept.scale,
        None if normed is None else normed.rstd,
        0 if rows is None else rows.data.stride(0), width, eps,
        TOP=top(dtype), INT8=dtype == torch.int8, ADD=x is not None and delta is not None, POST=post is not None,
        KEEP_TOP=top(keep), KEEP_INT8=keep == torch.int8, NEXT=weight is not None, BLOCK=block,
        num_warps=row_warps(block),
    )  # fmt: skip


def variance(dtype: torch.dtype) -> float:
    """Of what rounding adds to a number of scale 1: of a step of 1 (INT8), or of e4m3's finest one, 2^-9, since its
    larger numbers lose no more than a share of themselves; 0 for data without a scale.
    """
    return {torch.int8: 1 / 12, torch.float8_e4m3fn: 2.0**-18 / 12}.get(dtype, 0.0)


def norm_backward_reference(
    dy: Tensor, y: Rows, rstd: Tensor, weight: Tensor, along: Tensor | None, dtype: torch.dtype | None, extra: int
) -> tuple[Tensor | None, Rows | None]:
    """The definition: the gradient of x, plus `along` [T, h], the gradient that the residual brings.

    From y alone: with n as above, dx = rstd (weight dy - n mean(y dy)). With `dtype` also as Rows; without `along` as
    these alone.
    """
    values, scale = y.values.float(), weight.float()
    if y.scale is None:
        n = torch.where(scale == 0, 0.0, values / scale)
    else:
        n = values * scale / (scale.square() + (y.scale.square() * variance(y.data.dtype))[:, None])
    inner = (values * dy.float()).mean(1, keepdim=True)
    dx = rstd[:, None] * (scale * dy.float() - n * inner)
    if along is not None:
        dx += along.float()
    result = None if along is None else dx.to(along.dtype)
    return result, None if dtype is None else put_rows(dx, empty_rows(len(dy), dy.shape[1], extra, dtype, dy))


def norm_backward(
    dy: Tensor, y: Rows, rstd: Tensor, weight: Tensor, along: Tensor | None, dtype: torch.dtype | None, extra: int
) -> tuple[Tensor | None, Rows | None]:
    """The same in one pass over memory."""
    if not use_triton(dy):
        return norm_backward_reference(dy, y, rstd, weight, along, dtype, extra)
    tokens, width = dy.shape
    result = None if along is None else torch.empty_like(along)
    rows = None if dtype is None else empty_rows(tokens, width, extra, dtype, dy)
    block = row_block(width)
    launch(
        _norm_backward, (tokens,),
        dy, y.data, y.scale, rstd, weight, along, result,
        None if rows is None else rows.data, None if rows is None else rows.scale,
        y.data.stride(0), 0 if rows is None else rows.data.stride(0), width,
        VARIANCE=variance(y.data.dtype), TURNED=y.turned, ALONG=along is not None, WRITE=rows is not None,
        TOP=0.0 if dtype is None else top(dtype), INT8=dtype == torch.int8, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return result, rows


if triton is not None:

    @triton.jit
    def _norm(  # type: ignore[no-untyped-def]
        x, delta, total, weight, y, scale, rstd, post, kept, kept_scale, kept_rstd, y_stride, width, eps,
        TOP: tl.constexpr, INT8: tl.constexpr, ADD: tl.constexpr, POST: tl.constexpr, KEEP_TOP: tl.constexpr,
        KEEP_INT8: tl.constexpr, NEXT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        if ADD or NEXT:
            values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
        if ADD or POST:
            change = tl.load(delta + row * width + at, mask=inside, other=0.0).to(tl.float32)
        if POST:
            inverse = 1.0 / tl.sqrt(tl.sum(change * change, 0) / width + eps)
            tl.store(kept_rstd + row, inverse)
            change *= inverse * tl.load(post + at, mask=inside, other=0.0).to(tl.float32)
            change = change.to(delta.dtype.element_ty).to(tl.float32)
            rounded = change
            if KEEP_TOP > 0:
                step = tl.maximum(tl.max(tl.abs(change), 0) / KEEP_TOP, 1e-12)
                tl.store(kept_scale + row, step)
                rounded = change * (1.0 / step)
            store_rounded(kept + row * width + at, rounded, inside, KEEP_INT8)
        if ADD:
            values += change
            values = values.to(total.dtype.element_ty)
            tl.store(total + row * width + at, values, mask=inside)
            values = values.to(tl.float32)
        if NEXT:
            inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
            tl.store(rstd + row, inverse)
            result = values * inverse * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            if INT8:
                result = turned(result)
            if TOP > 0:
                step = tl.maximum(tl.max(tl.abs(result), 0) / TOP, 1e-12)
                tl.store(scale + row, step)
                result *= 1.0 / step
            store_rounded(y + row * y_stride + at, result, inside, INT8)

    @triton.jit
    def _norm_backward(  # type: ignore[no-untyped-def]
        dy, y, y_scale, rstd, weight, along, dx, rows, scale, y_stride, rows_stride, width,
        VARIANCE: tl.constexpr, TURNED: tl.constexpr, ALONG: tl.constexpr, WRITE: tl.constexpr, TOP: tl.constexpr,
        INT8: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        up = tl.load(dy + row * width + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(y + row * y_stride + at, mask=inside, other=0.0)
        if TURNED:
            values = turned(values.to(tl.bfloat16))
        values = values.to(tl.float32)
        by = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        if VARIANCE > 0:
            unit = tl.load(y_scale + row)
            values *= unit
            n = values * by / (by * by + unit * unit * VARIANCE)
        else:
            n = tl.where(by == 0, 0.0, values / tl.where(by == 0, 1.0, by))
        inner = tl.sum(up * values, 0) / width
        result = tl.load(rstd + row) * (by * up - n * inner)
        if ALONG:
            result += tl.load(along + row * width + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + row * width + at, result.to(dx.dtype.element_ty), mask=inside)
        if WRITE:
            if INT8:
                result = turned(result)
            if TOP > 0:
                step = tl.maximum(tl.max(tl.abs(result), 0) / TOP, 1e-12)
                tl.store(scale + row, step)
                result *= 1.0 / step
            store_rounded(rows + row * rows_stride + at, result, inside, INT8)
