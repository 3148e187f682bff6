"""The sampler and the layout of micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from kitaeru.data.batches import Sampler, eval_batches, micro_batches
from kitaeru.data.corpus import Corpus
from kitaeru.errors import DataError


def corpus(lengths: Sequence[int], sources: Sequence[int] | None = None, weights: tuple[float, ...] = (1.0,)) -> Corpus:
    total = sum(lengths)
    offsets = np.cumsum([0, *lengths])
    trained = np.ones(total, np.bool_)
    trained[offsets[:-1]] = False
    return Corpus(
        tokens=np.arange(100, 100 + total, dtype=np.int32),
        trained=trained,
        offsets=offsets,
        files=("a.jsonl",),
        file_index=np.zeros(len(lengths), np.int32),
        rows=np.arange(1, len(lengths) + 1),
        sources=np.array(sources if sources is not None else [0] * len(lengths), np.int32),
        weights=weights,
    )


def test_a_micro_batch_s_layout() -> None:
    (row,) = micro_batches(corpus([3, 2]), [0, 1], micro_batch_tokens=8)
    assert row.input_ids.tolist() == [[100, 101, 102, 103, 104]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert row.targets.tolist() == [[101, 102, -100, 104, -100]]
    assert row.cu_seqlens.tolist() == [0, 3, 5]
    assert (row.longest, row.examples, row.tokens, row.trained_tokens) == (3, [0, 1], 5, 3)
    assert {str(row.input_ids.dtype), str(row.position_ids.dtype), str(row.targets.dtype)} == {"torch.int64"}
    assert str(row.cu_seqlens.dtype) == "torch.int32"


def test_without_packing_each_example_has_its_row() -> None:
    rows = micro_batches(corpus([3, 2]), [1, 0, 1], micro_batch_tokens=8, packing=False)
    assert [r.examples for r in rows] == [[1], [0], [1]]


def test_an_example_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="9 tokens") as caught:
        micro_batches(corpus([3, 9]), [0, 1], micro_batch_tokens=8)
    assert caught.value.where == "a.jsonl:2"


def test_evaluation_sees_each_example_once() -> None:
    seen = [i for row in eval_batches(corpus([5, 3, 4, 2]), micro_batch_tokens=8) for i in row.examples]
    assert sorted(seen) == [0, 1, 2, 3]
    some = [i for row in eval_batches(corpus([1] * 10), micro_batch_tokens=8, max_examples=3) for i in row.examples]
    assert some == [0, 3, 6]


def test_batches_are_filled_in_order_over_the_ends_of_epochs() -> None:
    sampler = Sampler(corpus([2] * 5), seed=1, global_batch_examples=3)
    stream = [i for _ in range(5) for i in sampler.next()]
    assert len(stream) == 15
    for epoch in range(3):
        assert sorted(stream[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert sampler.epoch == 3.0


def test_a_batch_takes_what_fits_and_at_least_one() -> None:
    lengths = [3, 7, 20, 4, 4, 1]
    sampler = Sampler(corpus(lengths), seed=3, global_batch_tokens=8)
    order = Sampler(corpus(lengths), seed=3, global_batch_examples=60).next()
    position = 0
    for _ in range(20):
        batch = sampler.next()
        assert batch == order[position : position + len(batch)]
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= 8
        position += len(batch)
        assert sum(lengths[i] for i in batch) + lengths[order[position]] > 8


def test_orders_depend_on_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        sampler = Sampler(corpus([1] * 50), seed=seed, global_batch_examples=50)
        return [sampler.next(), sampler.next()]

    first, second = epochs(0)
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


def test_the_order_is_the_same_everywhere() -> None:
    # Written down once: a numpy that shuffles otherwise would break every resumed run.
    order = Sampler(corpus([1] * 8), seed=7, global_batch_examples=8).next()
    assert order == [6, 3, 4, 0, 2, 7, 5, 1]


def test_weights_repeat_and_thin_out() -> None:
    data = corpus([1] * 25, sources=[0] * 5 + [1] * 10 + [2] * 10, weights=(2.0, 0.5, 1.0))
    sampler = Sampler(data, seed=0, global_batch_examples=25)  # 10 + 5 + 10
    first, second = Counter(sampler.next()), Counter(sampler.next())
    assert sampler.epoch == 2.0
    for count in (first, second):
        assert all(count[i] == 2 for i in range(5))
        assert sum(count[i] for i in range(5, 15)) == 5
        assert all(count[i] == 1 for i in range(15, 25))
    assert {i for i in first if 5 <= i < 15} != {i for i in second if 5 <= i < 15}


def test_odd_weights_come_out_exact_over_epochs() -> None:
    sampler = Sampler(corpus([1] * 3, weights=(0.5,)), seed=0, global_batch_examples=1)
    assert sampler.steps_in(8) == 12  # epochs of 1, 2, 1, 2, … of the 3 examples
    tiny = Sampler(corpus([1] * 3, weights=(0.01,)), seed=0, global_batch_examples=4)
    assert len(tiny.next()) == 4


def test_steps_in_epochs() -> None:
    sampler = Sampler(corpus([2] * 10), seed=0, global_batch_examples=4)
    assert [sampler.steps_in(e) for e in (0.4, 1, 2, 3)] == [1, 3, 5, 8]
    sampler.next()
    assert sampler.steps_in(1) == 3
    assert sampler.state_dict() == {"epoch": 0, "position": 4}


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="one of them"):
        Sampler(corpus([1]), seed=0)
    with pytest.raises(ValueError, match="empty"):
        Sampler(corpus([]), seed=0, global_batch_examples=1)
    with pytest.raises(ValueError, match="outside"):
        Sampler(corpus([1]), seed=0, global_batch_examples=1).load_state_dict({"epoch": 0, "position": 2})
