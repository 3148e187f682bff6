"""Reading sources into rows: what was found, what was bad, and where."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kitaeru.data.formats import Record, format_of
from kitaeru.data.kinds import COLUMNS, detect, normalise, recognition_remedy, rename
from kitaeru.data.sources import Part, parts_of
from kitaeru.data.turns import BadRow
from kitaeru.data.types import Origin, Row
from kitaeru.errors import DataError
from kitaeru.files import write_atomic
from kitaeru.i18n import tr
from kitaeru.recipe.types import SourceSection

OnBadRow = Literal["stop", "skip"]
_HEAD = 20
_RAW_CHARACTERS = 10_000


@dataclass(frozen=True)
class Skipped:
    """A row that was left out: its place, the key at fault, the problem (translated) and the row as written."""

    origin: Origin
    key: str
    problem: str
    raw: Any

    def __str__(self) -> str:
        return f"{self.origin}: {self.sentence}"

    @property
    def sentence(self) -> str:
        """Key and problem."""
        return f"`{self.key}`: {self.problem}" if self.key else self.problem

    def to_json(self) -> str:
        """One line of `bad_rows.jsonl`."""
        value = {
            "file": self.origin.file,
            "row": self.origin.row,
            "key": self.key,
            "problem": self.problem,
            "raw": self.raw,
        }
        line = json.dumps(value, ensure_ascii=False, default=str)
        # A lone surrogate may be the very problem; it can only be written escaped.
        return line if _encodable(line) else json.dumps(value, default=str)


@dataclass(frozen=True)
class SourceReport:
    """What one source turned out to be.

    `kind` is the form of its rows (several, set apart by commas, in a mixed folder), `recognised` says in a sentence
    how it was told, `rows` counts the good ones and `skipped` the bad ones left out.
    """

    path: str
    files: tuple[str, ...]
    kind: str
    recognised: str
    rows: int
    skipped: int


@dataclass(frozen=True)
class Reading:
    """All rows in order; `source_index[i]` is the source that row i is from. `bad` are the rows left out."""

    rows: list[Row]
    source_index: list[int]
    reports: list[SourceReport]
    bad: list[Skipped] = field(default_factory=list)


def read(
    sources: Sequence[SourceSection],
    *,
    on_bad_row: OnBadRow = "stop",
    bad_rows: Path | None = None,
    max_examples: int | None = None,
    system: str | None = None,
) -> Reading:
    """Read every source into rows.

    Args:
        sources: files, folders or Hub data sets.
        on_bad_row: "stop" raises at the first bad row; "skip" leaves bad rows out and counts them.
        bad_rows: where skipped rows are written as JSON lines (replaced as a whole); not written when there are none.
        max_examples: at most so many good rows of each source.
        system: the system message of conversations that have none.

    Raises:
        DataError: a source cannot be read or is not recognised, a row is bad ("stop"), or no good row is left.
    """
    reading = gather(sources, on_bad_row=on_bad_row, max_examples=max_examples, system=system)
    if bad_rows is not None and reading.bad:
        write_atomic(bad_rows, "".join(row.to_json() + "\n" for row in reading.bad))
    for report in reading.reports:
        if not report.rows:
            raise _nothing_left(report, reading.bad)
    return reading


def gather(
    sources: Sequence[SourceSection],
    *,
    on_bad_row: OnBadRow = "skip",
    max_examples: int | None = None,
    system: str | None = None,
) -> Reading:
    """`read` without its last word: a source may be left without any good row. Raises DataError."""
    reading = Reading([], [], [])
    for index, source in enumerate(sources):
        _check_columns(source)
        worker = _SourceReader(source, on_bad_row, reading.bad)
        rows = [_with_system(row, system) for row in itertools.islice(worker.rows(), max_examples)]
        reading.rows.extend(rows)
        reading.source_index.extend([index] * len(rows))
        reading.reports.append(worker.report(len(rows)))
    return reading


class _SourceReader:
    """Reads one source; `bad` is shared between sources and grows."""

    def __init__(self, source: SourceSection, on_bad_row: OnBadRow, bad: list[Skipped]) -> None:
        self.source, self.on_bad_row, self.bad = source, on_bad_row, bad
        self.parts = parts_of(source)
        self._bad_before = len(bad)
        self._kinds: dict[str, str] = {}

    def rows(self) -> Iterator[Row]:
        for part in self.parts:
            yield from self._part_rows(part)

    def report(self, rows: int) -> SourceReport:
        return SourceReport(
            path=self.source.path,
            files=tuple(part.name for part in self.parts),
            kind=", ".join(self._kinds),
            recognised="; ".join(self._kinds.values()),
            rows=rows,
            skipped=len(self.bad) - self._bad_before,
        )

    def _part_rows(self, part: Part) -> Iterator[Row]:
        records = part.records()
        head = _head(records)
        if not head:
            return
        kind = self._kind(part, [rename(record.value, self.source.columns) for record in head if not record.problem])
        for record in itertools.chain(head, records):
            origin = Origin(part.name, record.row)
            try:
                if record.problem:
                    raise BadRow("", record.problem)
                yield normalise(rename(record.value, self.source.columns), kind, origin)
            except BadRow as error:
                self._reject(Skipped(origin, error.key, error.problem, _raw(record)))

    def _kind(self, part: Part, values: list[Any]) -> str:
        _check_renamed(self.source, part, values)
        if self.source.kind != "auto":
            self._kinds[self.source.kind] = tr("the recipe says so (`kind: {kind}`)", kind=self.source.kind)
            return self.source.kind
        if part.file is not None and format_of(part.file) == ".txt":
            self._kinds["text"] = tr("a .txt file holds documents set apart by two blank lines")
            return "text"
        if not values:
            return "text"  # every row is bad: each will say why
        detection = detect(values)
        if detection.kind is None:
            raise DataError(detection.reason, where=part.name, remedy=recognition_remedy(values))
        self._kinds[detection.kind] = detection.reason
        return detection.kind

    def _reject(self, row: Skipped) -> None:
        if self.on_bad_row == "stop":
            raise DataError(
                row.sentence,
                where=str(row.origin),
                remedy=tr(
                    "Mend this row, or leave bad rows out with `data.on_bad_row: skip` (they are written to a file)."
                ),
            )
        self.bad.append(row)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _head(records: Iterator[Record]) -> list[Record]:
    """The first records: enough to tell the kind by, so at least one that could be parsed if there is any."""
    head = list(itertools.islice(records, _HEAD))
    if head and all(record.problem for record in head):
        for record in records:
            head.append(record)
            if not record.problem:
                break
    return head


def _raw(record: Record) -> Any:
    raw = record.value if record.raw is None else record.raw
    return raw[:_RAW_CHARACTERS] if isinstance(raw, str) else raw


def _check_columns(source: SourceSection) -> None:
    for usual in source.columns or {}:
        if usual in COLUMNS:
            continue
        close = difflib.get_close_matches(usual, COLUMNS, n=1, cutoff=0.6)
        raise DataError(
            tr("`columns` is written as `usual: yours`, and `{usual}` is not a usual name.", usual=usual),
            where=source.path,
            remedy=tr("Did you mean `{nearest}`?", nearest=close[0])
            if close
            else tr("Usual names are: {names}", names=", ".join(sorted(COLUMNS))),
        )


def _check_renamed(source: SourceSection, part: Part, values: list[Any]) -> None:
    """Each renamed column must have arrived in at least one of the first rows, or the recipe has a slip."""
    in_turns = {"role", "content", "from", "value"}
    wanted = {usual: yours for usual, yours in (source.columns or {}).items() if usual not in in_turns}
    rows = [value for value in values if isinstance(value, Mapping)]
    if not rows:
        return
    found = list(dict.fromkeys(str(key) for row in rows for key in row))
    for usual, yours in wanted.items():
        if usual in found:
            continue
        close = difflib.get_close_matches(yours, found, n=1, cutoff=0.6)
        raise DataError(
            tr("`columns` names the column `{yours}`, which the file does not have.", yours=yours),
            where=part.name,
            remedy=tr("Did you mean `{nearest}`?", nearest=close[0])
            if close
            else tr("Its columns are: {names}", names=", ".join(found)),
        )


def _with_system(row: Row, system: str | None) -> Row:
    if not system or not row.messages or row.messages[0]["role"] == "system":
        return row
    message = {"role": "system", "content": system}
    return Row(row.origin, messages=(message, *row.messages), tools=row.tools)


def _nothing_left(report: SourceReport, bad: Sequence[Skipped]) -> DataError:
    first = next((row for row in bad if row.origin.file in report.files), None)
    if first is None:
        return DataError(
            tr("There are no rows in it."), where=report.path, remedy=tr("Check that it is the right file.")
        )
    return DataError(
        tr("None of its {count} rows can be used. The first: {problem}", count=report.skipped, problem=first.sentence),
        where=str(first.origin),
        remedy=tr("Look at the file with `kitaeru data check {path}`.", path=report.path),
    )
