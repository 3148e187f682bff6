"""Files into records: json, jsonl, csv, tsv, parquet and txt, each also compressed, with the place of every record."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from kitaeru.data.encoding import SAMPLE_BYTES, encoding_error, guess_encoding, is_iso_2022_jp
from kitaeru.data.turns import type_name
from kitaeru.errors import DataError
from kitaeru.i18n import tr

COMPRESSIONS = (".gz", ".zst")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Record:
    """One record as it stands in a file.

    `row` counts from 1: the line where the record begins (jsonl, csv, txt) or its place in the table (json, parquet).
    `problem` says, translated, why there is no value; `raw` is the text as written, where the format has one.
    """

    row: int
    value: Any = None
    raw: str | None = None
    problem: str | None = None


def format_of(path: Path) -> str | None:
    """The suffix that names the format (".jsonl" for `a.jsonl.gz`); None when it is not one kitaeru reads."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in _READERS else None


def known_formats() -> str:
    """The formats for a message: ".json, .jsonl, …"."""
    return ", ".join(_READERS)


def refuse(path: Path) -> DataError:
    """The error for a file that is not read, with the reason."""
    if any(suffix in PICKLES for suffix in (s.lower() for s in path.suffixes)):
        return DataError(
            tr("Pickled files are refused: opening one can run any program hidden in it."),
            where=str(path),
            remedy=tr("Ask for the data as jsonl or parquet, or convert it on a machine you can afford to lose."),
        )
    return DataError(
        tr("kitaeru does not read files of this kind."),
        where=str(path),
        remedy=tr("Readable are: {formats} (each also .gz and .zst).", formats=known_formats()),
    )


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, in order.

    Raises:
        DataError: the file cannot be read at all (format, encoding, damaged compression, no header).
    """
    format_name = format_of(path)
    if format_name is None:
        raise refuse(path)
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            yield from _READERS[format_name](stream, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            tr("The file cannot be read: {reason}", reason=getattr(error, "strerror", None) or str(error)),
            where=str(path),
            remedy=tr("Check that it was copied or downloaded whole, and that you may read it."),
        ) from error


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        import pyarrow

        # Arrow's stream says when a frame is cut short; zstandard's own reader ends silently there.
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(raw, compression="zstd")))
    return raw


def _byte_lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes split at \n alone: str.splitlines would also cut at U+2028 and friends inside a JSON string.
    for number, line in enumerate(stream, 1):
        if is_iso_2022_jp(line):
            raise encoding_error(str(path), number, line)
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _text_lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    for number, line in _byte_lines(stream, path):
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise encoding_error(str(path), number, line + stream.read(SAMPLE_BYTES)) from None


def _json_lines(stream: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in _byte_lines(stream, path):
        if not line.strip():
            continue
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            if guess_encoding(line):
                raise encoding_error(str(path), number, line + stream.read(SAMPLE_BYTES)) from None
            text = line.decode(errors="replace").rstrip("\r\n")
            yield Record(number, raw=text, problem=tr("The line is not valid UTF-8: some of its bytes are damaged."))
            continue
        if number == 1 and text.strip() == "[":
            raise DataError(
                tr("The file is one JSON array, not one JSON object a line."),
                where=f"{path}:1",
                remedy=tr("Rename it to end in .json."),
            )
        yield _parsed_line(number, text)


def _parsed_line(number: int, text: str) -> Record:
    try:
        return Record(number, json.loads(text), raw=text)
    except json.JSONDecodeError as error:
        problem = tr("The line is not valid JSON: {reason} at column {column}.", reason=error.msg, column=error.colno)
        return Record(number, raw=text, problem=problem)
    except RecursionError:
        return Record(number, raw=text, problem=tr("The JSON is nested too deeply."))


def _json(stream: BinaryIO, path: Path) -> Iterator[Record]:
    content = stream.read()
    try:
        value = json.loads(_decode_whole(content, path))
    except json.JSONDecodeError as error:
        # Many tools write JSON lines into files named .json: "Extra data" is what the second line looks like.
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _json_lines(io.BytesIO(content), path)
            return
        raise DataError(
            tr("The file is not valid JSON: {reason} at column {column}.", reason=error.msg, column=error.colno),
            where=f"{path}:{error.lineno}",
            remedy=tr("Mend it there. One JSON object a line is also fine; name such a file .jsonl."),
        ) from None
    rows = value.get("data", value) if isinstance(value, dict) else value
    if isinstance(rows, dict) and not any(isinstance(item, list) and item for item in _foreign(rows)):
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(
            tr('The file should hold an array of rows, or an object with the array under "data".'),
            where=str(path),
            remedy=tr("Found: {found}", found=_describe(value)),
        )
    yield from (Record(index, row) for index, row in enumerate(rows, 1))


def _foreign(row: dict[str, Any]) -> Iterator[Any]:
    """The values of a lone object that cannot be columns of a row: a table under another name than "data"."""
    columns = {"messages", "conversations", "conversation", "tools", "history", "prompt", "completion"}
    return (value for key, value in row.items() if key not in columns)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return tr("an object with the keys {keys}", keys=", ".join(itertools.islice(value, 8)))
    return type_name(value)


def _decode_whole(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        line = content.count(b"\n", 0, error.start) + 1
        raise encoding_error(str(path), line, content[start : start + SAMPLE_BYTES]) from None
    if is_iso_2022_jp(content):
        raise encoding_error(str(path), 1, content)
    return text


def _comma_separated(stream: BinaryIO, path: Path) -> Iterator[Record]:
    return _table(stream, path, ",")


def _tab_separated(stream: BinaryIO, path: Path) -> Iterator[Record]:
    return _table(stream, path, "\t")


def _table(stream: BinaryIO, path: Path, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB the module allows
    reader = csv.reader((line for _, line in _text_lines(stream, path)), delimiter=delimiter, strict=True)
    header = _header(reader, path)
    while True:
        first_line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(first_line, problem=tr("The record is not valid CSV: {reason}.", reason=str(error)))
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            problem = tr("The record has {found} cells, the header {expected}.", found=len(cells), expected=len(header))
            yield Record(first_line, raw=delimiter.join(cells), problem=problem)
        else:
            yield Record(first_line, dict(zip(header, cells, strict=True)))


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(
            tr("The header is not valid CSV: {reason}.", reason=str(error)), where=f"{path}:1", remedy=_header_remedy()
        ) from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if not any(header) or twice:
        what = tr("The header names a column twice: {names}", names=", ".join(twice)) if twice else tr("No header.")
        raise DataError(what, where=f"{path}:1", remedy=_header_remedy())
    return header


def _header_remedy() -> str:
    return tr("The first line must name the columns, for example: {example}", example="instruction,input,output")


def _parquet(stream: BinaryIO, path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    seekable = stream if path.suffix.lower() == ".parquet" else io.BytesIO(stream.read())
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Record(number, without_nulls(row))
    except pyarrow.ArrowException as error:
        raise DataError(
            tr("The file is not a whole Parquet file: {reason}", reason=str(error).splitlines()[0]),
            where=str(path),
            remedy=tr("Check that it was copied or downloaded whole, and that you may read it."),
        ) from error


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """`row` of a columnar table without the keys that its nested objects have only because other rows do."""
    return {key: _prune(value) if isinstance(value, list | dict) else value for key, value in row.items()}


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items() if item is not None}
    return [_prune(item) for item in value] if isinstance(value, list) else value


def _documents(stream: BinaryIO, path: Path) -> Iterator[Record]:
    """Documents are set apart by two blank lines or more."""
    document: list[str] = []
    start, blank = 1, 0
    for number, line in _text_lines(stream, path):
        text = line.rstrip("\r\n")
        if not text.strip():
            blank += 1
            continue
        if document and blank >= 2:
            yield Record(start, {"text": "\n".join(document)})
            document = []
        if not document:
            start, blank = number, 0
        document += [""] * blank + [text]
        blank = 0
    if document:
        yield Record(start, {"text": "\n".join(document)})


_READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
    ".txt": _documents,
}
