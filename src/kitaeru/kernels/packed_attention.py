"""Causal attention over examples laid end to end: none sees another, and no T x T matrix exists.

Shapes: query [1, heads, T, head_dim]; key, value [1, kv_heads, T, head_dim]; `cu_seqlens` int32 [examples + 1] holds
where each example starts, and T last. heads is a multiple of kv_heads (grouped-query attention). A `Sight` says how far
back a query sees, and whether scores are soft-capped.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from kitaeru.kernels import flex
from kitaeru.plan.fused import EVEN_HEADS

_VARLEN_ARGUMENTS = inspect.signature(varlen.varlen_attn).parameters


@dataclass(frozen=True)
class Sight:
    """What the queries of a layer see: the last `window` tokens of their example, themselves included (0: all before
    them), with scores capped to `softcap` * tanh(score / softcap) (0: as they are).
    """

    window: int = 0
    softcap: float = 0.0

    def of(self, longest: int) -> Sight:
        """The same for examples that are no longer than this."""
        return replace(self, window=0) if self.window >= longest else self


PLAIN = Sight()


def packed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None = None, sight: Sight = PLAIN
) -> Tensor:
    """The definition: one masked softmax over the whole row, fp32. Returns [1, heads, T, head_dim]."""
    length = query.shape[2]
    place = torch.arange(length, device=query.device)
    example = torch.searchsorted(cu_seqlens.long(), place, right=True)
    allowed = (example[:, None] == example[None, :]) & _seen(0, length, sight, query.device)
    return _exact(query, key, value, allowed, scale, sight.softcap)


def _seen(begin: int, end: int, sight: Sight, device: torch.device) -> Tensor:
    """Which keys the queries from `begin` to `end` of one example see: [queries, end]."""
    back = torch.arange(begin, end, device=device)[:, None] - torch.arange(end, device=device)
    return (back >= 0) & (back < (sight.window or end))


def _exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None, softcap: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value.float()).to(query.dtype)


# Queries of an example whose scores are held at a time.
QUERIES = 256


class _Capped(torch.autograd.Function):
    """The definition for one example, some queries at a time, whose scores are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, sight: Sight) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.sight = scale, sight
        return torch.cat([_piece(query, key, value, begin, scale, sight) for begin in _begins(query)], 2)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        query, key, value = leaves
        total = [torch.zeros_like(t, dtype=torch.float32) for t in leaves]
        for begin in _begins(query):
            with torch.enable_grad():
                output = _piece(query, key, value, begin, ctx.scale, ctx.sight)
            above = upstream[0][:, :, begin : begin + QUERIES]
            for whole, part in zip(total, torch.autograd.grad(output, leaves, above), strict=True):
                whole += part
        return *(whole.to(t.dtype) for whole, t in zip(total, leaves, strict=True)), None, None


def _begins(query: Tensor) -> range:
    return range(0, query.shape[2], QUERIES)


def _piece(query: Tensor, key: Tensor, value: Tensor, begin: int, scale: float | None, sight: Sight) -> Tensor:
    end = min(begin + QUERIES, query.shape[2])
    seen = _seen(begin, end, sight, query.device)
    return _exact(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], seen, scale, sight.softcap)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float | None = None,
    sight: Sight = PLAIN,
) -> Tensor:
    """Exact attention of each example with itself. Returns [1, heads, T, head_dim].

    On CUDA in 16 bits, from sm_80: torch's variable-length flash kernel, FlexAttention where scores are capped and it
    has been proved here (kernels.flash). Elsewhere one example after another: torch's SDPA, and for capped scores the
    definition.
    """
    sight = sight.of(longest)
    if not _has_kernel(query, sight):
        return _by_example(query, key, value, cu_seqlens, scale, sight)
    if sight.softcap:
        return flex.attend(query, key, value, cu_seqlens, scale, sight.window, sight.softcap)
    if sight.window:
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return _flash(q, k, v, cu_seqlens, longest, scale, sight).transpose(0, 1)[None]
    return _varlen(query, key, value, cu_seqlens, longest, scale)


