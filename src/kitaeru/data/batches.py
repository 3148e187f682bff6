"""The order of examples, and micro-batches of them. Nothing here depends on how many devices there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kitaeru.data.corpus import Corpus
from kitaeru.data.pack import pack
from kitaeru.data.types import MicroBatch
from kitaeru.errors import DataError
from kitaeru.i18n import tr
from kitaeru.plan.fused import GRAPH_SIZES

IGNORED = -100


class Sampler:
    """Gives the examples of one global batch after another.

    An epoch is a permutation that depends on `seed` and the epoch's number only. A source of weight 2.0 is in it twice,
    of weight 0.5 with half of its examples, chosen anew each epoch. Examples are taken in order: so many as
    `global_batch_examples` says, or while they fit into `global_batch_tokens` (at least one). A batch that reaches the
    end of an epoch goes on in the next, so that every batch is full.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        global_batch_tokens: int | None = None,
        global_batch_examples: int | None = None,
    ) -> None:
        if (global_batch_tokens is None) == (global_batch_examples is None):
            raise ValueError("give global_batch_tokens or global_batch_examples, one of them")
        if not len(corpus):
            raise ValueError("the corpus is empty")
        self._corpus, self._seed = corpus, seed
        self._max_tokens, self._max_examples = global_batch_tokens, global_batch_examples
        self._lengths: list[int] = corpus.lengths.tolist()
        self._of_source = [np.flatnonzero(corpus.sources == s) for s in range(len(corpus.weights))]
        self._start(0, 0)

    def __next__(self) -> list[int]:
        return self.next()

    def next(self) -> list[int]:
        """The example indices of the next global batch; an index may come twice."""
        batch: list[int] = []
        tokens = 0
        while self._max_examples is None or len(batch) < self._max_examples:
            if self._position == len(self._order):
                self._start(self._number + 1, 0)
            index = self._order[self._position]
            tokens += self._lengths[index]
            if batch and self._max_tokens is not None and tokens > self._max_tokens:
                break
            batch.append(index)
            self._position += 1
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._number + self._position / len(self._order)

    def state_dict(self) -> dict[str, int]:
        """Where the sampler is, for a checkpoint."""
        return {"epoch": self._number, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where `state_dict` was taken, on the same corpus with the same seed.

        Raises:
            ValueError: the state is not one of this sampler.
        """
        epoch, position = state["epoch"], state["position"]
        order = self._permutation(epoch) if epoch >= 0 else []
        if not 0 <= position <= len(order):
            raise ValueError(f"position {position} of epoch {epoch} is outside of the data")
        self._number, self._order, self._position = epoch, order, position

    def steps_in(self, epochs: float) -> int:
        """The fewest batches, from the very beginning, that make `epochs` passes over the data."""
        other = Sampler(
            self._corpus,
            seed=self._seed,
            global_batch_tokens=self._max_tokens,
            global_batch_examples=self._max_examples,
        )
        steps = 0
        while other.epoch < epochs - 1e-9:
            other.next()
            steps += 1
        return steps

    def _start(self, number: int, position: int) -> None:
        self._number, self._position = number, position
        self._order = self._permutation(number)

    def _permutation(self, epoch: int) -> list[int]:
        # Raw bits and a stable sort: the same order from every version of numpy.
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        chosen = []
        for members, weight in zip(self._of_source, self._corpus.weights, strict=True):
            # Counted over all epochs, so that any weight is met exactly in the long run.
            count = int((epoch + 1) * weight * len(members)) - int(epoch * weight * len(members))
            whole, rest = divmod(count, len(members)) if len(members) else (0, 0)
            chosen += [members] * whole
            if rest:
                chosen.append(members[_shuffled(bits, len(members))[:rest]])
        if not chosen:  # every weight is tiny: an epoch is at least one example
            chosen = [_shuffled(bits, len(self._corpus))[:1]]
        together = np.concatenate(chosen)
        order: list[int] = together[_shuffled(bits, len(together))].tolist()
        return order


def _shuffled(bits: np.random.PCG64, count: int) -> NDArray[np.int64]:
    order: NDArray[np.int64] = np.argsort(bits.random_raw(count), kind="stable")
    return order


class MicroBatches(Sequence[MicroBatch]):
    """The micro-batches of some examples. Each is made when it is taken, so that a rank makes only its own.

    `tokens` are the tokens of each; `trained_tokens` those of all together that count in the loss. With `fill` each is
    filled up (`_filled`), in such steps; neither counts what is put in.
    """

    def __init__(self, corpus: Corpus, bins: list[list[int]], fill: int = 0) -> None:
        self._corpus, self._bins, self._fill = corpus, bins, fill
        self.tokens: list[int] = [int(corpus.lengths[members].sum()) for members in bins]

    @property
    def trained_tokens(self) -> int:
        """Tokens of all micro-batches that count in the loss."""
        spans = (slice(*self._corpus.offsets[i : i + 2]) for members in self._bins for i in members)
        return sum(int(self._corpus.trained[span].sum()) for span in spans)

    def __len__(self) -> int:
        return len(self._bins)

    @overload
    def __getitem__(self, at: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, at: slice) -> MicroBatches: ...
    def __getitem__(self, at: int | slice) -> MicroBatch | MicroBatches:
        if isinstance(at, slice):
            return MicroBatches(self._corpus, self._bins[at], self._fill)
        row = _row(self._corpus, self._bins[at])
        return _filled(row, self._fill) if self._fill else row

    def examples(self, number: int) -> list[int]:
        """The examples in one micro-batch, as indices into the corpus."""
        return self._bins[number]


def micro_batches(
    corpus: Corpus, indices: Sequence[int], *, micro_batch_tokens: int, packing: bool = True, filled: bool = False
) -> MicroBatches:
    """The examples `indices` as rows of at most `micro_batch_tokens` tokens; one example a row without `packing`.

    `filled`: to a multiple of that over GRAPH_SIZES, so that few shapes occur.

    Raises:
        DataError: an example is longer than `micro_batch_tokens`. Names it.
    """
    fill = -(-micro_batch_tokens // GRAPH_SIZES) if filled else 0
    return MicroBatches(corpus, _bins(corpus, indices, micro_batch_tokens, packing), fill)


def eval_batches(
    corpus: Corpus, *, micro_batch_tokens: int, packing: bool = True, max_examples: int | None = None
) -> MicroBatches:
    """All examples of `corpus`, or `max_examples` evenly spread ones, each once, as rows like `micro_batches`'.

    Raises:
        DataError: an example is longer than `micro_batch_tokens`.
    """
    count = min(len(corpus), max_examples or len(corpus))
    indices = (np.arange(count, dtype=np.int64) * len(corpus) // max(count, 1)).tolist()
    return MicroBatches(corpus, _bins(corpus, indices, micro_batch_tokens, packing))


def _bins(corpus: Corpus, indices: Sequence[int], budget: int, packing: bool) -> list[list[int]]:
    lengths = corpus.lengths[np.asarray(indices, np.int64)].tolist()
    for index, length in zip(indices, lengths, strict=True):
        if length > budget:
            raise DataError(
                tr("This example has {length} tokens and a micro-batch takes {budget}.", length=length, budget=budget),
                where=str(corpus.origin(index)),
                remedy=tr("Lower `data.seq_len`, or raise `limits.micro_batch_tokens`."),
            )
    if not packing:
        return [[index] for index in indices]
    return [[indices[i] for i in members] for members in pack(lengths, budget)]


def _row(corpus: Corpus, members: list[int]) -> MicroBatch:
    spans = [slice(int(corpus.offsets[i]), int(corpus.offsets[i + 1])) for i in members]
    lengths = corpus.lengths[members]
    tokens = np.concatenate([corpus.tokens[s] for s in spans]).astype(np.int64)
    trained = np.concatenate([corpus.trained[s] for s in spans])
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    targets = np.full(len(tokens), IGNORED, np.int64)
    # The first token of an example is never trained, so the last position of the one before predicts nothing.
    targets[:-1] = np.where(trained[1:], tokens[1:], IGNORED)
    positions = np.arange(len(tokens), dtype=np.int64) - np.repeat(bounds[:-1], lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        targets=torch.from_numpy(targets)[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        longest=int(lengths.max()),
        counted=torch.from_numpy(np.flatnonzero(targets != IGNORED)),
        examples=list(members),
    )


# Entries of `cu_seqlens` in a row that is filled up, at least.
FEWEST_BOUNDS = 17


def _filled(row: MicroBatch, step: int) -> MicroBatch:
    """A row whose shapes are of few kinds: T and R are multiples of `step`, `longest` and the number of examples powers
    of two, more than there are. What is put in are examples of tokens 0 that no other sees and no loss counts, then
    examples of no tokens. Examples of one length that are a multiple of `step` together stay as they are.
    """
    assert row.counted is not None
    tokens = -(-row.tokens // step) * step
    count = min(tokens, -(-len(row.counted) // step) * step)
    more = torch.nonzero(row.targets[0] == IGNORED).squeeze(1)[: count - len(row.counted)]
    beyond = torch.arange(row.tokens, tokens)[: count - len(row.counted) - len(more)]
    counted = torch.cat([row.counted, more, beyond])
    if tokens == row.tokens and (len(row.cu_seqlens) - 1) * row.longest == tokens:
        return replace(row, counted=counted)
    longest = 1 << (row.longest - 1).bit_length()
    starts = torch.arange(row.tokens, tokens, longest, dtype=torch.int32)
    bounds = torch.cat([row.cu_seqlens[:-1], starts])
    entries = max(FEWEST_BOUNDS, (1 << (len(bounds) - 1).bit_length()) + 1)
    if (entries - 1) * longest == tokens:  # which says that all are of one length
        entries += 1
    place = torch.arange(tokens - row.tokens)[None] % longest
    zeros = torch.zeros_like(place)
    return MicroBatch(
        input_ids=torch.cat([row.input_ids, zeros], 1),
        position_ids=torch.cat([row.position_ids, place], 1),
        targets=torch.cat([row.targets, zeros + IGNORED], 1),
        cu_seqlens=nn.functional.pad(bounds, (0, entries - len(bounds)), value=tokens),
        longest=longest,
        counted=counted,
        examples=row.examples,
    )
