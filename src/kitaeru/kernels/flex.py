"""Attention with soft-capped scores and windows over packed examples by FlexAttention, which torch compiles for a GPU.

What a query sees is a row of keys without a gap: from the first one that its example and its window leave to itself. A
number a query says it all, and which blocks are full, cut or empty follows from these numbers without a T x T mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from kitaeru.kernels.triton_or_none import cdiv

BLOCK = 128
# Sizes of the kernels' tiles, by name: torch's own, and such that heads of 256 find room in 99 KB of shared memory; the
# backward pass's of 32 do on a GB10 (github.com/pytorch/pytorch/pull/198228). Short rows have no kernel of their own.
WHOLE: dict[str, int] = {"FORCE_USE_FLEX_ATTENTION": True}
TILES: dict[str, dict[str, int]] = {
    "flex": WHOLE,
    "flex-small": WHOLE | {
        "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 1,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32, "bwd_num_stages": 2,
    },
    "flex-smallest": WHOLE | {
        "fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "fwd_num_stages": 1,
        "bwd_BLOCK_M1": 16, "bwd_BLOCK_N1": 16, "bwd_BLOCK_M2": 16, "bwd_BLOCK_N2": 16, "bwd_num_stages": 1,
    },
}  # fmt: skip
# Which of them is in use: None until one has been proved on this device (kernels.flash).
tiles: str | None = None

# By `cu_seqlens`, which all layers of a micro-batch are given: its version, and masks by tokens and window.
_masks: Any = WeakTensorKeyDictionary()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    window: int,
    softcap: float,
) -> Tensor:
    """[1, heads, T, D]; `window` 0: all before; `softcap` 0: scores as they are. Compiled on a GPU."""
    run: Any = _compiled() if query.is_cuda else flex_attention
    output: Tensor = run(
        query, key, value, _capping(softcap) if softcap else None, _mask(cu_seqlens, query.shape[2], window),
        scale=scale, enable_gqa=query.shape[1] != key.shape[1], kernel_options=TILES[tiles or "flex"],
    )  # fmt: skip
    return output


@cache
def _compiled() -> Any:
    """Compiled for one number of tokens, for any, and for a single block, with gradients and without; all of this for
    each size of tiles that is tried. Beyond its limit torch would hold all scores instead.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 32)
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _capping(softcap: float) -> Callable[..., Tensor]:
    """cap tanh(score / cap) by a sigmoid: an exponential and a division, where the library's tanh has branches."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * (2 * torch.sigmoid(score * (2 / softcap)) - 1)

    return capped


def _mask(cu_seqlens: Tensor, tokens: int, window: int) -> BlockMask:
    version, made = _masks.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        made = {}
        _masks[cu_seqlens] = (cu_seqlens._version, made)
    if (tokens, window) not in made:
        made[tokens, window] = block_mask(first_seen(cu_seqlens, tokens, window))
    found: BlockMask = made[tokens, window]
    return found


def first_seen(cu_seqlens: Tensor, tokens: int, window: int) -> Tensor:
    """int32 [T]: the first key that each query sees."""
    place = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    example = torch.searchsorted(cu_seqlens, place, right=True, out_int32=True) - 1
    first = cu_seqlens[example]
    return torch.maximum(first, place - (window - 1)) if window else first


def block_mask(first: Tensor) -> BlockMask:
    """The mask of queries that see what lies between `first` [T], which never falls, and themselves. Nothing waits for
    the device.
    """
    tokens = len(first)
    count = cdiv(tokens, BLOCK)
    own = torch.arange(count, dtype=torch.int32, device=first.device)
    # The first and the last query of a block say which blocks of keys some of its queries see, and which all do: those
    # from `begin` on are cut by an edge, those from `cut` on full, and its own is cut by the diagonal. For a block of
    # fewer queries none is full, as in torch's own masks.
    begin, last = first[own * BLOCK] // BLOCK, own * BLOCK + BLOCK - 1
    whole = (first[last.clamp_max(tokens - 1)] + BLOCK - 1) // BLOCK
    cut = torch.where(last < tokens, torch.minimum(whole, own), own)
    partial = begin[:, None] + own[None, :]
    partial = torch.where(partial < cut[:, None], partial, own[:, None])

    def sees(_: Tensor, __: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= first[q]) & (k <= q)

    return BlockMask.from_kv_blocks(
        (cut - begin + 1)[None, None],
        partial[None, None].contiguous(),
        (own - cut)[None, None],
        torch.minimum(cut[:, None] + own[None, :], own[-1])[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )
