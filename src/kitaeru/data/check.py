"""What the trainer will see: tokens, masks, lengths, and what is odd about the text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitaeru.data.chat import TrainOn
from kitaeru.data.findings import Finding, Tally, duplicate_findings, text_findings
from kitaeru.data.read import Reading, SourceReport
from kitaeru.data.tokenise import Tokenised
from kitaeru.data.types import Example, Row
from kitaeru.i18n import tr

_BAD_SHOWN = 20
_MANY_FALLBACKS = 0.1


@dataclass(frozen=True)
class Lengths:
    """Lengths of the examples in tokens. `histogram[i]` is (first, last, examples): bounds double from bar to bar."""

    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Shown:
    """One row as the trainer sees it: runs of text, each with whether its tokens are trained."""

    origin: str
    tokens: int
    trained_tokens: int
    segments: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Check:
    """The answer of `kitaeru data check`.

    `characters` counts the text as the chat template writes it. `trained_share` and `fallback_share` are shares of all
    tokens; fallback tokens are single bytes or pieces of a character. `ok` is False when a row is bad or a mask would
    stop the run.
    """

    ok: bool
    sources: tuple[SourceReport, ...]
    rows: int
    bad_rows: int
    bad: tuple[str, ...]
    characters: int
    tokens: int
    trained_tokens: int
    trained_share: float
    characters_per_token: float
    fallback_share: float
    unknown_tokens: int
    seq_len: int | None
    lengths: Lengths | None
    findings: tuple[Finding, ...]
    examples: tuple[Shown, ...]


def check(
    reading: Reading,
    tokenised: Tokenised,
    tokenizer: Any,
    *,
    train_on: TrainOn = "assistant",
    seq_len: int | None = None,
    shown: int = 3,
) -> Check:
    """Say what is in the data.

    Args:
        reading: what `data.read.gather` read.
        tokenised: the tokens of its rows, made with the same tokenizer and `train_on`.
        tokenizer: the model's tokenizer.
        train_on: which turns of a conversation are trained.
        seq_len: the longest example the run would take, in tokens; None: do not ask.
        shown: how many rows to show as the trainer sees them.
    """
    table = _Table.of(reading.rows, tokenised)
    ids, counts = np.unique(tokenised.tokens, return_counts=True)
    occurrences = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    tokens, trained = int(tokenised.tokens.size), int(tokenised.trained.sum())
    fallback = sum(occurrences[token] for token in _fallback_tokens(occurrences, tokenizer))
    findings = [
        *_template_findings(table.rows, tokenised),
        *_mask_findings(table, train_on, seq_len),
        *text_findings(table.rows),
        *duplicate_findings(table.rows),
        *_tokenizer_findings(fallback / max(tokens, 1)),
    ]
    return Check(
        ok=not reading.bad and tokens > 0 and all(finding.level != "error" for finding in findings),
        sources=tuple(reading.reports),
        rows=len(table.rows),
        bad_rows=len(reading.bad),
        bad=tuple(str(row) for row in reading.bad[:_BAD_SHOWN]),
        characters=tokenised.characters,
        tokens=tokens,
        trained_tokens=trained,
        trained_share=trained / max(tokens, 1),
        characters_per_token=tokenised.characters / max(tokens, 1),
        fallback_share=fallback / max(tokens, 1),
        unknown_tokens=occurrences.get(tokenizer.unk_token_id, 0),
        seq_len=seq_len,
        lengths=measure([length for length in table.lengths if length]),
        findings=tuple(findings),
        examples=tuple(show(example, tokenizer) for example in table.examples(shown)),
    )


@dataclass(frozen=True)
class _Table:
    """Rows beside their tokens: `lengths` and `trained` (tokens of each row), `first` (its first trained token)."""

    rows: Sequence[Row]
    tokenised: Tokenised
    lengths: list[int]
    trained: list[int]
    first: list[int]

    @classmethod
    def of(cls, rows: Sequence[Row], tokenised: Tokenised) -> _Table:
        offsets = tokenised.offsets
        before = np.concatenate([[0], np.cumsum(tokenised.trained, dtype=np.int64)])
        places = np.append(np.flatnonzero(tokenised.trained), tokenised.tokens.size)
        first = places[np.searchsorted(places, offsets[:-1])] - offsets[:-1] if tokenised.tokens.size else offsets[:-1]
        trained = before[offsets[1:]] - before[offsets[:-1]]
        return cls(rows, tokenised, np.diff(offsets).tolist(), trained.tolist(), first.tolist())

    def examples(self, count: int) -> list[Example]:
        """The first `count` examples that have tokens."""
        whole = [index for index, length in enumerate(self.lengths) if length][:count]
        bounds = [(index, *self.tokenised.offsets[index : index + 2].tolist()) for index in whole]
        return [
            Example(
                self.rows[index].origin,
                self.tokenised.tokens[start:end].tolist(),
                self.tokenised.trained[start:end].tolist(),
            )
            for index, start, end in bounds
        ]


def measure(lengths: Sequence[int]) -> Lengths | None:
    """The distribution of `lengths` (tokens); None when there are none.

    >>> measure([3, 5, 6, 200]).histogram
    ((0, 32, 3), (129, 256, 1))
    >>> measure(range(1, 101)).p90
    90
    """
    if not lengths:
        return None
    ordered = sorted(lengths)

    def rank(share: float) -> int:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    bars = Counter(max(32, 1 << (length - 1).bit_length()) for length in ordered)
    histogram = tuple((last // 2 + 1 if last > 32 else 0, last, count) for last, count in sorted(bars.items()))
    return Lengths(ordered[0], rank(0.5), rank(0.9), rank(0.99), ordered[-1], histogram)


def show(example: Example, tokenizer: Any) -> Shown:
    """The text of `example` in runs of trained and untrained tokens, special tokens included."""
    ids, trained = example.input_ids, example.trained
    edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
    segments: list[tuple[str, bool]] = []
    before = ""
    for start, end in itertools.pairwise(edges):
        if start == end:
            continue
        # The difference of two decodings: a run decoded alone would lose a space at its start.
        after = _decode(ids[:end], tokenizer)
        text = after[len(before) :] if after.startswith(before) else _decode(ids[start:end], tokenizer)
        segments.append((text, trained[start]))
        before = after
    return Shown(str(example.origin), len(ids), sum(trained), tuple(segments))


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _fallback_tokens(ids: Iterable[int], tokenizer: Any) -> list[int]:
    """Tokens that are one byte (`<0xE3>`) or, in byte-level BPE, a piece of a character."""
    found = []
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        if is_byte or ("\ufffd" in _decode([token], tokenizer) and "\ufffd" not in piece):
            found.append(token)
    return found


def _template_findings(rows: Sequence[Row], tokenised: Tokenised) -> list[Finding]:
    refused = Tally()
    for bad in tokenised.bad:
        refused.add(rows[bad.row].origin)
    if not refused.rows:
        return []
    first = tokenised.bad[0]
    remedy = first.remedy or tr("Change the rows, or give a template that takes them with `model.chat_template`.")
    return [refused.finding("refused_by_template", "error", first.what, remedy)]


def _mask_findings(table: _Table, train_on: TrainOn, seq_len: int | None) -> list[Finding]:
    nothing, everything, long, answer_cut = Tally(), Tally(), Tally(), Tally()
    for row, length, trained, first in zip(table.rows, table.lengths, table.trained, table.first, strict=True):
        is_text = not row.messages and not row.trained_from
        if not length:
            continue
        if trained == 0:
            nothing.add(row.origin)
        elif trained == length and not is_text and train_on == "assistant":
            everything.add(row.origin)
        if seq_len is not None and length > seq_len:
            long.add(row.origin)
            if trained and first >= seq_len:
                answer_cut.add(row.origin)
    found = []
    if nothing.rows:
        what = tr("No token of these rows is trained (mask 0 %): the run would stop here.")
        found.append(nothing.finding("mask_0", "error", what, tr("Leave the rows out, or mend their assistant turns.")))
    if everything.rows:
        what = tr("Every token of these rows is trained (mask 100 %), the question too: the run would stop here.")
        remedy = tr("Check roles and chat template. If it is meant, say `data.train_on: all`.")
        found.append(everything.finding("mask_100", "error", what, remedy))
    if answer_cut.rows:
        what = tr("The answer begins after token {seq_len}: cut there, nothing would be trained.", seq_len=seq_len)
        remedy = tr("Raise `data.seq_len`, or leave such rows out with `data.long: drop`.")
        found.append(answer_cut.finding("answer_cut_off", "warning", what, remedy))
    if long.rows:
        what = tr("Rows longer than {seq_len} tokens.", seq_len=seq_len)
        remedy = tr("`data.long` says what happens to them: truncate, split or drop.")
        found.append(long.finding("long", "note", what, remedy))
    return found


def _tokenizer_findings(fallback_share: float) -> list[Finding]:
    if fallback_share <= _MANY_FALLBACKS:
        return []
    what = tr("Many characters are written as single bytes: this tokenizer hardly knows the language of the data.")
    remedy = tr("Choose a model made for Japanese: the same text takes fewer tokens, less memory and less time.")
    return [Finding("byte_fallback", "warning", 0, (), "", what, remedy)]
