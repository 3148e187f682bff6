"""Checkpoints: nothing is lost, whenever the process is killed.

A checkpoint is a folder `step-00000120` with three files:

- `state.safetensors`: tensors by flat name ("model/NAME", "optimizer/NAME/KEY", "rng/NAME");
- `state.json`: everything else, as JSON;
- `manifest.json`: size and SHA-256 of the others. Written last: without it a folder is no checkpoint.

Processes that have pieces of tensors write them themselves: `state-0001.safetensors` and so on (large ones in several
files, so that a copy of one is all that is in RAM beside what is written) hold rows of a tensor,
under its name and the number of the first ("model/NAME@4096"). Whoever reads gets it whole: how it was cut does not
matter.

It is written into a hidden folder beside its place, flushed to disk, read back and only then renamed. An exclusive lock
on the folder, which the kernel drops when its holder dies, tells what is still being written from what was left over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kitaeru.engine.checkpoint_lock import exclusive
from kitaeru.engine.same_run import compare as compare
from kitaeru.errors import CheckpointError
from kitaeru.files import sync_directory, write_atomic, write_json
from kitaeru.i18n import tr

TENSORS, META, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REPLACED, _REMOVED, _DAMAGED = ".writing", ".replaced", ".removed", ".damaged"
# Between the name of a tensor and the number of a piece's first row.
ROW = "@"
_NOTE = ".part-{:04d}.json"
FILE_BYTES = 2 << 30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Path:
    """Write and verify the checkpoint of `step` in `folder`; one of the same step is replaced.

    Tensors may be of any shape, dtype and device. `meta` comes back as JSON keeps it: tuples as lists, keys as strings.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full or broken, or another process is writing here. Earlier checkpoints are whole.
        TypeError: `meta` is not JSON.
    """
    draft = begin(folder, step, room_bytes(tensors), meta)
    try:
        write_part(draft.temporary, 0, tensors)
        return draft.complete(1)
    finally:
        draft.drop()


def room_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """What a file of these takes at most."""
    return sum(tensor.nbytes + 512 for tensor in tensors.values())


def begin(folder: Path, step: int, needed_bytes: int, meta: Mapping[str, Any]) -> Draft:
    """Make ready for the checkpoint of `step`, and keep other writers out until it is complete (or this process ends).

    Raises:
        CheckpointError: the disk is full or broken, or another process is writing here.
        TypeError: `meta` is not JSON.
    """
    text = json.dumps(meta, ensure_ascii=False)
    path = folder / f"step-{step:08d}"
    draft = Draft(path, _hidden(path, _WRITING), step, text, ExitStack())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.held.enter_context(exclusive(folder))
        _tidy(folder)
        _check_room(folder, step, len(text.encode()) + needed_bytes + 65536)
        draft.temporary.mkdir()
    except BaseException as error:
        draft.held.close()
        raise _write_error(path, error) if isinstance(error, OSError) else error from error
    return draft


def write_part(temporary: Path, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write, flush and read back the files of process `number`, and note how that went for the one who completes it.
    Tensors are copied to the CPU a file at a time.
    """
    note, path, facts = temporary / _NOTE.format(number), temporary, {}
    try:
        for place, names in enumerate(_filling(tensors)):
            path = temporary / _file(number, place)
            plain = _plain({name: tensors[name] for name in names})
            save_file(plain, path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            _read_back(path, plain)
            facts[path.name] = _facts(path)
        write_json(note, facts)
    except Exception as error:
        what = _write_error(path, error)
        write_json(note, {"what": what.what, "remedy": what.remedy})
        if not isinstance(error, (OSError, SafetensorError)):
            raise


@dataclass
class Draft:
    """A checkpoint that is being written in `temporary`, and will be at `path`."""

    path: Path
    temporary: Path
    step: int
    text: str
    held: ExitStack

    def complete(self, parts: int) -> Path:
        """Wait for so many parts, mark it as complete and rename it. Returns the checkpoint's folder.

        Raises:
            CheckpointError: a part could not be written. Earlier checkpoints are whole.
        """
        try:
            files: dict[str, Any] = {}
            for number in range(parts):
                files |= self._part(number)
            write_atomic(self.temporary / META, self.text)
            if (self.temporary / META).read_text(encoding="utf-8") != self.text:
                raise OSError(errno.EIO, _differs())
            files[META] = _facts(self.temporary / META)
            for number in range(parts):
                (self.temporary / _NOTE.format(number)).unlink()
            write_json(self.temporary / MANIFEST, {"version": 1, "step": self.step, "files": files})
            _put_in_place(self.temporary, self.path)
        except OSError as error:
            raise _write_error(self.path, error) from error
        finally:
            self.drop()
        return self.path

    def drop(self) -> None:
        """Remove what is not complete, and let other writers in."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.held.close()

    def _part(self, number: int) -> dict[str, Any]:
        note = self.temporary / _NOTE.format(number)
        while not note.exists():
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if "what" in found:
            raise CheckpointError(found["what"], where=str(self.path), remedy=found["remedy"])
        return found


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, whole, on the CPU; each is read when it is asked for."""

    def __init__(self, files: Collection[Path]) -> None:
        self._pieces: dict[str, list[tuple[int, Any, str]]] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 - not a dict
                name, _, row = key.partition(ROW)
                self._pieces.setdefault(name, []).append((int(row or 0), file, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = [file.get_tensor(key) for _, file, key in self._pieces[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


def load(path: Path) -> tuple[Stored, dict[str, Any]]:
    """The tensors and the meta data of the checkpoint at `path`, after verifying it.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    reason = verify(path)
    if reason:
        raise CheckpointError(
            tr("This checkpoint cannot be used: {reason}", reason=reason),
            where=str(path),
            remedy=tr("Resume without naming a checkpoint: the newest good one is found by itself."),
        )
    meta: dict[str, Any] = json.loads((path / META).read_text(encoding="utf-8"))
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return Stored([path / name for name in manifest["files"] if name != META]), meta


def verify(path: Path) -> str | None:
    """None when the checkpoint at `path` is whole, else the reason why it is not, as a sentence for a person."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if path.name != f"step-{manifest['step']:08d}":
            return tr("it was written as step {step}.", step=manifest["step"])
        for name in {TENSORS: None, META: None, **manifest["files"]}:
            expected = manifest["files"][name]
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return tr(
                    "{file} has {size} bytes instead of {expected}.", file=name, size=size, expected=expected["bytes"]
                )
            if _sha256(path / name) != expected["sha256"]:
                return tr("the content of {file} has changed since it was written.", file=name)
    except FileNotFoundError as error:
        return tr("{file} is missing.", file=Path(error.filename).name)
    except (ValueError, KeyError, TypeError):
        return tr("{file} cannot be read.", file=MANIFEST)
    except OSError as error:
        return tr("it cannot be read ({error}).", error=error)
    return None


def available(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first; not verified."""
    if not folder.is_dir():
        return []
    found = (entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def size_bytes(path: Path) -> int:
    """Bytes on disk of the checkpoint at `path`."""
    return sum(file.stat().st_size for file in path.iterdir())


def newest_good(folder: Path, *, damaged: Callable[[Path, str], None]) -> Path | None:
    """The newest whole checkpoint, or None; `damaged` hears of each newer one that is not, and why.

    A damaged one is set aside under the name `step-….damaged`, so that it never counts as one of those to keep.
    """
    if not folder.is_dir():
        return None
    with suppress(OSError, CheckpointError), exclusive(folder):  # a folder that can only be read is read as it is
        _tidy(folder)
    for path in reversed(available(folder)):
        reason = verify(path)
        if reason is None:
            return path
        damaged(path, reason)
        aside = path.with_name(path.name + _DAMAGED)
        with suppress(OSError, CheckpointError), exclusive(folder):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None


def prune(folder: Path, keep: int, protect: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps in `protect`.

    Damaged ones that were set aside go too, once a checkpoint of the same or a later step exists.
    """
    if keep < 1:
        raise ValueError("at least one checkpoint must be kept")
    present = available(folder)
    doomed = [path for path in present[:-keep] if step_of(path) not in protect]
    if present:
        newest = present[-1].name
        doomed += [path for path in folder.glob("step-*" + _DAMAGED) if path.stem <= newest]
    if not doomed:
        return
    with exclusive(folder):
        for path in doomed:
            # Renamed first: a kill while files are deleted must not leave half a checkpoint under a good name.
            hidden = _hidden(path, _REMOVED)
            path.rename(hidden)
            shutil.rmtree(hidden)


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CPU tensors, contiguous, none sharing memory with another (safetensors refuses those)."""
    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return plain


def _file(number: int, place: int = 0) -> str:
    if not number and not place:
        return TENSORS
    return f"state-{number:04d}.safetensors" if not place else f"state-{number:04d}-{place:04d}.safetensors"


def _filling(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names for file after file; there is always one."""
    names: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if names and filled + tensor.nbytes > FILE_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += tensor.nbytes
    yield names


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _differs() -> str:
    return tr("what was read back differs from what was written")


def _read_back(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare every tensor on disk with the one in memory, bit for bit."""
    with safe_open(path, framework="pt") as file:
        same = set(file.keys()) == set(tensors)
        same = same and all(_bits_equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    if not same:
        raise OSError(errno.EIO, _differs())


def _bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes: NaN equals itself, and -0.0 differs from 0.0.
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. A kill between the two renames of a replacement is mended by `_tidy`."""
    replaced = _hidden(path, _REPLACED)
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what dead writers left in `folder`, and put back a checkpoint whose replacement never came.

    The caller holds the lock, so nobody is writing.
    """
    for entry in folder.glob(".step-*"):
        place = folder / entry.stem.removeprefix(".")
        if entry.suffix == _REPLACED and not place.exists():
            entry.rename(place)
        elif entry.suffix in (_WRITING, _REPLACED, _REMOVED):
            shutil.rmtree(entry)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_room(folder: Path, step: int, needed_bytes: int) -> None:
    missing = needed_bytes - shutil.disk_usage(folder).free
    if missing > 0:
        raise CheckpointError(
            tr(
                "The checkpoint of step {step} takes {needed}; the disk is {missing} short of that.",
                step=step,
                needed=_size(needed_bytes),
                missing=_size(missing),
            ),
            where=str(folder),
            remedy=_disk_remedy(),
        )


def _write_error(path: Path, error: Exception) -> CheckpointError:
    what = tr("The checkpoint could not be written: {error}", error=error)
    # safetensors raises its own class with the system's error number in the text.
    number = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
    other = tr("Check that the folder can be written to and that the disk is sound, then go on with --resume.")
    return CheckpointError(what, where=str(path), remedy=_disk_remedy() if code in _DISK_FULL else other)


def _disk_remedy() -> str:
    return tr(
        "Free space on this disk, then go on with --resume: the earlier checkpoints are whole. A lower "
        "`train.keep_checkpoints` needs less."
    )


def _size(count_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count_bytes >= scale:
            return f"{count_bytes / scale:.1f} {unit}"
    return f"{count_bytes} B"
