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
    """[..., K] turned, K a multiple of 64. Turned twice it is what it was. In the numbers of `values`, under autocast
    too: a scale that is taken from numbers rounded otherwise lets the largest one leave INT8.
    """
    with torch.autocast(values.device.type, enabled=False):
        return (values.reshape(-1, TURN) @ hadamard(values.device, values.dtype)).view(values.shape)


if triton is not None:

    @triton.jit
    def _sixteen():  # type: ignore[no-untyped-def]
        """[16, 16] in bf16: the factor of `hadamard` for bits 0, 1, 4 and 5, in the order 1, 5, 4, 0."""
        at = tl.arange(0, 16)
        bent = at & (at >> 3) ^ (at >> 1) & (at >> 2)
        odd = (at[:, None] & at[None, :]) ^ (bent[:, None] ^ bent[None, :]) & 1
        odd = odd ^ (odd >> 2)
        odd = (odd ^ (odd >> 1)) & 1
        return (0.125 - 0.25 * odd.to(tl.float32)).to(tl.bfloat16)

    @triton.jit
    def turned(values):  # type: ignore[no-untyped-def]
        """`turn` in fp32 of values of any shape, a multiple of 512 numbers in all whose last dimension is one of 64.

        `hadamard` is a Kronecker product of a matrix for bits 0, 1, 4, 5 of a number's place, and one for 2 and 3. The
        first is a product of tensor cores, which want its 16 numbers in four threads as they lie where each thread has
        loaded 16 neighbours; its result lies likewise; the second stays in a thread. So nothing is exchanged. bf16
        values are read as they are, fp32 ones as two numbers in bf16 (16 significant bits).
        """
        many: tl.constexpr = values.numel // 512
        # Sums of one number: the compiler, looking for the type that was loaded, does not see through them.
        hidden = tl.sum(tl.reshape(values, (many, 8, 4, 2, 2, 2, 2, 1)), 7)
        places = tl.permute(hidden, (0, 3, 4, 1, 5, 2, 6))
        rows = tl.reshape(places, (many, 32, 16))
        matrix = tl.broadcast_to(_sixteen()[None, :, :], (many, 16, 16))
        if rows.dtype == tl.bfloat16:
            result = tl.dot(rows, matrix)
        else:
            high = (rows.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
            result = tl.dot(high.to(tl.bfloat16), matrix)
            result = tl.dot((rows - high).to(tl.bfloat16), matrix, result)
        places = tl.reshape(result, (many, 2, 2, 8, 2, 4, 2))
        low, high = tl.split(tl.permute(places, (0, 2, 3, 4, 5, 6, 1)))
        a, b = tl.split(tl.permute(low, (0, 2, 3, 4, 5, 1)))
        c, d = tl.split(tl.permute(high, (0, 2, 3, 4, 5, 1)))
        first, second = tl.join(a + b + (c - d), a + b - (c - d)), tl.join(a - b + (c + d), c + d - (a - b))
        return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 3, 5, 6, 2, 4)), values.shape)
