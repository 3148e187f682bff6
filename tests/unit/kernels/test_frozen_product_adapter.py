"""Frozen weights, their products with an adapter's part, and the adapter's gradients."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from kitaeru.kernels.adapter import gradients, gradients_reference, project, project_reference
from kitaeru.kernels.copies import (
    Copy,
    Share,
    Shares,
    copy_adapters,
    copy_reference,
    digits_reference,
    empty_copy,
    second_digit,
)
from kitaeru.kernels.frozen import Stored, Weights, expand, expand_reference, scales_of
from kitaeru.kernels.product import product, product_reference
from kitaeru.kernels.rows import Arithmetic, round_rows, storage
from kitaeru.kernels.turned import turn
from kitaeru.plan.fused import extra_columns

from .test_rows_norm_gated_rotary import apart, draw

ARITHMETICS: tuple[Arithmetic, ...] = ("16bit", "fp8", "int8")


def copied(p: Tensor, arithmetic: Arithmetic) -> Copy:
    """P as kernels read it for rows in this arithmetic."""
    dtype = storage(arithmetic, p.dtype)
    return Copy(p) if arithmetic == "16bit" else Copy(p, *digits_reference(p, dtype))


def nf4(weight: Tensor, *, nested: bool = True) -> Stored:
    data, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    shape = (weight.shape[0], weight.shape[1])
    if not nested:
        return Stored("nf4", shape, data, state.absmax, state.code)
    inner = state.state2
    return Stored(
        "nf4", shape, data, state.absmax, state.code, inner.code, inner.absmax, float(state.offset)
    )  # fmt: skip


def int8(weight: Tensor) -> Stored:
    absmax = weight.float().abs().amax(1)
    data = (weight.float() / absmax[:, None] * 127).round().to(torch.int8)
    return Stored("int8", (weight.shape[0], weight.shape[1]), data, absmax)


def stored(
    kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, outputs: tuple[int, ...] = (128, 64)
) -> Weights:
    """Weights that read the same input of 192."""
    weights = [draw(n, 192, seed=n, device=device, dtype=dtype) * 0.03 for n in outputs]
    make = {"16bit": lambda w: Stored("16bit", tuple(w.shape), w), "int8": int8, "nf4": nf4,
            "nf4 plain": lambda w: nf4(w, nested=False)}[kind]  # fmt: skip
    return Weights(tuple(make(w) for w in weights))


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_is_read_as_bitsandbytes_reads_it(nested: bool) -> None:
    weight = draw(96, 192) * 0.03
    data, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    assert apart(nf4(weight, nested=nested).values(), bnb.dequantize_4bit(data, state)) < 1e-6


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", ["16bit", "int8", "nf4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_product_gives_base_and_adapter(arithmetic: Arithmetic, kind: str, transposed: bool) -> None:
    weights = stored(kind)
    dtype, rank = storage(arithmetic, torch.float32), 8
    extra = extra_columns(arithmetic, rank)
    whole = torch.cat([w.values() for w in weights.each])
    whole = whole.T if transposed else whole
    p, adapter = 0.1 * draw(rank, whole.shape[1], seed=1), 0.02 * draw(len(whole), rank, seed=2)
    x = draw(7, whole.shape[1], seed=3)
    scale = scales_of(weights, dtype)
    by = scale.backward if transposed else scale.forward
    rows = round_rows(x, dtype, extra)
    thin = project(rows, copied(p, arithmetic))
    w = expand(weights, by, adapter, extra, dtype, transposed=transposed)
    got = product(rows, w, by, torch.float32, None if extra else (thin, adapter))
    exact = x @ whole.T + (x @ p.T) @ adapter.T
    bound = {"16bit": 1e-5, "fp8": 0.05, "int8": 0.02}[arithmetic]
    assert apart(got, exact) < bound
    # The adapter's own part is right too, not only small.
    without = product(round_rows(x, dtype), expand(weights, by, adapter, 0, dtype, transposed=transposed), by,
                      torch.float32)  # fmt: skip
    assert apart(got - without, (x @ p.T) @ adapter.T) < bound


@pytest.mark.parametrize(("arithmetic", "bound"), [("fp8", 2**-8), ("int8", 2**-14)])
def test_two_numbers_in_8_bits_stand_for_one(arithmetic: Arithmetic, bound: float) -> None:
    p = draw(12, 192) * torch.logspace(-4, 2, 12)[:, None]
    digits, scale = digits_reference(p, storage(arithmetic, torch.float32))
    first, second = digits.float()
    values = scale[:, None] * (first + second * second_digit(digits.dtype))
    whole = turn(p) if arithmetic == "int8" else p
    assert ((values - whole).abs().amax(1) <= bound * whole.abs().amax(1)).all()
    assert apart(values, whole) < bound


THREE = Shares((Share(0, 4, 0, 128, 2.0), Share(4, 6, 128, 64, 0.5), Share(10, 2, 256, 192, 1.0)))
SHARES = (THREE, Shares((Share(0, 12, 64, 128, 1.5),)), Shares((Share(0, 1, 0, 128, 1.0), Share(1, 16, 192, 256, 2.0))))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shares", SHARES)
def test_gradients_of_adapters_are_outer_products(arithmetic: Arithmetic, shares: Shares) -> None:
    dtype = storage(arithmetic, torch.float32)
    thin, dthin = draw(50, shares.rank), draw(50, shares.rank, seed=1)
    x, dy = draw(50, 192, seed=2), draw(50, 448, seed=3)
    found = gradients(round_rows(x, dtype, 16), thin, dthin, round_rows(dy, dtype, 16), shares)
    for share, (of_a, of_b) in zip(shares.each, found, strict=True):
        rank, columns = slice(share.row, share.row + share.rank), slice(share.column, share.column + share.outputs)
        bound = {"16bit": 1e-6, "fp8": 0.04, "int8": 0.02}[arithmetic]
        assert apart(of_a, dthin[:, rank].T @ x) < bound
        assert apart(of_b, share.scaling * dy[:, columns].T @ thin[:, rank]) < bound


@pytest.mark.parametrize("kinds", [["nf4"] * 5, ["nf4", "16bit", "nf4"], ["nf4", "nf4 plain"], ["16bit"] * 2])
def test_weights_are_grouped_by_how_they_are_stored(kinds: list[str]) -> None:
    weights = Weights(tuple(weight for kind in kinds for weight in stored(kind, outputs=(64,)).each))
    assert [m for group in weights.groups for m in group.members] == list(weights.each)
    for group in weights.groups:
        assert len(group.members) <= 3
        assert len({(m.kind, m.absmax is not None and m.absmax.dtype) for m in group.members}) == 1
    assert sum(group.outputs for group in weights.groups) == weights.shape[0] == 64 * len(kinds)


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kind", ["16bit", "int8", "nf4", "nf4 plain"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [8, 12, 48])
@pytest.mark.parametrize("outputs", [(128,), (128, 64), (64, 192, 128), (64,) * 4])
def test_triton_expands_as_the_reference(
    arithmetic: Arithmetic, kind: str, transposed: bool, rank: int, outputs: tuple[int, ...]
) -> None:
    weights = stored(kind, "cuda", torch.bfloat16, outputs)
    dtype = storage(arithmetic, torch.bfloat16)
    scale = scales_of(weights, dtype)
    by = scale.backward if transposed else scale.forward
    adapter = 0.02 * draw(192 if transposed else sum(outputs), rank, seed=2, device="cuda", dtype=torch.bfloat16)
    extra = extra_columns(arithmetic, rank)
    ours, theirs = (f(weights, by, adapter, extra, dtype, transposed=transposed) for f in (expand, expand_reference))
    assert apart(ours.float(), theirs.float()) < 0.006
    if extra:
        sums = []
        for found in (
            ours,
            theirs,
        ):  # where a high part is on the edge between two numbers, the low one makes up for it
            parts = found[:, -extra:].float()
            sums.append(parts[:, :rank] + parts[:, rank : 2 * rank] if arithmetic == "fp8" else parts)
        assert apart(*sums) < 0.006


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shares", SHARES)
def test_triton_copies_adapters_as_the_reference(arithmetic: Arithmetic, shares: Shares) -> None:
    dtype = storage(arithmetic, torch.bfloat16)
    parameters = [
        draw(*shape, seed=7 * n + side, device="cuda")
        for n, s in enumerate(shares.each)
        for side, shape in enumerate(((s.rank, 1344), (s.outputs, s.rank)))
    ]
    found = []
    for copy in (copy_adapters, copy_reference):
        sides = [empty_copy(shares.rank, n, torch.bfloat16, dtype, torch.device("cuda")) for n in (1344, 448)]
        for _ in range(2):
            copy(shares, parameters, *sides)
        found.append(sides)
    for ours, theirs in zip(*found, strict=True):
        assert ours.wide.equal(theirs.wide)
        if ours.digits is not None and theirs.digits is not None:
            ours_whole, theirs_whole = (
                c.scale[:, None] * (c.digits[0].float() + c.digits[1].float() * second_digit(dtype))
                for c in (ours, theirs)
            )
            assert apart(ours_whole, theirs_whole) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("tokens", "width", "rank"), [(333, 1344, 12), (4096, 4096, 48), (512, 14336, 16)])
def test_triton_thin_products_are_the_references(arithmetic: Arithmetic, tokens: int, width: int, rank: int) -> None:
    x = draw(tokens, width, device="cuda", dtype=torch.bfloat16)
    p = 0.02 * draw(rank, width, seed=1, device="cuda", dtype=torch.bfloat16)
    extra = extra_columns(arithmetic, rank)
    ours, theirs = (round_rows(x, storage(arithmetic, torch.bfloat16), extra) for _ in range(2))
    copy = copied(p, arithmetic)
    thin, expected = project(ours, copy), project_reference(theirs, copy)
    assert apart(thin, expected) < 5e-3
    assert apart(ours.data[:, width:].float(), theirs.data[:, width:].float()) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("tokens", [333, 4096])
@pytest.mark.parametrize("shares", SHARES)
def test_triton_sums_gradients_as_the_reference(arithmetic: Arithmetic, tokens: int, shares: Shares) -> None:
    dtype = storage(arithmetic, torch.bfloat16)
    thin, dthin, x, dy = (
        draw(tokens, width, seed=width, device="cuda", dtype=torch.bfloat16)
        for width in (shares.rank, shares.rank, 1344, 448)
    )
    for before in (torch.bfloat16, dtype):  # the attention's output is not rounded
        rows = (round_rows(x, before), thin, dthin, round_rows(dy, dtype, 16), shares)
        for _ in range(2):  # the second launch is the short one
            for ours, theirs in zip(gradients(*rows), gradients_reference(*rows), strict=True):
                assert apart(ours[0], theirs[0]) < 5e-3
                assert apart(ours[1], theirs[1]) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("tokens", [100, 1024])
def test_products_on_a_gpu_are_the_references(arithmetic: Arithmetic, tokens: int) -> None:
    weights = stored("nf4", "cuda", torch.bfloat16)
    dtype, rank = storage(arithmetic, torch.bfloat16), 12
    scale, extra = scales_of(weights, dtype), extra_columns(arithmetic, rank)
    x = round_rows(draw(tokens, 192, device="cuda", dtype=torch.bfloat16), dtype, extra)
    p, adapter = (0.05 * draw(n, rank, seed=n, device="cuda", dtype=torch.bfloat16) for n in (192, 192))
    thin = project(x, copied(p.T.contiguous(), arithmetic))
    w = expand(weights, scale.forward, adapter, extra, dtype, transposed=False)
    apart_from = None if extra else (thin, adapter)
    ours = product(x, w, scale.forward, torch.bfloat16, apart_from)
    assert apart(ours, product_reference(x, w, scale.forward, torch.float32, apart_from)) < 0.01
