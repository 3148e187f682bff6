"""The corpus: all examples of a split as flat arrays, none longer than asked, each with something to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kitaeru.data.chat import TrainOn
from kitaeru.data.tokenise import Tokenised, checksum
from kitaeru.data.types import Example, Origin, Row
from kitaeru.errors import DataError
from kitaeru.events import DataReady
from kitaeru.i18n import tr
from kitaeru.plan.types import DataFacts

Long = Literal["truncate", "split", "drop"]


@dataclass(frozen=True)
class Corpus:
    """n examples, T tokens.

    tokens: int32 [T]; trained: bool [T], False for the first token of an example, which nothing predicts; offsets:
    int64 [n + 1], where each example starts, and T last. files: the file table; file_index: int32 [n] into it; rows:
    int64 [n], the place in the file. sources: int32 [n], the index of the source in the recipe; weights: per source.
    left_out counts rows that were cut, split, dropped or skipped, by reason in words for a person (`reasons`).
    characters of rendered text before cutting. fingerprint: a hash of all that training depends on.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    files: tuple[str, ...]
    file_index: NDArray[np.int32]
    rows: NDArray[np.int64]
    sources: NDArray[np.int32]
    weights: tuple[float, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    characters: int = 0
    cached: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tokens, masks, order, sources and weights: equal means the same training data."""
        return checksum(self.tokens, self.trained, self.offsets, self.sources, np.array(self.weights, np.float64))

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.trained.sum())

    @property
    def facts(self) -> DataFacts:
        """What the planner must know."""
        longest = int(self.lengths.max()) if len(self) else 0
        return DataFacts(examples=len(self), tokens=len(self.tokens), longest=longest)

    def ends(self, most: int, count: int) -> Corpus:
        """Of `count` examples, evenly spread, at most so many tokens: those up to the last one that is trained."""
        count = min(count, len(self))
        chosen = np.arange(count, dtype=np.int64) * len(self) // max(count, 1)
        spans = []
        for index in chosen.tolist():
            start, end = self.offsets[index : index + 2].tolist()
            last = start + int(np.flatnonzero(self.trained[start:end])[-1]) + 1
            spans.append(slice(max(start, last - most), last))
        trained = [self.trained[span].copy() for span in spans]
        for part in trained:
            part[0] = False
        return replace(
            self,
            tokens=np.concatenate([self.tokens[span] for span in spans]),
            trained=np.concatenate(trained),
            offsets=np.cumsum([0, *(len(part) for part in trained)]),
            file_index=self.file_index[chosen],
            rows=self.rows[chosen],
            sources=self.sources[chosen],
        )

    def origin(self, index: int) -> Origin:
        """Where example `index` came from."""
        return Origin(self.files[self.file_index[index]], int(self.rows[index]))

    def example(self, index: int) -> Example:
        """Example `index`, counted from 0."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Example(self.origin(index), self.tokens[part].tolist(), self.trained[part].tolist())

    def ready(self, split: str) -> DataReady:
        """The event that tells of this corpus as `split` ("train" or "valid")."""
        return DataReady(
            split=split,
            examples=len(self),
            tokens=len(self.tokens),
            trained_tokens=self.trained_tokens,
            longest=self.facts.longest,
            characters=self.characters,
            left_out=self.left_out,
            length_histogram=self.length_histogram(),
            cached=self.cached,
        )

    def length_histogram(self) -> dict[str, int]:
        """How many examples have at most 2ⁿ tokens (and more than half of that): {"64": 10, "128": 3}."""
        if not len(self):
            return {}
        exponents = np.ceil(np.log2(self.lengths)).astype(int)
        return {str(2**e): int((exponents == e).sum()) for e in range(int(exponents.min()), int(exponents.max()) + 1)}


def reasons() -> dict[str, str]:
    """Why rows are not in a corpus as they were, in the language in force."""
    return {
        "truncate": tr("too long, the end cut off"),
        "split": tr("too long, split into several"),
        "drop": tr("too long, left out"),
        "nothing_left": tr("nothing to learn left after cutting"),
        "refused": tr("refused by the chat template"),
    }


def build(
    tokenised: Tokenised,
    rows: Sequence[Row],
    sources: Sequence[int],
    *,
    weights: Sequence[float],
    seq_len: int,
    long: Long | None = None,
    train_on: TrainOn = "assistant",
) -> Corpus:
    """The corpus of `rows` and their tokens; `sources[i]` is the source of row i.

    Examples over `seq_len` tokens are treated as `long` says: `truncate` cuts the end off, `split` makes several (each
    starts with the last token of the one before, so that every token is predicted once), `drop` leaves them out. None:
    split raw text that is trained whole, truncate the rest. Bad rows, which have no tokens, are left out and counted.

    Raises:
        DataError: a row in which nothing, or in a conversation everything, would be trained; or no example is left.
    """
    trained = tokenised.trained.copy()
    starts = tokenised.offsets[:-1][np.diff(tokenised.offsets) > 0]
    trained[starts] = False
    _check_masks(trained, tokenised, rows, train_on)
    pieces, left_out = _pieces(trained, tokenised, rows, seq_len, long)
    if not len(pieces):
        raise DataError(
            tr("No example is left to train on."),
            remedy=tr("Look at the rows with `kitaeru data check`; a larger `data.seq_len` keeps longer ones."),
        )
    return _gather(pieces, trained, tokenised, rows, sources, tuple(weights), left_out)


def _counts(trained: NDArray[np.bool_], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(trained, dtype=np.int64)])
    counts: NDArray[np.int64] = total[ends] - total[starts]
    return counts


