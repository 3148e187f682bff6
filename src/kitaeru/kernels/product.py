"""The matrix product of activations and a frozen weight, with the adapter's part in the same pass.

x: Rows [T, K + E], w: [N, K + E] as `frozen.expand` gives it, turned or not as x lies, `scale` fp32 [N]; the result is
[T, N] in 16 bits.
16 bits and FP8 go through cuBLAS, INT8 through a kernel whose last step adds the adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kitaeru.kernels.rows import Rows
from kitaeru.kernels.triton_or_none import cdiv, launch, power_of_two, tl, triton, use_triton


def product_reference(
    x: Rows, w: Tensor, scale: Tensor | None, dtype: torch.dtype, thin: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The definition. `thin`: (x A^T [T, R], B [N, R]) where they are not among the further columns."""
    if x.scale is None:
        result = x.data @ w.T
    else:
        assert scale is not None
        result = (x.data.float() * x.scale[:, None]) @ (w.float() * scale[:, None]).T
    if thin is not None:
        result = result + thin[0].to(result.dtype) @ thin[1].to(result.dtype).T
    return result.to(dtype)


def product(
    x: Rows, w: Tensor, scale: Tensor | None, dtype: torch.dtype, thin: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The same. FP8 products add in the tensor cores' own, fast way."""
    if not use_triton(w):
        return product_reference(x, w, scale, dtype, thin)
    if x.scale is None:
        return torch.mm(x.data, w.t())
    assert scale is not None
    if w.dtype == torch.float8_e4m3fn:
        return torch._scaled_mm(
            x.data, w.t(), scale_a=x.scale[:, None], scale_b=scale[None, :], out_dtype=dtype, use_fast_accum=True
        )
    tokens, outputs, inputs = len(x.data), len(w), x.width
    out = torch.empty((tokens, outputs), dtype=dtype, device=w.device)
    left, right = (x.data, w) if thin is None else thin
    rank = 0 if thin is None else left.shape[1]

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (cdiv(tokens, meta["ROWS"]) * cdiv(outputs, meta["COLUMNS"]),)

    arguments = (
        x.data, w, x.scale, scale, left, right, out, tokens, outputs, inputs, x.data.stride(0), w.stride(0), rank,
        left.stride(0), right.stride(0), right.stride(1),
    )  # fmt: skip
    constants = {"THIN": thin is not None, "RANK": power_of_two(max(rank, 16))}
    which = (outputs, inputs, w.device)
    if which in _tuned:
        best = _tuned[which]
        launch(_int8.fn, grid(best), *arguments, **constants, **best)
    else:
        _int8[grid](*arguments, **constants)
        _tuned[which] = _int8.best_config.all_kwargs()
    return out


# The fastest configuration of INT8's kernel, by its key and the device.
_tuned: dict[tuple[int, int, torch.device], dict[str, int]] = {}


if triton is not None:
    # 96 KB of shared memory at most, which is what sm_86 has.
    _CONFIGS = [
        triton.Config({"ROWS": 128, "COLUMNS": 128, "INNER": 64, "GROUP": 8}, num_warps=8, num_stages=4),
        triton.Config({"ROWS": 128, "COLUMNS": 256, "INNER": 64, "GROUP": 8}, num_warps=8, num_stages=3),
        triton.Config({"ROWS": 128, "COLUMNS": 128, "INNER": 128, "GROUP": 8}, num_warps=8, num_stages=3),
        triton.Config({"ROWS": 128, "COLUMNS": 128, "INNER": 128, "GROUP": 8}, num_warps=4, num_stages=3),
    ]

    @triton.autotune(configs=_CONFIGS, key=["outputs", "inputs"])
    @triton.jit
    def _int8(  # type: ignore[no-untyped-def]
        x, w, x_scale, w_scale, left, right, out, tokens, outputs, inputs, x_stride, w_stride, rank, left_stride,
        right_row, right_rank,
        THIN: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
        GROUP: tl.constexpr,
    ):  # fmt: skip
        # Tiles in groups of rows, so that what neighbours read is still in the cache.
        down, across = tl.cdiv(tokens, ROWS), tl.cdiv(outputs, COLUMNS)
        tile = tl.program_id(0)
        group = tile // (GROUP * across)
        size = min(down - group * GROUP, GROUP)
        of_rows = group * GROUP + (tile % (GROUP * across)) % size
        of_columns = (tile % (GROUP * across)) // size
        row = of_rows * ROWS + tl.arange(0, ROWS)
        column = of_columns * COLUMNS + tl.arange(0, COLUMNS)
        k = tl.arange(0, INNER)
        x_at = x + (row % tokens).to(tl.int64)[:, None] * x_stride + k[None, :]
        w_at = w + (column % outputs).to(tl.int64)[None, :] * w_stride + k[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.int32)
        for start in range(0, inputs, INNER):
            rest = inputs - start
            a = tl.load(x_at, mask=k[None, :] < rest, other=0)
            b = tl.load(w_at, mask=k[:, None] < rest, other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
            x_at += INNER
            w_at += INNER
        row_inside, column_inside = row < tokens, column < outputs
        by_row = tl.load(x_scale + row, mask=row_inside, other=0)
        by_column = tl.load(w_scale + column, mask=column_inside, other=0)
        result = total.to(tl.float32) * by_row[:, None] * by_column[None, :]
        if THIN:
            r = tl.arange(0, RANK)
            a = tl.load(
                left + row[:, None] * left_stride + r[None, :],
                mask=row_inside[:, None] & (r[None, :] < rank),
                other=0,
            )
            b = tl.load(
                right + column[None, :] * right_row + r[:, None] * right_rank,
                mask=column_inside[None, :] & (r[:, None] < rank),
                other=0,
            )
            result = tl.dot(a, b, result)
        place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])
