"""Turning by Hadamard blocks: its own inverse, invisible in a product, and what it is for: outliers."""

from __future__ import annotations

import pytest
import torch

from kitaeru.kernels.frozen import Stored, Weights, expand, scales_of
from kitaeru.kernels.rows import empty_rows, put_rows, round_rows
from kitaeru.kernels.turned import TURN, hadamard, turn

from .test_rows_norm_gated_rotary import FP8, apart, draw


def test_the_matrix_is_its_own_inverse() -> None:
    matrix = hadamard(torch.device("cpu"), torch.float64)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(TURN, dtype=torch.float64))
    assert torch.equal(matrix.bfloat16().double(), matrix)  # which is how kernels hold it


def test_neither_an_outlier_nor_a_mean_stays_in_one_place() -> None:
    """A single number, and a constant, become 64 numbers of one size."""
    for row in (torch.eye(TURN)[3], torch.ones(TURN)):
        assert torch.allclose(turn(row).abs(), (row.norm() / 8).expand(TURN))


def test_turned_on_both_sides_a_product_is_what_it_was() -> None:
    x, w = draw(5, 192, dtype=torch.float64), draw(7, 192, dtype=torch.float64, seed=1)
    assert apart(turn(x) @ turn(w).T, x @ w.T) < 1e-14
    assert apart(turn(turn(x)), x) < 1e-14
    assert apart(turn(x)[:, 64:128], turn(x[:, 64:128])) < 1e-14  # each block by itself


def test_only_int8_rows_of_products_lie_turned() -> None:
    x = draw(3, 128)
    assert round_rows(x, torch.int8).turned
    assert not round_rows(x, FP8).turned
    assert not round_rows(x, torch.float32).turned
    assert not empty_rows(3, 128, 0, torch.int8, x, plain=True).turned


@pytest.mark.parametrize("size", [30.0, 100.0])
def test_an_outlier_is_spread_over_its_neighbours(size: float) -> None:
    x = draw(64, 1024)
    x[:, 17] = size
    turned = put_rows(x, empty_rows(64, 1024, 0, torch.int8, x))
    plain = put_rows(x, empty_rows(64, 1024, 0, torch.int8, x, plain=True))
    assert apart(turned.values, x) < 0.3 * apart(plain.values, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_under_autocast_turned_weights_stay_within_int8(transposed: bool) -> None:
    """Layers are set up under autocast: scales of rows that were turned in bf16 let 127 become -128."""
    weights = Weights((Stored("16bit", (192, 256), 0.03 * draw(192, 256)),))
    with torch.autocast("cpu", torch.bfloat16):
        scales = scales_of(weights, torch.int8)
        scale = scales.backward if transposed else scales.forward
        w = expand(weights, scale, None, 0, torch.int8, transposed=transposed)
    assert scale is not None
    exact = weights.each[0].values()
    assert apart(turn(w.float() * scale[:, None]), exact.T if transposed else exact) < 0.01
