"""Checkpoints: nothing is lost, whenever the process is killed.

A checkpoint is a folder `step-00000120` with three files:

- `state.safetensors`: tensors by flat name ("model/NAME", "optimizer/NAME/KEY", "rng/NAME");
- `state.json`: everything else, as JSON;
- `manifest.json`: size and SHA-256 of the two. Written last: without it a folder is no checkpoint.

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
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kitaeru.engine.checkpoint_lock import exclusive
from kitaeru.engine.same_run import compare as compare
from kitaeru.errors import CheckpointError
from kitaeru.files import sync_directory, write_atomic, write_json
from kitaeru.i18n import tr

TENSORS, META, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REPLACED, _REMOVED, _DAMAGED = ".writing", ".replaced", ".removed", ".damaged"
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
    text = json.dumps(meta, ensure_ascii=False)
    plain = _plain(tensors)
    path = folder / f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            _tidy(folder)
            _check_room(folder, step, len(text.encode()) + sum(t.nbytes + 512 for t in plain.values()) + 65536)
            _write_and_rename(path, step, plain, text)
    except (OSError, SafetensorError) as error:
        raise _write_error(path, error) from error
    return path


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the meta data of the checkpoint at `path`, after verifying it.

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
    return load_file(path / TENSORS), meta


def verify(path: Path) -> str | None:
    """None when the checkpoint at `path` is whole, else the reason why it is not, as a sentence for a person."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if path.name != f"step-{manifest['step']:08d}":
            return tr("it was written as step {step}.", step=manifest["step"])
        for name in (TENSORS, META):
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
    return sum((path / name).stat().st_size for name in (TENSORS, META, MANIFEST))


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


def _write_and_rename(path: Path, step: int, tensors: dict[str, torch.Tensor], text: str) -> None:
    temporary = _hidden(path, _WRITING)
    try:
        _write(temporary, step, tensors, text)
        _read_back(temporary, tensors, text)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(temporary: Path, step: int, tensors: dict[str, torch.Tensor], text: str) -> None:
    temporary.mkdir()
    save_file(tensors, temporary / TENSORS)
    with (temporary / TENSORS).open("rb+") as file:
        os.fsync(file.fileno())
    write_atomic(temporary / META, text)
    files = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
        for name in (TENSORS, META)
    }
    write_json(temporary / MANIFEST, {"version": 1, "step": step, "files": files})


def _read_back(temporary: Path, tensors: Mapping[str, torch.Tensor], text: str) -> None:
    """Compare every tensor on disk with the one in memory, bit for bit."""
    with safe_open(temporary / TENSORS, framework="pt") as file:
        same = set(file.keys()) == set(tensors)
        same = same and all(_bits_equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    if not same or (temporary / META).read_text(encoding="utf-8") != text:
        raise OSError(errno.EIO, tr("what was read back differs from what was written"))


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