def _check_masks(trained: NDArray[np.bool_], tokenised: Tokenised, rows: Sequence[Row], train_on: TrainOn) -> None:
    """Stop at the first row that teaches nothing, or a conversation whose questions would be learnt as answers."""
    lengths = np.diff(tokenised.offsets)
    counts = _counts(trained, tokenised.offsets[:-1], tokenised.offsets[1:])
    bad = {b.row for b in tokenised.bad}
    for index in np.flatnonzero((counts == 0) | (counts == lengths - 1)).tolist():
        row = rows[index]
        if counts[index] == 0 and index not in bad:
            raise DataError(
                tr("No token of this row would be trained."),
                where=str(row.origin),
                remedy=tr(
                    "A conversation needs an assistant's answer and a text some words; see `kitaeru data check`."
                ),
            )
        if counts[index] and row.text is None and train_on == "assistant":
            raise DataError(
                tr("Every token of this conversation would be trained: the chat template sets nothing apart."),
                where=str(row.origin),
                remedy=tr("Add the question, or ask for it with `data.train_on: all`."),
            )


def _pieces(
    trained: NDArray[np.bool_], tokenised: Tokenised, rows: Sequence[Row], seq_len: int, long: Long | None
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """[pieces, 3]: row, first token, end; and what was left out."""
    starts, ends = tokenised.offsets[:-1], tokenised.offsets[1:]
    lengths = ends - starts
    index = np.arange(len(rows), dtype=np.int64)
    fits = (lengths > 0) & (lengths <= seq_len)
    kept = [np.stack([index, starts, ends], axis=1)[fits]]
    left_out = {**dict.fromkeys(reasons(), 0), "refused": len(tokenised.bad)}
    for row in np.flatnonzero(lengths > seq_len).tolist():
        begin, end = int(starts[row]), int(ends[row])
        whole_text = rows[row].text is not None and rows[row].trained_from == 0
        how = long or ("split" if whole_text else "truncate")
        left_out[how] += 1
        if how == "truncate":
            kept.append(np.array([[row, begin, begin + seq_len]]))
        elif how == "split":
            first = np.arange(begin, end - 1, seq_len - 1, dtype=np.int64)
            kept.append(np.stack([np.full_like(first, row), first, np.minimum(first + seq_len, end)], axis=1))
    pieces = np.concatenate(kept)
    pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
    # A piece's first token has no predecessor in it and is never a target.
    teaches = _counts(trained, np.minimum(pieces[:, 1] + 1, pieces[:, 2]), pieces[:, 2]) > 0
    taught = np.zeros(len(rows), np.bool_)
    taught[pieces[teaches, 0]] = True
    left_out["nothing_left"] = int(np.count_nonzero(~taught[np.unique(pieces[:, 0])]))
    return pieces[teaches], {words: left_out[name] for name, words in reasons().items() if left_out[name]}


def _gather(
    pieces: NDArray[np.int64],
    trained: NDArray[np.bool_],
    tokenised: Tokenised,
    rows: Sequence[Row],
    sources: Sequence[int],
    weights: tuple[float, ...],
    left_out: dict[str, int],
) -> Corpus:
    lengths = pieces[:, 2] - pieces[:, 1]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # Token i of the corpus is token i + shift of the tokenised rows, the shift being constant in a piece.
    take = np.arange(offsets[-1], dtype=np.int64) + np.repeat(pieces[:, 1] - offsets[:-1], lengths)
    mask = trained[take]
    mask[offsets[:-1]] = False
    origins = [rows[row].origin for row in pieces[:, 0].tolist()]
    table = {name: number for number, name in enumerate(dict.fromkeys(o.file for o in origins))}
    return Corpus(
        tokens=tokenised.tokens[take],
        trained=mask,
        offsets=offsets,
        files=tuple(table),
        file_index=np.array([table[o.file] for o in origins], np.int32),
        rows=np.array([o.row for o in origins], np.int64),
        sources=np.asarray(sources, np.int32)[pieces[:, 0]],
        weights=weights,
        left_out=left_out,
        characters=tokenised.characters,
        cached=tokenised.cached,
    )
