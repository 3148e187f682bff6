"""Rotary positions (and, where a model has it, the norm of every head) on the fused result of the q, k, v projections.

qkv: [T, (H + 2 KV) D], heads of q, k and v side by side; cos, sin: [T, D], their halves equal. Forward turns q and k in
place. Backward takes the gradients of the turned q and k and of v, and gives the gradient of qkv as Rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kitaeru.kernels.rows import Rows, empty_rows, put_rows, row_block, row_warps, top
from kitaeru.kernels.triton_or_none import launch, power_of_two, tl, triton, use_triton

if triton is not None:
    from kitaeru.kernels.rows import store_rounded
    from kitaeru.kernels.turned import turned


@dataclass(frozen=True)
class Heads:
    """How many heads of which size; `q_norm`, `k_norm`: frozen weights [D] of a norm of every head, or None."""

    query: int
    key: int
    size: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6

    @property
    def width(self) -> int:
        """Columns of qkv."""
        return (self.query + 2 * self.key) * self.size

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, KV, D]: views."""
        q, k, v = qkv.split([self.query * self.size, self.key * self.size, self.key * self.size], 1)
        tokens = len(qkv)
        return (
            q.view(tokens, self.query, self.size),
            k.view(tokens, self.key, self.size),
            v.view(tokens, self.key, self.size),
        )


