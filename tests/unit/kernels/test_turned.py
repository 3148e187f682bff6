"""Turning by Hadamard blocks: its own inverse, invisible in a product, and what it is for: outliers."""

from __future__ import annotations

import pytest
import torch

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
