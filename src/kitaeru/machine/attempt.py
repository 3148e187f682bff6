"""Calls a function in forks of this process, each a group of its own, and ends them when their time is up.

For a process that has imported what the function needs and touched no GPU: a fork then costs milliseconds, and whatever
happens in it (a driver that hangs, a crash in a library) stays there.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

HUNG = "hung"
# Linux: the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1
Answer = dict[str, Any]


def attempt(
    folder: Path,
    ranks: int,
    environment: Mapping[str, str],
    function: Callable[..., Answer],
    *arguments: Any,
    seconds: float,
) -> list[Answer | str]:
    """`function(rank, ranks, store, *arguments)` in `ranks` forks; what each gave, or in words why it gave nothing.

    `store` is a folder that the ranks share; `HUNG` means that time was up.
    """
    store = Path(tempfile.mkdtemp(dir=folder))
    left: dict[int, int] = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _inside(store, rank, ranks, environment, function, arguments)
        left[pid] = rank
    every = tuple(left)
    end = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while left and time.monotonic() < end:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        # Whoever waits for one that failed would wait for ever.
        if any(codes.values()):
            end = min(end, time.monotonic() + 2)
        time.sleep(0.01)
    for pid in every:
        end_group(pid)
    for pid in left:
        _reap(pid)
    answers: list[Answer | str] = []
    for rank in range(ranks):
        said = store / f"answer-{rank}"
        if said.is_file():
            answers.append(json.loads(said.read_text(encoding="utf-8")))
        else:
            answers.append(f"exit code {codes[rank]}" if rank in codes else HUNG)
    return answers


def end_group(leader: int) -> None:
    """End a process that leads a group of its own, and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _reap(pid: int) -> None:
    """Take leave of a killed process; one that the driver holds on to is left behind."""
    end = time.monotonic() + 2
    while time.monotonic() < end and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.01)


def _inside(
    store: Path,
    rank: int,
    ranks: int,
    environment: Mapping[str, str],
    function: Callable[..., Answer],
    arguments: tuple[Any, ...],
) -> NoReturn:
    """The life of a fork."""
    code = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(environment)
        answer: Answer | str
        try:
            answer = function(rank, ranks, store, *arguments)
            code = 0
        except Exception as error:
            lines = str(error).strip().splitlines()
            answer = f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
        new = store / f"new-{rank}"
        new.write_text(json.dumps(answer), encoding="utf-8")
        new.replace(store / f"answer-{rank}")
    finally:
        os._exit(code)
