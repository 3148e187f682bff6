"""Laws of packing and sampling."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kitaeru.data.batches import Sampler, micro_batches
from kitaeru.data.corpus import Corpus
from kitaeru.data.pack import pack
from kitaeru.plan.fused import GRAPH_SIZES

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    lengths = draw(LENGTHS)
    total = sum(lengths)
    sources = draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    offsets = np.cumsum([0, *lengths])
    trained = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)), np.bool_)
    trained[offsets[:-1]] = False
    return Corpus(
        tokens=np.array(draw(st.lists(st.integers(0, 9), min_size=total, max_size=total)), np.int32),
        trained=trained,
        offsets=offsets,
        files=("f",),
        file_index=np.zeros(len(lengths), np.int32),
        rows=np.arange(len(lengths)),
        sources=np.array(sources, np.int32),
        weights=tuple(draw(st.tuples(*[st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.7])] * 3))),
    )


@given(LENGTHS, st.integers(12, 40))
def test_packing_places_each_example_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= budget for members in bins)
    # Best fit never leaves two bins that would go into one.
    loads = sorted(sum(lengths[i] for i in members) for members in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > budget
    assert bins == pack(list(lengths), budget)


@given(corpora(), st.integers(12, 40), st.data())
def test_a_packed_row_asks_for_the_same_as_the_rows_alone(corpus: Corpus, budget: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(corpus) - 1), min_size=1, max_size=20))
    alone = {i: micro_batches(corpus, [i], micro_batch_tokens=budget, packing=False)[0] for i in indices}
    packed = micro_batches(corpus, indices, micro_batch_tokens=budget)
    assert sorted(i for row in packed for i in row.examples) == sorted(indices)
    for row in packed:
        bounds = row.cu_seqlens.tolist()
        assert len(bounds) == len(row.examples) + 1
        for example, begin, end in zip(row.examples, bounds[:-1], bounds[1:], strict=True):
            for name in ("input_ids", "position_ids", "targets"):
                assert getattr(row, name)[0, begin:end].equal(getattr(alone[example], name)[0])
        assert row.longest == max(end - begin for begin, end in pairwise(bounds))


@given(corpora(), st.integers(12, 70), st.data())
def test_a_row_that_is_filled_up_asks_for_nothing_more(corpus: Corpus, budget: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(corpus) - 1), min_size=1, max_size=20))
    plain = micro_batches(corpus, indices, micro_batch_tokens=budget)
    filled = micro_batches(corpus, indices, micro_batch_tokens=budget, filled=True)
    assert (filled.tokens, filled.trained_tokens) == (plain.tokens, plain.trained_tokens)
    step = -(-budget // GRAPH_SIZES)
    for row, full in zip(plain, filled, strict=True):
        bounds, counted = full.cu_seqlens.tolist(), full.counted.tolist()
        assert bounds[: len(row.examples)] == row.cu_seqlens.tolist()[:-1]
        assert bounds[0] == 0
        assert bounds[-1] == full.tokens >= row.tokens
        assert full.tokens % step == 0
        assert len(counted) % step == 0
        lengths = [end - begin for begin, end in pairwise(bounds)]
        assert 0 <= min(lengths) <= max(lengths) <= full.longest
        # Whoever takes all examples for equally long, by what stands on the host, is right.
        assert ((len(bounds) - 1) * full.longest == full.tokens) == (len({full.longest, *lengths}) == 1)
        for name, value in (("input_ids", 0), ("targets", -100)):
            tensor = getattr(full, name)[0]
            assert tensor[: row.tokens].equal(getattr(row, name)[0])
            assert (tensor[row.tokens :] == value).all()
        starts = [begin for begin, end in pairwise(bounds) if end > begin]
        assert torch.nonzero(full.position_ids[0] == 0).squeeze(1).tolist() == starts
        assert (full.position_ids[0].diff()[[p for p in range(full.tokens - 1) if p + 1 not in starts]] == 1).all()
        assert len(set(counted)) == len(counted)
        assert (
            counted[: len(row.counted)] == row.counted.tolist() == torch.nonzero(row.targets[0] != -100)[:, 0].tolist()
        )


@given(corpora())
def test_targets_are_the_trained_tokens_in_order(corpus: Corpus) -> None:
    for index in range(len(corpus)):
        (row,) = micro_batches(corpus, [index], micro_batch_tokens=12, packing=False)
        example = corpus.example(index)
        wanted = [t for t, on in zip(example.input_ids, example.trained, strict=True) if on]
        assert [t for t in row.targets[0].tolist() if t != -100] == wanted


@given(corpora(), st.integers(0, 9), st.integers(0, 12), st.booleans(), st.integers(1, 30))
def test_a_resumed_sampler_goes_on_as_if_never_stopped(
    corpus: Corpus, seed: int, before: int, by_tokens: bool, size: int
) -> None:
    def fresh() -> Sampler:
        return Sampler(corpus, seed=seed, **{"global_batch_tokens" if by_tokens else "global_batch_examples": size})

    steady, resumed = fresh(), fresh()
    for _ in range(before):
        steady.next()
    resumed.load_state_dict(json.loads(json.dumps(steady.state_dict())))
    assert resumed.epoch == steady.epoch
    assert [resumed.next() for _ in range(8)] == [steady.next() for _ in range(8)]


@given(corpora(), st.integers(0, 9), st.integers(1, 30), st.sampled_from([0.5, 1.0, 2.0, 2.5]))
def test_steps_in_is_the_first_step_past_the_epochs(corpus: Corpus, seed: int, tokens: int, epochs: float) -> None:
    sampler = Sampler(corpus, seed=seed, global_batch_tokens=tokens)
    steps = sampler.steps_in(epochs)
    for _ in range(steps - 1):
        sampler.next()
    assert sampler.epoch < epochs
    sampler.next()
    assert sampler.epoch >= epochs - 1e-9
