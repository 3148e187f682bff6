"""Causal attention over examples laid end to end: none sees another, and no T x T matrix exists.

Shapes: query [1, heads, T, head_dim]; key, value [1, kv_heads, T, head_dim]; `cu_seqlens` int32 [examples + 1] holds
where each example starts, and T last. heads is a multiple of kv_heads (grouped-query attention).
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from kitaeru.plan.fused import EVEN_HEADS

_VARLEN_ARGUMENTS = inspect.signature(varlen.varlen_attn).parameters


def packed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None = None
) -> Tensor:
    """The definition: one masked softmax over the whole row, fp32. Returns [1, heads, T, head_dim]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    place = torch.arange(length, device=query.device)
    example = torch.searchsorted(cu_seqlens.long(), place, right=True)
    allowed = (example[:, None] == example[None, :]) & (place[:, None] >= place[None, :])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value.float()).to(query.dtype)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None = None
) -> Tensor:
    """Exact attention of each example with itself. Returns [1, heads, T, head_dim].

    On CUDA in 16 bits, from sm_80: torch's variable-length flash kernel. Elsewhere: torch's SDPA, one example after
    another.
    """
    if _in_16_bits(query):
        return _varlen(query, key, value, cu_seqlens, longest, scale)
    return _by_example(query, key, value, cu_seqlens, scale)


def _by_example(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    bounds: list[int] = cu_seqlens.tolist()
    gqa = query.shape[1] != key.shape[1]
    if gqa and query.is_cuda:  # no kernel here knows grouped heads, and the fallback for them holds all T x T scores
        groups = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scale, enable_gqa=gqa
        )
        for a, b in itertools.pairwise(bounds)
    ]
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


@dataclass(frozen=True)
class Attended:
    """What `attend` gives: the output [T, heads, D], and the inputs as leaves of the graph behind it."""

    output: Tensor
    inputs: tuple[Tensor, Tensor, Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Attended:
    """`packed_attention` with its two passes apart, for [T, heads, D] and [T, kv_heads, D]; nothing is repeated.

    On CUDA in 16 bits: flash attention, or from sm_90, where it is the faster one, cuDNN's kernel for examples of one
    length (its kernel for several took 78 ms where these take 2, torch 2.11). Elsewhere torch's SDPA, example by
    example.
    """
    inputs = (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_())
    with torch.enable_grad():
        if not _in_16_bits(query):
            q, k, v = (t.transpose(0, 1)[None] for t in inputs)
            output = _by_example(q, k, v, cu_seqlens, scale)[0].transpose(0, 1)
        elif _of_one_length(query, cu_seqlens, longest):
            q, k, v = (t.unflatten(0, (-1, longest)).transpose(1, 2) for t in inputs)
            found = torch.ops.aten._cudnn_attention_forward(
                q, k, v, None, None, None, longest, longest, True, 0.0, True, False, scale=scale
            )
            output = found[0].transpose(1, 2).flatten(0, 1)
        else:
            output = torch.ops.aten._flash_attention_forward(
                *inputs, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale
            )[0]
    return Attended(output, inputs)


def attend_backward(upstream: Tensor, done: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in their shapes. Once for each `attend`."""
    dq, dk, dv = torch.autograd.grad(done.output, done.inputs, upstream)
    return dq, dk, dv


def _in_16_bits(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _has_flash(query.device)


def _of_one_length(query: Tensor, cu_seqlens: Tensor, longest: int) -> bool:
    """Whether all examples are of one length, known without waiting for the device, and cuDNN's kernel takes them."""
    same = (len(cu_seqlens) - 1) * longest == len(query)
    return same and query.shape[2] in EVEN_HEADS and torch.cuda.get_device_capability(query.device) >= (9, 0)
