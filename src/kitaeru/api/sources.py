"""What a trainer is given to learn from, as files that a recipe can name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kitaeru.errors import DataError
from kitaeru.files import write_atomic
from kitaeru.i18n import tr

Texts = str | Path | Iterable[str] | Iterable[Mapping[str, Any]] | Any
"""A path or a Hub data set id; texts; rows (`messages`, `instruction`/`output`, …); or a `datasets.Dataset`."""


def is_named(given: Texts) -> bool:
    """Whether it is the name of data that lies somewhere already."""
    return isinstance(given, str | Path)


def source(given: Texts, file: Path) -> dict[str, Any]:
    """A recipe's source for what was given; what has no file yet is written to `file` (a .jsonl).

    Raises:
        DataError: it holds neither texts nor rows, or nothing at all.
    """
    if is_named(given):
        return {"path": str(given)}
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise DataError(
            tr("{kind} is nothing to train on.", kind=type(given).__name__),
            remedy=tr("Give a path, a list of texts or of rows, or one split of a Dataset."),
        )
    rows = list(given)
    if not rows:
        raise DataError(tr("There is not one example."), remedy=tr("Give a path, a list of texts or of rows."))
    plain = isinstance(rows[0], str)
    lines = [_line(row, number, plain) for number, row in enumerate(rows, 1)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "\n".join(lines) + "\n")
    return {"path": str(file), "kind": "text"} if plain else {"path": str(file)}


def _line(row: Any, number: int, plain: bool) -> str:
    if isinstance(row, str) != plain or not isinstance(row, str | Mapping):
        raise DataError(
            tr("Example {number} is a {kind}, and the first one is not.", number=number, kind=type(row).__name__)
            if number > 1
            else tr("Example {number} is a {kind}.", number=number, kind=type(row).__name__),
            remedy=tr("Give texts only, or rows (mappings) only."),
        )
    filled = {"text": row} if isinstance(row, str) else row
    value = {str(name): item for name, item in filled.items() if item is not None}
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise DataError(
            tr("Example {number} cannot be written as JSON: {error}", number=number, error=error),
            remedy=tr("Keep only the columns with texts: dataset.select_columns([…])"),
        ) from error
