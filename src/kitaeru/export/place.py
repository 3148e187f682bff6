"""A folder that is complete or not there: written beside its place, and renamed when it has been proved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kitaeru.errors import ModelError, UsageError
from kitaeru.files import sync_directory
from kitaeru.i18n import tr


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and goes when it does not.

    Raises:
        UsageError: `target` holds something already.
        ModelError: it cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(tr("{folder} is not empty.", folder=target), remedy=tr("Choose another folder with -o."))
    temporary = target.parent / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.iterdir():  # safetensors makes its files private
            file.chmod(0o666 & ~mask)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise ModelError(
            tr("The files cannot be written: {error}", error=error),
            where=str(target),
            remedy=tr("Free space on this disk, or choose another folder with -o."),
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weight_files_bytes(folder: Path) -> int:
    """Bytes of the .safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
