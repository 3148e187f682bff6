"""How long the examples of a data set are, without torch: for a plan, before the tokenizer's last word.

With a tokenizer's own file the texts are really tokenised, without the chat template's marks; else tokens are guessed
from letters. `kitaeru train` counts exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kitaeru.data.read import gather
from kitaeru.data.types import Row
from kitaeru.plan.types import DataFacts
from kitaeru.recipe.types import Recipe, SourceSection

# Rows that are looked at; a larger data set is taken to go on like them.
LOOKED_AT = 2000
# Tokens of a letter: Latin words have about four letters to a token, Japanese is between one and two tokens a letter
# with an English vocabulary and under one with a Japanese one.
ASCII_TOKENS, WIDE_TOKENS = 0.25, 0.9
# What a chat template puts around a message.
MARK_TOKENS = 5


def estimate_facts(recipe: Recipe, seq_len: int, tokenizer_file: Path | None = None) -> DataFacts:
    """Counts of the training split, estimated from its first rows; examples longer than `seq_len` count as cut.

    Raises:
        DataError: a source cannot be read or is not recognised.
    """
    examples = tokens = longest = 0
    encode = _encoder(tokenizer_file)
    for source in recipe.data.train:
        rows, total = _rows(source, recipe.data.max_examples)
        lengths = [min(seq_len, encode(row)) for row in rows]
        if not lengths:
            continue
        share = total / len(lengths) * source.weight
        examples += round(len(lengths) * share)
        tokens += round(sum(lengths) * share)
        longest = max(longest, *lengths)
    kept = 1 - recipe.data.valid_fraction
    return DataFacts(
        round(examples * kept), round(tokens * kept), longest, round(examples * recipe.data.valid_fraction)
    )


def _rows(source: SourceSection, most: int | None) -> tuple[list[Row], int]:
    """The first rows of a source, and how many it has by its size."""
    looked = min(LOOKED_AT, most or LOOKED_AT)
    rows = gather([source], on_bad_row="skip", max_examples=looked).rows
    path = Path(source.path)
    if len(rows) < looked or not path.is_file() or path.suffix not in (".jsonl", ".txt", ".csv"):
        return rows, len(rows)
    with path.open("rb") as file:
        head = sum(len(file.readline()) for _ in range(len(rows)))
    total = max(len(rows), round(len(rows) * path.stat().st_size / max(head, 1)))
    return rows, min(total, most or total)


def _encoder(tokenizer_file: Path | None) -> Any:
    if tokenizer_file is None:
        return lambda row: sum(_guessed(text) for text in _texts(row))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def encode(row: Row) -> int:
        texts = _texts(row)
        marks = MARK_TOKENS * len(row.messages) or 1
        return sum(len(found) for found in tokenizer.encode_batch(texts, add_special_tokens=False)) + marks

    return encode


def _guessed(text: str) -> int:
    wide = sum(character > "\u2e80" for character in text)
    return round(WIDE_TOKENS * wide + ASCII_TOKENS * (len(text) - wide)) + MARK_TOKENS


def _texts(row: Row) -> Sequence[str]:
    if row.text is not None:
        return [row.text]
    return [str(message.get("content") or "") for message in row.messages]
