"""The fused layer's row kernels: references against torch's own autograd, Triton against the references on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kitaeru.kernels.gated import gated, gated_backward, gated_backward_reference, gated_reference
from kitaeru.kernels.norm import (
    add_normed,
    add_normed_reference,
    norm,
    norm_backward,
    norm_backward_reference,
    norm_reference,
    sandwich,
    sandwich_reference,
)
from kitaeru.kernels.rotary import (
    Heads,
    rotate,
    rotate_backward,
    rotate_backward_reference,
    rotate_reference,
)
from kitaeru.kernels.rows import Arithmetic, Rows, empty_rows, put_rows, round_rows, storage
from kitaeru.plan.fused import extra_columns

FP8 = torch.float8_e4m3fn


def apart(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(FP8, 0.03), (torch.int8, 0.011), (torch.float32, 0.0)])
def test_rounding_keeps_a_row_to_its_precision(dtype: torch.dtype, bound: float) -> None:
    x = draw(9, 256) * torch.logspace(-6, 3, 9)[:, None]
    rows = round_rows(x, dtype, 16)
    assert rows.data.shape == (9, 272)
    for row in range(9):  # whatever a row's size
        assert apart(rows.values[row], x[row]) <= bound


def test_a_row_of_zeros_stays_zero() -> None:
    for dtype in (FP8, torch.int8):
        assert not round_rows(torch.zeros(2, 64), dtype).values.any()


def test_norm_and_its_backward_are_autograds() -> None:
    x, delta, weight, up = draw(5, 64), draw(5, 64, seed=1), draw(64, seed=2), draw(5, 64, seed=3)
    leaf = x.clone().requires_grad_()
    total = leaf + delta
    y = F.rms_norm(total, (64,), weight, 1e-5)
    along = draw(5, 64, seed=4)
    (expected,) = torch.autograd.grad((y * up).sum() + (total * along).sum(), leaf)
    got_total, rows, rstd = norm_reference(x, delta, weight, 1e-5, torch.float32, 0)
    assert apart(got_total, total) < 1e-6
    assert apart(rows.values, y) < 1e-6
    dx, none = norm_backward_reference(up, rows, rstd, weight, along, None, 0)
    assert none is None
    assert dx is not None
    assert apart(dx, expected) < 1e-5


def test_a_norm_of_what_is_added_and_its_backward_are_autograds() -> None:
    x, delta, post, weight, up, along = (draw(*size, seed=s) for s, size in enumerate([(5, 64), (5, 64), (64,), (64,)]
                                         + [(5, 64)] * 2))  # fmt: skip
    leaf = delta.clone().requires_grad_()
    total = x + F.rms_norm(leaf, (64,), post, 1e-3)
    y = F.rms_norm(total, (64,), weight, 1e-3)
    (expected,) = torch.autograd.grad((y * up).sum() + (total * along).sum(), leaf)
    got_total, added, rows, rstd = sandwich_reference(x, delta, post, torch.float32, weight, 1e-3, torch.float32, 0)
    assert apart(got_total, total) < 1e-6
    assert apart(rows.values, y) < 1e-6
    d_total, _ = norm_backward_reference(up, rows, rstd, weight, along, None, 0)
    assert d_total is not None
    none, d_delta = norm_backward_reference(d_total, added.rows, added.rstd, post, None, torch.float32, 8)
    assert none is None
    assert d_delta is not None
    assert apart(d_delta.values, expected) < 1e-5
    again = x.clone()
    for into in (again, None):  # in place, or only what is kept
        kept = add_normed_reference(into, delta, post, 1e-3, torch.float32)
        assert torch.equal(kept.rows.data, added.rows.data)
    assert torch.equal(again, got_total)


@pytest.mark.parametrize(("dtype", "bound"), [(FP8, 0.08), (torch.int8, 0.13)])
def test_a_weight_of_nearly_nought_does_not_make_rounding_large(dtype: torch.dtype, bound: float) -> None:
    """As real models have them: some channels of the norm's weight are a thousandth of the rest, and less."""
    x, up = draw(64, 256), draw(64, 256, seed=1)
    weight = 1 + 0.1 * draw(256, seed=2)
    weight[::16] = torch.logspace(-6, -2, 16)
    up += 0.5 * x * weight  # not at right angles to the result, as a gradient at random is
    along = torch.zeros_like(x)
    exact = norm_reference(x, None, weight, 1e-5, torch.float32, 0)
    rounded = norm_reference(x, None, weight, 1e-5, dtype, 0)
    expected, _ = norm_backward_reference(up, *exact[1:], weight, along, None, 0)
    found, _ = norm_backward_reference(up, *rounded[1:], weight, along, None, 0)
    assert expected is not None
    assert found is not None
    assert apart(found, expected) < bound


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_and_its_backward_are_autograds(activation: str) -> None:
    both, up = draw(5, 128), draw(5, 64, seed=1)
    leaf = both.clone().requires_grad_()
    gate, right = leaf.chunk(2, 1)
    y = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * right
    (expected,) = torch.autograd.grad((y * up).sum(), leaf)
    rows, kept = gated_reference(both, activation, torch.float32, 0, torch.float32)  # type: ignore[arg-type]
    gradient, product = gated_backward_reference(up, kept, activation, torch.float32, 0)  # type: ignore[arg-type]
    assert apart(rows.values, y) < 1e-6
    assert apart(product.values, y) < 1e-6
    assert apart(gradient.values, expected) < 1e-6


