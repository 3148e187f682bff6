"""Tokenise many rows: over several processes, once per content, with progress."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kitaeru.data.chat import Encoder, TrainOn
from kitaeru.data.types import Row
from kitaeru.errors import DataError
from kitaeru.files import write_atomic
from kitaeru.i18n import language, set_language, tr

Progress = Callable[[int, int], None]
FORMAT = 1
_CHUNK = 256
# Below so many characters starting processes costs more than it saves.
_SMALL = 4_000_000


class RefusedRow(NamedTuple):
    """A row the tokenizer's template does not take, and why."""

    row: int
    what: str
    remedy: str | None


@dataclass(frozen=True)
class Tokenised:
    """The tokens of n rows end to end.

    tokens: int32 [T]; trained: bool [T]; offsets: int64 [n + 1], where each row starts, and T last; a bad row has no
    tokens. `characters` of rendered text in all; `cached`: read, not computed.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    characters: int
    bad: tuple[RefusedRow, ...] = ()
    cached: bool = False


def cache_folder() -> Path:
    """Where tokens are kept: `$KITAERU_CACHE/tokens`, else `~/.cache/kitaeru/tokens`."""
    return Path(os.environ.get("KITAERU_CACHE") or Path.home() / ".cache" / "kitaeru") / "tokens"


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    train_on: TrainOn = "assistant",
    workers: int | None = None,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Tokenised:
    """The tokens of `rows`, in order.

    `workers` processes (default: the cores this process may use), unless there is little to do. `progress` is called
    with rows done and rows in all. With `cache`, a folder, the result of the same rows, tokenizer, template and options
    is read from it, or written to it.

    Raises:
        DataError: there is no chat template for conversations, or a worker process died.
    """
    kept = cache / f"{content_key(rows, tokenizer, train_on)}.safetensors" if cache else None
    found = _read(kept, len(rows)) if kept else None
    if found is None:
        found = _compute(rows, tokenizer, train_on, workers, progress)
        if kept:
            _write(kept, found)
    if progress:
        progress(len(rows), len(rows))
    return found


def content_key(rows: Sequence[Row], tokenizer: Any, train_on: TrainOn) -> str:
    """A name for the result: a hash of everything it depends on (not of where the rows came from)."""
    from transformers import __version__ as transformers_version

    template = tokenizer.chat_template
    conversations = any(row.text is None for row in rows)
    options = {
        "format": FORMAT,
        "transformers": transformers_version,
        "template": template if conversations else None,
        "tokens": [tokenizer.bos_token, tokenizer.eos_token],
        "train_on": train_on,
        # A template that writes today's date gives another text tomorrow.
        "today": str(date.today()) if conversations and "strftime_now" in str(template) else None,
    }
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        content = (row.messages, row.tools) if row.text is None else (row.text, row.trained_from)
        digest.update(json.dumps(content, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _compute(
    rows: Sequence[Row], tokenizer: Any, train_on: TrainOn, workers: int | None, progress: Progress | None
) -> Tokenised:
    chunks = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    count = min(workers or _cores(), len(chunks))
    if count > 1 and _size(rows) >= _SMALL:
        parts = _in_processes(chunks, tokenizer, train_on, count, progress, len(rows))
    else:
        encoder, parts = Encoder(tokenizer, train_on), []
        for chunk in chunks:
            parts.append(_encode(encoder, chunk))
            _tell(progress, len(parts), len(rows))
    return _join(parts)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(rows: Sequence[Row]) -> int:
    """Characters in `rows`, counted only until they are many."""
    total = 0
    for row in rows:
        total += len(row.text) if row.text is not None else sum(len(str(m.get("content"))) for m in row.messages)
        if total >= _SMALL:
            break
    return total


def _tell(progress: Progress | None, chunks: int, total: int) -> None:
    if progress:
        progress(min(chunks * _CHUNK, total), total)


def _in_processes(
    chunks: Sequence[Sequence[Row]],
    tokenizer: Any,
    train_on: TrainOn,
    count: int,
    progress: Progress | None,
    total: int,
) -> list[Tokenised]:
    # fork needs no guard in the user's script and no second import; the children touch neither threads nor a GPU.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    parts: list[Tokenised] = []
    waiting: deque[Future[Tokenised]] = deque()
    pool = ProcessPoolExecutor(count, context, _start_worker, (tokenizer, train_on, language()))
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 4 * count:
                parts.append(waiting.popleft().result())
                _tell(progress, len(parts), total)
        while waiting:
            parts.append(waiting.popleft().result())
            _tell(progress, len(parts), total)
    except BrokenProcessPool as error:
        raise DataError(
            tr("A process that tokenises died, most likely for lack of memory."),
            remedy=tr("Use fewer of them: `data.workers: 1`."),
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return parts


_encoder: Encoder | None = None


def _start_worker(tokenizer: Any, train_on: TrainOn, code: str) -> None:
    global _encoder
    # Ctrl-C is the parent's to handle, and handlers inherited from it would act twice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_language(code)
    _encoder = Encoder(tokenizer, train_on)


def _work(chunk: Sequence[Row]) -> Tokenised:
    assert _encoder is not None
    return _encode(_encoder, chunk)


def _encode(encoder: Encoder, rows: Sequence[Row]) -> Tokenised:
    """Tokenise one chunk; bad rows are set aside with the index inside the chunk."""
    rendered, bad = [], []
    for index, row in enumerate(rows):
        try:
            rendered.append(encoder.render(row))
        except DataError as error:
            bad.append(RefusedRow(index, error.what, error.remedy))
    examples = encoder.tokens(rendered)
    refused = {b.row for b in bad}
    lengths = np.zeros(len(rows), np.int64)
    lengths[[i for i in range(len(rows)) if i not in refused]] = [len(e.input_ids) for e in examples]
    return Tokenised(
        np.fromiter((t for e in examples for t in e.input_ids), np.int32),
        np.fromiter((t for e in examples for t in e.trained), np.bool_),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        sum(len(r.text) for r in rendered),
        tuple(bad),
    )


def _join(parts: Sequence[Tokenised]) -> Tokenised:
    tokens = np.concatenate([np.zeros(0, np.int32), *(p.tokens for p in parts)])
    trained = np.concatenate([np.zeros(0, np.bool_), *(p.trained for p in parts)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(p.offsets) for p in parts)])
    bad = tuple(b._replace(row=b.row + n * _CHUNK) for n, part in enumerate(parts) for b in part.bad)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Tokenised(tokens, trained, offsets, sum(p.characters for p in parts), bad)


def checksum(*arrays: NDArray[Any]) -> str:
    """A hash of the arrays' types, lengths and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _write(path: Path, value: Tokenised) -> None:
    if value.bad:
        return  # why a row is bad is written in one language, and a person is about to mend it
    about = {
        "checksum": checksum(value.tokens, value.trained, value.offsets),
        "characters": str(value.characters),
    }
    arrays = {"tokens": value.tokens, "trained": value.trained, "offsets": value.offsets}
    try:
        write_atomic(path, save(arrays, metadata=about))
    except OSError:
        return  # a cache that cannot be written (full disk, read-only home) only costs time


def _read(path: Path, rows: int) -> Tokenised | None:
    """What `_write` wrote; None when it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tokens, trained, offsets = (file.get_tensor(name) for name in ("tokens", "trained", "offsets"))
        whole = about["checksum"] == checksum(tokens, trained, offsets) and len(offsets) == rows + 1
        return Tokenised(tokens, trained, offsets, int(about["characters"]), cached=True) if whole else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
