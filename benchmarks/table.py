"""The tables of these scripts: CSV files whose first row names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def write(file: Path, rows: Sequence[Row], fields: Iterable[str] = ()) -> None:
    """Write all rows; without `fields` the columns are those of the first one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(fields) or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def append(file: Path, rows: Sequence[Row], fields: Iterable[str] = ()) -> None:
    """Add rows to a table, which begins here if there is none."""
    if not file.exists():
        write(file, rows, fields)
        return
    with file.open("a", newline="", encoding="utf-8") as out:
        csv.DictWriter(out, list(fields) or list(rows[0])).writerows(rows)


def read(file: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))