def _by_example(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None, sight: Sight
) -> Tensor:
    bounds: list[int] = cu_seqlens.tolist()
    gqa = query.shape[1] != key.shape[1]
    # No kernel here knows grouped heads, and the fallback for them holds all T x T scores.
    if gqa and query.is_cuda and not sight.softcap:
        groups = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    pieces = []
    for a, b in itertools.pairwise(bounds):
        q, k, v = (t[:, :, a:b] for t in (query, key, value))
        own = sight.of(b - a)
        if own.softcap:
            pieces.append(_Capped.apply(q, k, v, scale, own))  # type: ignore[no-untyped-call]
            continue
        seen = _seen(0, b - a, own, q.device) if own.window else None
        pieces.append(
            F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=gqa)
        )
    return torch.cat(pieces, dim=2)


def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
    options: dict[str, Any] = {"scale": scale} if "scale" in _VARLEN_ARGUMENTS else {}
    if scale is not None and not options:
        query = query * (scale * query.shape[-1] ** 0.5)
    # torch 2.11 and earlier say is_causal, later ones say it with a window that reaches back without end.
    options |= {"is_causal": True} if "is_causal" in _VARLEN_ARGUMENTS else {"window_size": (-1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _VARLEN_ARGUMENTS:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, head_dim]
    output = varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(output, Tensor)
    return output.transpose(0, 1)[None]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, sight: Sight
) -> Tensor:
    """[T, heads, D]. Torch counts a window without the query itself."""
    window = {"window_size_left": sight.window - 1, "window_size_right": 0} if sight.window else {}
    output: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale, **window
    )[0]
    return output


@dataclass(frozen=True)
class Attended:
    """What `attend` gives: the output [T, heads, D], and the inputs as leaves of the graph behind it."""

    output: Tensor
    inputs: tuple[Tensor, Tensor, Tensor]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scale: float,
    sight: Sight = PLAIN,
) -> Attended:
    """`packed_attention` with its two passes apart, for [T, heads, D] and [T, kv_heads, D]; nothing is repeated.

    On CUDA in 16 bits: flash attention, or from sm_90, where it is the faster one, cuDNN's kernel for examples of one
    length (its kernel for several took 78 ms where these take 2, torch 2.11); FlexAttention for capped scores.
    Elsewhere example by example.
    """
    sight = sight.of(longest)
    inputs = (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_())
    with torch.enable_grad():
        if sight.softcap or not _has_kernel(query, sight):
            q, k, v = (t.transpose(0, 1)[None] for t in inputs)
            output = packed_attention(q, k, v, cu_seqlens, longest, scale, sight)[0].transpose(0, 1)
        elif not sight.window and _of_one_length(query, cu_seqlens, longest):
            q, k, v = (t.unflatten(0, (-1, longest)).transpose(1, 2) for t in inputs)
            found = torch.ops.aten._cudnn_attention_forward(
                q, k, v, None, None, None, longest, longest, True, 0.0, True, False, scale=scale
            )
            output = found[0].transpose(1, 2).flatten(0, 1)
        else:
            output = _flash(*inputs, cu_seqlens, longest, scale, sight)
    return Attended(output, inputs)


def attend_backward(upstream: Tensor, done: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in their shapes. Once for each `attend`."""
    dq, dk, dv = torch.autograd.grad(done.output, done.inputs, upstream)
    return dq, dk, dv


def _has_kernel(query: Tensor, sight: Sight) -> bool:
    """Whether a kernel here never holds all scores of an example, for what these queries see."""
    return _in_16_bits(query) and (not sight.softcap or flex.tiles is not None)


def _in_16_bits(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_flash(query.device)


def _of_one_length(query: Tensor, cu_seqlens: Tensor, longest: int) -> bool:
    """Whether all examples are of one length, known without waiting for the device, and cuDNN's kernel takes them."""
    same = (len(cu_seqlens) - 1) * longest == len(query)
    return same and query.shape[2] in EVEN_HEADS and torch.cuda.get_device_capability(query.device) >= (9, 0)
