"""How micro-batches are dealt out."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitaeru.parallel import STRATEGIES, ddp, fsdp

SIZES = st.lists(st.integers(1, 4096), min_size=1, max_size=40)


@given(tokens=SIZES, ranks=st.integers(1, 8), name=st.sampled_from(["ddp", "fsdp"]))
def test_each_micro_batch_is_computed_once(tokens: list[int], ranks: int, name: str) -> None:
    hands = STRATEGIES[name].deal(tokens, ranks)
    assert len(hands) == ranks
    assert sorted(n for hand in hands for n in hand if n is not None) == list(range(len(tokens)))


@given(tokens=SIZES, ranks=st.integers(1, 8))
def test_ddp_balances_tokens(tokens: list[int], ranks: int) -> None:
    loads = [sum(tokens[n] for n in hand if n is not None) for hand in ddp.deal(tokens, ranks)]
    assert max(loads) - min(loads) <= max(tokens)
    # Graham's bound for the longest-first rule, with the best that any dealing could do.
    assert max(loads) <= 4 / 3 * max(sum(tokens) / ranks, max(tokens)) + max(tokens) / 3


@given(tokens=SIZES, ranks=st.integers(1, 8))
def test_fsdp_keeps_ranks_in_step(tokens: list[int], ranks: int) -> None:
    hands = fsdp.deal(tokens, ranks)
    assert {len(hand) for hand in hands} == {-(-len(tokens) // ranks)}
    assert sum(n is None for hand in hands for n in hand) < ranks


@pytest.mark.parametrize("module", [ddp, fsdp])
def test_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
