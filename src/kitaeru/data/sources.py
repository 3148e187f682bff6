"""From the path a person wrote to the files or the Hub data set it means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitaeru.data.formats import (
    COMPRESSIONS,
    PICKLES,
    Record,
    format_of,
    known_formats,
    read_records,
    refuse,
    without_nulls,
)
from kitaeru.errors import DataError
from kitaeru.i18n import tr
from kitaeru.recipe.types import SourceSection

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What `datasets.save_to_disk` writes beside its tables.
_NOT_ROWS = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}


@dataclass(frozen=True)
class Part:
    """One file of a source, or a whole Hub data set: its name for messages and where its records come from."""

    name: str
    file: Path | None
    hub: SourceSection | None = None

    def records(self) -> Iterator[Record]:
        """The records, in order. Raises DataError."""
        if self.file is not None:
            return read_records(self.file)
        assert self.hub is not None
        return _hub_records(self.hub)


def parts_of(source: SourceSection) -> list[Part]:
    """The files of `source` in sorted order, or its Hub data set.

    Raises:
        DataError: nothing of that name, a file kitaeru does not read, or a folder with none that it does.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return [Part(str(file), file) for file in _files_in(path)]
    if path.exists():
        if format_of(path) is None:
            raise refuse(path)
        return [Part(str(path), path)]
    if _may_be_hub_id(source.path, path):
        return [Part(source.path, None, source)]
    raise _missing(path)


def _files_in(folder: Path) -> list[Path]:
    candidates = sorted(
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts) and file.is_file()
    )
    known = [file for file in candidates if format_of(file) and file.name not in _NOT_ROWS]
    if known:
        return known
    if any(file.suffix == ".arrow" for file in candidates):
        remedy = tr("This is a data set saved by `datasets`: write it with `Dataset.to_parquet` and name that file.")
    else:
        remedy = tr("Readable are: {formats} (each also .gz and .zst).", formats=known_formats())
    raise DataError(tr("The folder holds no file that kitaeru reads."), where=str(folder), remedy=remedy)


def _may_be_hub_id(name: str, path: Path) -> bool:
    if not _HUB_ID.fullmatch(name) or format_of(path) or path.suffix.lower() in (*PICKLES, *COMPRESSIONS):
        return False
    return _nearest(path) is None


def _nearest(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return str(path.parent / close[0]) if close else None


def _missing(path: Path) -> DataError:
    nearest = _nearest(path)
    if nearest:
        remedy = tr("Did you mean {nearest}?", nearest=nearest)
    elif not path.parent.is_dir():
        remedy = tr("The folder {folder} does not exist either.", folder=path.parent)
    else:
        names = sorted(entry.name for entry in path.parent.iterdir() if format_of(entry) and entry.is_file())
        remedy = (
            tr("In that folder are: {names}", names=", ".join(names[:8]))
            if names
            else tr("Name an existing file or folder, or a data set on the Hub such as `owner/name`.")
        )
    return DataError(tr("There is no such file or folder."), where=str(path), remedy=remedy)


def _hub_records(source: SourceSection) -> Iterator[Record]:
    rows = _load_from_hub(source)
    for number, row in enumerate(rows, 1):
        yield Record(number, without_nulls(dict(row)))


def _load_from_hub(source: SourceSection) -> Any:
    """The split of the Hub data set; code that comes with a data set never runs (`datasets` 4 cannot run it)."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    where = source.path
    if not _cached(source.path) and not _hub_answers():
        raise _unreachable(where)
    try:
        return datasets.load_dataset(source.path, split=source.split)
    except DatasetNotFoundError as error:
        raise DataError(
            tr("There is no such file, and no such data set on the Hub (or it asks for a login)."),
            where=where,
            remedy=tr("Check the spelling. For a private or gated data set, log in first with `hf auth login`."),
        ) from error
    except (ConnectionError, OSError) as error:
        raise _unreachable(where) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(
            tr("The Hub data set cannot be read: {reason}", reason=_first_line(error)),
            where=where,
            remedy=tr("Check `split` (now: {split}); or download its files and name the folder.", split=source.split),
        ) from error


def _unreachable(where: str) -> DataError:
    return DataError(
        tr("There is no such file, and the Hub cannot be reached to look for a data set of that name."),
        where=where,
        remedy=tr("Check the path or the network; a data set loaded once before is found again without one."),
    )


def _cached(name: str) -> bool:
    import datasets

    folder = name.replace("/", "___")
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    return any((cache / spelling).is_dir() for spelling in (folder, folder.lower()))


def _hub_answers() -> bool:
    """One quick question: `datasets` itself tries for half a minute before it says that there is no network."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the HTTP library behind the session is huggingface_hub's own affair
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