def angles(tokens: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    turns = torch.arange(tokens)[:, None] * 100.0 ** (-torch.arange(size // 2) / (size // 2))
    turns = torch.cat([turns, turns], 1)
    return turns.cos().to(device, dtype), turns.sin().to(device, dtype)


def heads_of(
    normed: bool, device: str = "cpu", dtype: torch.dtype = torch.float32, query: int = 4, size: int = 32
) -> Heads:
    weights = [1 + 0.3 * draw(size, seed=s).to(device, dtype) for s in (7, 8)] if normed else [None, None]
    return Heads(query, 2, size, *weights)


@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_its_backward_are_autograds(normed: bool) -> None:
    heads = heads_of(normed)
    qkv, up = draw(6, heads.width), draw(6, heads.width, seed=1)
    cos, sin = angles(6, 32)
    leaf = qkv.clone().requires_grad_()
    parts = []
    for part, weight in zip(heads.split(leaf), (heads.q_norm, heads.k_norm, None), strict=True):
        if weight is not None:
            part = F.rms_norm(part, (32,), weight, heads.eps)
        if part.shape[1] == heads.query or len(parts) < 2:
            low, high = part.chunk(2, 2)
            part = part * cos[:, None] + torch.cat([-high, low], 2) * sin[:, None]
        parts.append(part)
    expected = torch.autograd.grad((torch.cat([p.flatten(1) for p in parts], 1) * up).sum(), leaf)[0]
    turned = qkv.clone()
    inverse = rotate_reference(turned, cos, sin, heads)
    assert apart(turned, torch.cat([p.flatten(1) for p in parts], 1)) < 1e-6
    got = rotate_backward_reference(*heads.split(up), turned, inverse, cos, sin, heads, torch.float32, 0)
    assert apart(got.values, expected) < 1e-5


# ---- Triton against the references ------------------------------------------------------------------------------

ARITHMETICS: tuple[Arithmetic, ...] = ("16bit", "fp8", "int8")


def same_rows(ours: Rows, theirs: Rows) -> None:
    """Equal but for values that lie on the border between two roundings."""
    assert ours.turned == theirs.turned
    if theirs.scale is not None:
        assert ours.scale is not None
        assert apart(ours.scale, theirs.scale) < 1e-3
    assert apart(ours.values, theirs.values) < (0.006 if theirs.scale is not None else 0.004)


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("width", [4096, 192, 1344, 14336])
def test_triton_rounds_as_the_reference(arithmetic: Arithmetic, width: int) -> None:
    x = draw(37, width, dtype=torch.bfloat16, device="cuda")
    dtype = storage(arithmetic, torch.bfloat16)
    same_rows(round_rows(x, dtype, 32), put_rows(x, empty_rows(37, width, 32, dtype, x)))


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("width", [4096, 1344])
def test_triton_norm_is_the_reference(arithmetic: Arithmetic, width: int) -> None:
    x, delta, up, along = (draw(37, width, dtype=torch.bfloat16, device="cuda", seed=s) for s in range(4))
    weight = 1 + 0.3 * draw(width, dtype=torch.bfloat16, device="cuda", seed=5)
    dtype, extra = storage(arithmetic, torch.bfloat16), extra_columns(arithmetic, 8)
    for second in (None, delta):
        ours, theirs = (f(x, second, weight, 1e-5, dtype, extra) for f in (norm, norm_reference))
        assert apart(ours[0], theirs[0]) < 1e-6
        assert apart(ours[2], theirs[2]) < 1e-3
        same_rows(ours[1], theirs[1])
        back, reference = (
            f(up, theirs[1], theirs[2], weight, along, dtype, extra) for f in (norm_backward, norm_backward_reference)
        )
        assert back[0] is not None
        assert reference[0] is not None
        assert apart(back[0], reference[0]) < 4e-3
        assert back[1] is not None
        assert reference[1] is not None
        same_rows(back[1], reference[1])


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("width", [3584, 1344])
def test_triton_norms_what_is_added_as_the_reference(arithmetic: Arithmetic, width: int) -> None:
    x, delta, up = (draw(37, width, dtype=torch.bfloat16, device="cuda", seed=s) for s in range(3))
    post, weight = (1 + 0.3 * draw(width, device="cuda", seed=s) for s in (5, 6))
    dtype, extra = storage(arithmetic, torch.bfloat16), extra_columns(arithmetic, 8)
    ours, theirs = (f(x, delta, post, dtype, weight, 1e-5, dtype, extra) for f in (sandwich, sandwich_reference))
    assert apart(ours[0], theirs[0]) < 1e-3
    assert apart(ours[3], theirs[3]) < 1e-3
    same_rows(ours[2], theirs[2])
    totals = x.clone(), x.clone()
    alone = [f(t, delta, post, 1e-5, dtype) for f, t in zip((add_normed, add_normed_reference), totals, strict=True)]
    assert apart(totals[0], totals[1]) < 1e-3
    for mine, his in (
        (ours[1], theirs[1]),
        (alone[0], alone[1]),
        (add_normed(None, delta, post, 1e-5, dtype), alone[1]),
    ):
        same_rows(mine.rows, his.rows)
        assert apart(mine.rstd, his.rstd) < 1e-3
    back, reference = (
        f(up, theirs[1].rows, theirs[1].rstd, post, None, dtype, extra)
        for f in (norm_backward, norm_backward_reference)
    )
    assert back[0] is reference[0] is None
    assert back[1] is not None
    assert reference[1] is not None
    same_rows(back[1], reference[1])


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1344, 14336])
def test_triton_gated_is_the_reference(arithmetic: Arithmetic, activation: str, width: int) -> None:
    both = draw(19, 2 * width, dtype=torch.bfloat16, device="cuda")
    up = draw(19, width, dtype=torch.bfloat16, device="cuda", seed=1)
    dtype = storage(arithmetic, torch.bfloat16)
    for keep in (torch.bfloat16, dtype):
        ours, theirs = (f(both, activation, dtype, 16, keep) for f in (gated, gated_reference))  # type: ignore[arg-type]
        same_rows(ours[0], theirs[0])
        same_rows(ours[1].gate, theirs[1].gate)
        same_rows(ours[1].up, theirs[1].up)
        back, reference = (
            f(up, ours[1], activation, dtype, 16)  # type: ignore[arg-type]
            for f in (gated_backward, gated_backward_reference)
        )
        same_rows(back[0], reference[0])
        same_rows(back[1], reference[1])


@pytest.mark.gpu
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_triton_rotation_is_the_reference(arithmetic: Arithmetic, normed: bool, size: int) -> None:
    """Heads smaller than what is turned at a time, as large, and larger."""
    heads = heads_of(normed, "cuda", torch.bfloat16, query=6, size=size)
    qkv = draw(23, heads.width, dtype=torch.bfloat16, device="cuda")
    cos, sin = angles(23, size, "cuda", torch.bfloat16)
    ours, theirs = qkv.clone(), qkv.clone()
    inverse, expected = rotate(ours, cos, sin, heads), rotate_reference(theirs, cos, sin, heads)
    assert apart(ours, theirs) < 5e-3
    if normed:
        assert inverse is not None
        assert expected is not None
        assert apart(inverse, expected) < 1e-3
    up = heads.split(draw(23, heads.width, dtype=torch.bfloat16, device="cuda", seed=1))
    dtype = storage(arithmetic, torch.bfloat16)
    same_rows(
        rotate_backward(*up, theirs, expected, cos, sin, heads, dtype, 16),
        rotate_backward_reference(*up, theirs, expected, cos, sin, heads, dtype, 16),
    )