def rotate_reference(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor | None:
    """The definition. Returns 1/rms of every head of q and k [T, H + KV] where they are normed."""
    q, k, _ = heads.split(qkv)
    inverses = []
    for part, weight in ((q, heads.q_norm), (k, heads.k_norm)):
        values = part.float()
        if weight is not None:
            inverse = torch.rsqrt(values.square().mean(2, keepdim=True) + heads.eps)
            inverses.append(inverse[..., 0])
            values = (values * inverse).to(qkv.dtype).float() * weight.float()
            values = values.to(qkv.dtype).float()
        part.copy_(_turn(values, cos, sin))
    return torch.cat(inverses, 1) if inverses else None


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor | None:
    """The same in one pass."""
    if not use_triton(qkv):
        return rotate_reference(qkv, cos, sin, heads)
    tokens, count = len(qkv), heads.query + heads.key
    normed = heads.q_norm is not None
    inverse = torch.empty((tokens, count), dtype=torch.float32, device=qkv.device) if normed else None
    launch(
        _rotate, (tokens,),
        qkv, cos, sin, heads.q_norm, heads.k_norm, inverse, qkv.stride(0), cos.stride(0), heads.query, count,
        heads.eps,
        NORM=normed, D=heads.size, HALF=heads.size // 2, HEADS=power_of_two(count), num_warps=4,
    )  # fmt: skip
    return inverse


def rotate_backward_reference(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, inverse: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads,
    dtype: torch.dtype, extra: int,
) -> Rows:  # fmt: skip
    """The definition, from the turned `qkv` that forward left."""
    q, k, _ = heads.split(qkv)
    parts = []
    first = 0
    for gradient, turned, weight in ((dq, q, heads.q_norm), (dk, k, heads.k_norm)):
        value = _turn(gradient.float(), cos, -sin)
        if weight is not None:
            assert inverse is not None
            own = inverse[:, first : first + turned.shape[1], None]
            normed, scale = _turn(turned.float(), cos, -sin), weight.float()
            n = torch.where(scale == 0, 0.0, normed / scale)
            value = own * (scale * value - n * (normed * value).mean(2, keepdim=True))
        first += turned.shape[1]
        parts.append(value.flatten(1))
    whole = torch.cat([*parts, dv.float().flatten(1)], 1)
    return put_rows(whole, empty_rows(len(whole), heads.width, extra, dtype, dq))


def rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, inverse: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads,
    dtype: torch.dtype, extra: int,
) -> Rows:  # fmt: skip
    """The same in one pass."""
    if not use_triton(dq):
        return rotate_backward_reference(dq, dk, dv, qkv, inverse, cos, sin, heads, dtype, extra)
    rows = empty_rows(len(dq), heads.width, extra, dtype, dq)
    block = row_block(heads.width)
    launch(
        _rotate_backward, (len(dq),),
        dq, dk, dv, qkv, inverse, cos, sin, heads.q_norm, heads.k_norm, rows.data, rows.scale,
        dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), qkv.stride(0),
        cos.stride(0), rows.data.stride(0), heads.query, heads.key,
        NORM=inverse is not None, TOP=top(dtype), INT8=dtype == torch.int8, D=heads.size, BLOCK=block,
        num_warps=row_warps(block),
    )  # fmt: skip
    return rows


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by the angles of its token."""
    low, high = x.chunk(2, 2)
    c, s = (t.float()[:, None, : x.shape[2] // 2] for t in (cos, sin))
    return torch.cat([low * c - high * s, high * c + low * s], 2)


if triton is not None:

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        qkv, cos, sin, q_norm, k_norm, inverse, stride, angle_stride, query, count, eps,
        NORM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, HEADS)[:, None]
        at = tl.arange(0, HALF)[None, :]
        inside = (head < count) & (at < HALF)
        pointer = qkv + row * stride + head * D + at
        low = tl.load(pointer, mask=inside, other=0).to(tl.float32)
        high = tl.load(pointer + HALF, mask=inside, other=0).to(tl.float32)
        if NORM:
            inv = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)
            one = tl.arange(0, HEADS)
            tl.store(inverse + row * count + one, inv, mask=one < count)
            is_query = head < query
            low = (low * inv[:, None]).to(qkv.dtype.element_ty).to(tl.float32)
            high = (high * inv[:, None]).to(qkv.dtype.element_ty).to(tl.float32)
            low *= tl.where(is_query, tl.load(q_norm + at).to(tl.float32), tl.load(k_norm + at).to(tl.float32))
            high *= tl.where(
                is_query, tl.load(q_norm + HALF + at).to(tl.float32), tl.load(k_norm + HALF + at).to(tl.float32)
            )
            low = low.to(qkv.dtype.element_ty).to(tl.float32)
            high = high.to(qkv.dtype.element_ty).to(tl.float32)
        c = tl.load(cos + row * angle_stride + at).to(tl.float32)
        s = tl.load(sin + row * angle_stride + at).to(tl.float32)
        tl.store(pointer, (low * c - high * s).to(qkv.dtype.element_ty), mask=inside)
        tl.store(pointer + HALF, (high * c + low * s).to(qkv.dtype.element_ty), mask=inside)

    @triton.jit
    def _rotate_backward(  # type: ignore[no-untyped-def]
        dq, dk, dv, qkv, inverse, cos, sin, q_norm, k_norm, rows, scale,
        q_row, q_head, k_row, k_head, v_row, v_head, stride, angle_stride, rows_stride, query, key,
        NORM: tl.constexpr, TOP: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # A row in one piece, each number beside its partner in the other half of its head.
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        head, place = at // D, at % D
        sign = 1 - 2 * (at // (D // 2) % 2)
        other = sign * (D // 2)
        is_query, is_value, inside = head < query, head >= query + key, head < query + 2 * key
        of_query = dq + row * q_row + head * q_head
        of_key = dk + row * k_row + (head - query) * k_head
        of_value = dv + row * v_row + (head - query - key) * v_head
        gradient = tl.where(is_query, of_query, tl.where(is_value, of_value, of_key)) + place
        turns = inside & (is_value == 0)
        own = tl.load(gradient, mask=inside, other=0).to(tl.float32)
        partner = tl.load(gradient + other, mask=turns, other=0).to(tl.float32)
        c = tl.load(cos + row * angle_stride + place, mask=turns, other=1).to(tl.float32)
        s = tl.load(sin + row * angle_stride + place, mask=turns, other=0).to(tl.float32)
        s *= sign
        back = own * c + partner * s
        if NORM:
            y = qkv + row * stride + at
            n = tl.load(y, mask=turns, other=0).to(tl.float32) * c
            n += tl.load(y + other, mask=turns, other=0).to(tl.float32) * s
            weight = tl.load(tl.where(is_query, q_norm, k_norm) + place, mask=turns, other=1).to(tl.float32)
            inner = tl.sum(tl.reshape(n * back, (BLOCK // D, D)), 1)[:, None] / D
            n = tl.where(weight == 0, 0.0, n / tl.where(weight == 0, 1.0, weight))
            one = tl.arange(0, BLOCK // D)
            by = tl.load(inverse + row * (query + key) + one, mask=one < query + key, other=1)[:, None]
            normed = by * tl.reshape(weight * back, (BLOCK // D, D)) - by * inner * tl.reshape(n, (BLOCK // D, D))
            back = tl.where(is_value, back, tl.reshape(normed, (BLOCK,)))
        if INT8:
            back = turned(back)
        if TOP > 0:
            step = tl.maximum(tl.max(tl.abs(back), 0) / TOP, 1e-12)
            tl.store(scale + row, step)
            back *= 1.0 / step
        store_rounded(rows + row * rows_stride + at, back, inside, INT8)
