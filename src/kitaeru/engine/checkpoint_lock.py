"""One writer at a time in a folder of checkpoints."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kitaeru.errors import CheckpointError
from kitaeru.i18n import tr

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def exclusive(folder: Path, *, patience_seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock of `folder`; the kernel lets go of it when the process dies, however it dies.

    A file system without locks goes without.

    Raises:
        CheckpointError: another process kept the lock for `patience_seconds`.
        OSError: the lock file cannot be made.
    """
    with (folder / ".lock").open("a") as file:
        _acquire(file, folder, time.monotonic() + patience_seconds)
        yield


def _acquire(file: IO[str], folder: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    tr("Another process is writing checkpoints here."),
                    where=str(folder),
                    remedy=tr("Let the other run finish or stop it, or give this run another `output`."),
                ) from None
            time.sleep(0.02)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return
            raise
        else:
            return
