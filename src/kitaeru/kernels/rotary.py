"""Rotary positions (and, where a model has it, the norm of every head) on the fused result of the q, k, v projections.

qkv: [T, (H + 2 KV) D], heads of q, k and v side by side; cos, sin: [T, D], their halves equal. Forward turns q and k in
place. Backward takes the gradients of the turned q and k and of v, and gives the gradient of qkv as Rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kitaeru.kernels.rows import Rows, empty_rows, put_rows, round_rows, top, turns
from kitaeru.kernels.triton_or_none import tl, triton, use_triton
from kitaeru.kernels.turned import TURN

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
    _rotate[(tokens,)](
        qkv, cos, sin, heads.q_norm, heads.k_norm, inverse, qkv.stride(0), cos.stride(0), heads.query, count,
        heads.eps,
        NORM=normed, D=heads.size, HALF=heads.size // 2, HEADS=triton.next_power_of_2(count), num_warps=4,
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
    """The same in one pass; in INT8 with heads of less than 64 in two, since the 64 neighbours to be turned are not in
    one head.
    """
    if not use_triton(dq):
        return rotate_backward_reference(dq, dk, dv, qkv, inverse, cos, sin, heads, dtype, extra)
    int8 = turns(dtype)
    if int8 and heads.size % TURN:
        wide = rotate_backward(dq, dk, dv, qkv, inverse, cos, sin, heads, dq.dtype, 0)
        return round_rows(wide.data, dtype, extra)
    least = 8 if int8 else 1  # kernels turn 512 numbers or more
    tokens = len(dq)
    rows = empty_rows(tokens, heads.width, extra, dtype, dq)
    _rotate_backward[(tokens,)](
        dq, dk, dv, qkv, inverse, cos, sin, heads.q_norm, heads.k_norm, rows.data, rows.scale,
        dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), qkv.stride(0),
        cos.stride(0), rows.data.stride(0), heads.query, heads.key,
        NORM=inverse is not None, TOP=top(dtype), INT8=int8, D=heads.size, HALF=heads.size // 2,
        QUERY=max(least, triton.next_power_of_2(heads.query)), KEY=max(least, triton.next_power_of_2(heads.key)),
        num_warps=8,
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
    def _turn_back(  # type: ignore[no-untyped-def]
        gradient, gradient_stride, turned, inverse, weight, c, s, heads,
        NORM: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    ):  # fmt: skip
        head = tl.arange(0, HEADS)[:, None]
        at = tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (at < HALF)
        low = tl.load(gradient + head * gradient_stride + at, mask=inside, other=0).to(tl.float32)
        high = tl.load(gradient + head * gradient_stride + HALF + at, mask=inside, other=0).to(tl.float32)
        back_low = low * c + high * s
        back_high = high * c - low * s
        if NORM:
            y_low = tl.load(turned + head * D + at, mask=inside, other=0).to(tl.float32)
            y_high = tl.load(turned + head * D + HALF + at, mask=inside, other=0).to(tl.float32)
            n_low = y_low * c + y_high * s
            n_high = y_high * c - y_low * s
            one = tl.arange(0, HEADS)
            inv = tl.load(inverse + one, mask=one < heads, other=0)[:, None]
            w_low = tl.load(weight + at).to(tl.float32)
            w_high = tl.load(weight + HALF + at).to(tl.float32)
            inner = ((tl.sum(n_low * back_low, 1) + tl.sum(n_high * back_high, 1)) / D)[:, None]
            by_low = tl.where(w_low == 0, 0.0, 1.0 / tl.where(w_low == 0, 1.0, w_low))
            by_high = tl.where(w_high == 0, 0.0, 1.0 / tl.where(w_high == 0, 1.0, w_high))
            back_low = inv * (w_low * back_low - n_low * by_low * inner)
            back_high = inv * (w_high * back_high - n_high * by_high * inner)
        return back_low, back_high

    @triton.jit
    def _turned_halves(low, high):  # type: ignore[no-untyped-def]
        """`turn` of heads given as their halves, [heads, 64] or wider, or [heads, 32]."""
        if low.shape[1] >= 64:
            return turned(low), turned(high)
        else:
            heads: tl.constexpr = low.shape[0]
            whole = turned(tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (heads, 64)))
            return tl.split(tl.permute(tl.reshape(whole, (heads, 2, 32)), (0, 2, 1)))

    @triton.jit
    def _rotate_backward(  # type: ignore[no-untyped-def]
        dq, dk, dv, qkv, inverse, cos, sin, q_norm, k_norm, rows, scale,
        q_row, q_head, k_row, k_head, v_row, v_head, stride, angle_stride, rows_stride, query, key,
        NORM: tl.constexpr, TOP: tl.constexpr, INT8: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
        QUERY: tl.constexpr, KEY: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, HALF)[None, :]
        c = tl.load(cos + row * angle_stride + at).to(tl.float32)
        s = tl.load(sin + row * angle_stride + at).to(tl.float32)
        qkv += row * stride
        if NORM:
            inverse += row * (query + key)
        q_low, q_high = _turn_back(dq + row * q_row, q_head, qkv, inverse, q_norm, c, s, query, NORM, D, HALF, QUERY)
        if NORM:
            k_inverse = inverse + query
        else:
            k_inverse = inverse
        k_low, k_high = _turn_back(
            dk + row * k_row, k_head, qkv + query * D, k_inverse, k_norm, c, s, key, NORM, D, HALF, KEY
        )
        q_place = tl.arange(0, QUERY)[:, None]
        k_place = tl.arange(0, KEY)[:, None]
        q_inside = (q_place < query) & (at < HALF)
        k_inside = (k_place < key) & (at < HALF)
        v_low = tl.load(dv + row * v_row + k_place * v_head + at, mask=k_inside, other=0).to(tl.float32)
        v_high = tl.load(dv + row * v_row + k_place * v_head + HALF + at, mask=k_inside, other=0).to(tl.float32)
        if INT8:
            q_low, q_high = _turned_halves(q_low, q_high)
            k_low, k_high = _turned_halves(k_low, k_high)
            v_low, v_high = _turned_halves(v_low, v_high)
        if TOP > 0:
            of_q = tl.maximum(tl.max(tl.abs(q_low)), tl.max(tl.abs(q_high)))
            of_k = tl.maximum(tl.max(tl.abs(k_low)), tl.max(tl.abs(k_high)))
            of_v = tl.maximum(tl.max(tl.abs(v_low)), tl.max(tl.abs(v_high)))
            step = tl.maximum(tl.maximum(of_q, tl.maximum(of_k, of_v)) / TOP, 1e-12)
            tl.store(scale + row, step)
            factor = 1.0 / step
        else:
            factor = 1.0
        rows += row * rows_stride
        store_rounded(rows + q_place * D + at, q_low * factor, q_inside, INT8)
        store_rounded(rows + q_place * D + HALF + at, q_high * factor, q_inside, INT8)
        rows += query * D
        store_rounded(rows + k_place * D + at, k_low * factor, k_inside, INT8)
        store_rounded(rows + k_place * D + HALF + at, k_high * factor, k_inside, INT8)
        rows += key * D
        store_rounded(rows + k_place * D + at, v_low * factor, k_inside, INT8)
        store_rounded(rows + k_place * D + HALF + at, v_high * factor, k_inside, INT8)
