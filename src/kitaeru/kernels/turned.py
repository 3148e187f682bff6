"""Turning the rows of a matrix by a Hadamard matrix, 64 neighbours at a time, before they are rounded to INT8.

With H = [64 x 64 of +-1] / 8, which is its own inverse, x W^T = (x H) (W H)^T block by block: where both sides of a
product are turned along what is summed, the product is the same. An outlier is spread over its 64 neighbours, so that
the one scale of a row fits all its numbers. H is Sylvester's matrix with the signs of a bent function on rows and
columns: in Sylvester's own a mean that is not nought would become an outlier, since one of its columns is constant.
Measured: docs/notes/0019. Sources: QuaRot (arXiv 2404.00456); SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kitaeru.kernels.triton_or_none import tl, triton
from kitaeru.plan.stored import NF4_BLOCK

TURN = NF4_BLOCK


@lru_cache(maxsize=16)
def hadamard(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[64, 64], symmetric and orthogonal. With numbers i = (i5 ... i0) in bits, entry (i, j) is 1/8, negative where the
    sum of all ik jk and of q(i) and q(j) is odd, q(i) = i0 i1 + i2 i3 + i4 i5.
    """
    matrix = torch.ones((1, 1), dtype=dtype, device=device)
    while len(matrix) < TURN:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    bent = [(-1) ** (i & (i >> 1) & 0b010101).bit_count() for i in range(TURN)]
    signs = torch.tensor(bent, dtype=dtype, device=device)
    return signs[:, None] * matrix * signs / math.sqrt(TURN)


def turn(values: Tensor) -> Tensor:
    """[..., K] turned, K a multiple of 64. Turned twice it is what it was."""
    return (values.reshape(-1, TURN) @ hadamard(values.device, values.dtype)).view(values.shape)


if triton is not None:

    @triton.jit
    def turning():  # type: ignore[no-untyped-def]
        """`hadamard` in bf16, which holds it exactly, made from its definition."""
        at = tl.arange(0, 64)
        bent = at & (at >> 1) & 21
        odd = (at[:, None] & at[None, :]) ^ bent[:, None] ^ bent[None, :]
        odd = odd ^ (odd >> 4)
        odd = odd ^ (odd >> 2)
        odd = (odd ^ (odd >> 1)) & 1
        return (0.125 - 0.25 * odd.to(tl.float32)).to(tl.bfloat16)

    @triton.jit
    def turned(values, matrix, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`turn` of values of any shape with 64 ROWS numbers, ROWS >= 16; read in bf16, added in fp32."""
        rows = tl.reshape(values, (ROWS, 64)).to(tl.bfloat16)
        return tl.reshape(tl.dot(rows, matrix), values.shape)
