"""Best-fit decreasing."""

from __future__ import annotations

import pytest

from kitaeru.data.pack import pack


def test_each_goes_where_it_fits_best() -> None:
    # 6 opens, 5 opens, 4 fits neither of 10's rests 4 (exactly: bin of 6), then 3 into the 5's, 2 beside them.
    assert pack([2, 3, 4, 5, 6], 10) == [[2, 4], [0, 1, 3]]


def test_equal_lengths_keep_their_order() -> None:
    assert pack([4, 4, 4], 8) == [[0, 1], [2]]


def test_nothing_packs_into_nothing() -> None:
    assert pack([], 8) == []


@pytest.mark.parametrize("lengths", [[9], [1, 0]])
def test_what_does_not_fit_is_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="budget"):
        pack(lengths, 8)
