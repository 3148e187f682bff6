"""The whole way from a recipe's data to the corpora that are trained and validated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kitaeru.data.corpus import Corpus, build
from kitaeru.data.read import Reading, Skipped, SourceReport, read
from kitaeru.data.tokenise import Tokenised, cache_folder, tokenise
from kitaeru.data.types import Row
from kitaeru.errors import DataError
from kitaeru.files import write_atomic
from kitaeru.i18n import tr
from kitaeru.plan.types import DataFacts
from kitaeru.recipe.types import Recipe

SAMPLE_ROWS = 64
Phase = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data.

    `sample_rows` are the first rows of the validation (or else the training) data, for questions shown before and
    after. `reports` say what each source was taken for, `skipped` are the rows left out as bad.
    """

    train: Corpus
    valid: Corpus | None
    sample_rows: tuple[Row, ...]
    reports: tuple[SourceReport, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def facts(self) -> DataFacts:
        """What the planner must know."""
        train = self.train.facts
        return DataFacts(train.examples, train.tokens, train.longest, len(self.valid) if self.valid else 0)


@dataclass(frozen=True)
class _Split:
    rows: Sequence[Row]
    sources: Sequence[int]
    weights: tuple[float, ...]


def prepare(
    recipe: Recipe,
    tokenizer: Any,
    *,
    seq_len: int,
    bad_rows: Path | None,
    progress: Phase | None = None,
    cache: Path | None = None,
) -> Prepared:
    """Read, split, tokenise and cut the data of `recipe`.

    `seq_len` is the longest example in tokens. Rows that are skipped are written to `bad_rows`, if there are any.
    Tokens are kept in the folder `cache` (default: `cache_folder()`). `progress` is told what is done, rows done
    and rows in all.

    Raises:
        DataError: a source or a row cannot be used; names file and line.
    """
    data = recipe.data
    skipped: list[Skipped] = []
    readings = [
        read(sources, on_bad_row=data.on_bad_row, max_examples=data.max_examples, system=data.system)
        for sources in (data.train, data.valid)
        if sources
    ]
    skipped += [row for reading in readings for row in reading.bad]
    corpora = []
    splits = _splits(recipe, readings)
    for name, split in zip((tr("tokenising"), tr("tokenising (validation)")), splits, strict=False):
        tokenised = tokenise(
            split.rows,
            tokenizer,
            train_on=data.train_on,
            workers=data.workers,
            progress=partial(progress, name) if progress else None,
            cache=cache or cache_folder(),
        )
        skipped += _refused(tokenised, split.rows, stop=data.on_bad_row == "stop")
        corpora.append(
            build(
                tokenised,
                split.rows,
                split.sources,
                weights=split.weights,
                seq_len=seq_len,
                long=data.long,
                train_on=data.train_on,
            )
        )
    if skipped and bad_rows is not None:
        write_atomic(bad_rows, "".join(row.to_json() + "\n" for row in skipped))
    return Prepared(
        train=corpora[0],
        valid=corpora[1] if len(corpora) > 1 else None,
        sample_rows=tuple(splits[-1].rows[:SAMPLE_ROWS]),
        reports=tuple(report for reading in readings for report in reading.reports),
        skipped=tuple(skipped),
    )


def _refused(tokenised: Tokenised, rows: Sequence[Row], *, stop: bool) -> list[Skipped]:
    """The rows the chat template does not take; the first of them stops the run unless bad rows are skipped."""
    for bad in tokenised.bad[:1] if stop else ():
        raise DataError(bad.what, where=str(rows[bad.row].origin), remedy=bad.remedy)
    return [_skip(rows[bad.row], bad.what) for bad in tokenised.bad]


def _skip(row: Row, what: str) -> Skipped:
    raw = {"messages": row.messages, **({"tools": row.tools} if row.tools else {})}
    return Skipped(row.origin, "messages", what, raw)


def _splits(recipe: Recipe, readings: Sequence[Reading]) -> list[_Split]:
    """Training and, if there is one, validation."""
    data = recipe.data
    train = readings[0]
    weights = tuple(source.weight for source in data.train)
    if len(readings) > 1:
        return [
            _Split(train.rows, train.source_index, weights),
            _Split(readings[1].rows, readings[1].source_index, tuple(1.0 for _ in data.valid)),
        ]
    if not data.valid_fraction:
        return [_Split(train.rows, train.source_index, weights)]
    kept, held = held_out(len(train.rows), data.valid_fraction, recipe.train.seed)
    return [
        _Split([train.rows[i] for i in part], [train.source_index[i] for i in part], w)
        for part, w in ((kept, weights), (held, tuple(1.0 for _ in weights)))
    ]


def held_out(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """The indices below `count` to train on and the share `fraction`, at least one, to validate on; both ascend.

    Raises:
        DataError: there are fewer than two examples.
    """
    if count < 2:
        raise DataError(
            tr("One example cannot be split into training and validation."),
            remedy=tr("Leave out `data.valid_fraction`."),
        )
    size = min(max(1, round(count * fraction)), count - 1)
    bits = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(count)
    order = np.argsort(bits, kind="stable")
    return sorted(order[size:].tolist()), sorted(order[:size].tolist())
