"""Starts the processes of a run on the devices of this host, and says which one failed and why.

Only the run's folder crosses into a worker. torch's elastic agent starts them and stops the others when one ends badly.
Where there is a GPU, each is a fresh process: importing PEFT imports bitsandbytes, which asks the driver what cards
there are, and a process forked after that can use none. Without one they are forked from a process that has imported
everything, so that starting N of them takes as long as starting one.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kitaeru.engine.hosts import Team
from kitaeru.engine.rank import Record, lost_remedy, lost_text, records
from kitaeru.errors import KitaeruError, RankLostError
from kitaeru.events import EventLog, Notice, RunFinished
from kitaeru.i18n import tr

# After one has failed, the others get so long to go before they are killed.
SHUTDOWN_SECONDS = 8


def launch(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...], team: Team) -> Any:
    """Call `function(*arguments, team)` in the processes of this host; what it gave on the first of them.

    The function must be importable by name. Ctrl-C and SIGTERM are passed on to the processes, which save and end.

    Raises:
        RankLostError: a process died or was lost; names it, its last step and the likely cause.
        SteppedDownError: memory ran out; call again, with arguments that go on from the last checkpoint.
        KitaeruError: the error that a process raised.
    """
    for noisy in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    method = start_method()
    if method == "forkserver":
        _start_forkserver()
    for rank in range(team.first, team.first + team.local):
        (folder / "logs" / f"rank-{rank}.json").unlink(missing_ok=True)
    options: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS} if _has("shutdown_timeout") else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=team.local,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # hosts start again together (engine.hosts)
        monitor_interval=0.1,
        start_method=method,
        signals_to_handle="SIGHUP",  # the others are passed on below
        **options,
    )
    try:
        with _signals_passed_on(folder), _script_left_alone():
            answers: dict[int, Any] = elastic_launch(config, function)(*arguments, team)
    except ChildFailedError as failed:
        failures = {team.first + local: failure for local, failure in failed.failures.items()}
        raise explain(folder, failures, team.restarts) from None
    return answers[0]


def start_method() -> str:
    """How Python starts a worker here: `spawn` where there is a GPU, else `forkserver`."""
    return "spawn" if torch.cuda.is_available() else "forkserver"


def _start_forkserver() -> None:
    """Start the process that workers are forked from. It must outlive a SIGTERM that everybody gets, as schedulers send
    it: the workers save first, and end through it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["kitaeru.engine.rank", "kitaeru.report.live"])
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGTERM, before)


def begin_worker(agent: int) -> None:
    """What a worker does first: hear SIGTERM again, and end with the process that started it, however that ends.

    A process that workers are forked from lives as long as any of them does.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(agent,), name="agent", daemon=True).start()


def _end_with(process: int) -> None:
    try:
        select.select([os.pidfd_open(process)], [], [])
    except ProcessLookupError:
        pass  # it has gone already
    except OSError:
        return  # a system without such handles
    os.kill(os.getpid(), signal.SIGKILL)


def _has(name: str) -> bool:
    return name in {field.name for field in fields(LaunchConfig)}


@contextmanager
def _signals_passed_on(folder: Path) -> Iterator[None]:
    def pass_on(number: int, _: object) -> None:
        own = socket.gethostname()
        for record in (record for record in records(folder) if record.host == own):
            with suppress(ProcessLookupError):
                os.kill(record.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _script_left_alone() -> Iterator[None]:
    """Python imports the main script again in each process that it starts; the workers need nothing of it.

    A script without `if __name__ == "__main__"` would run from its top in every one of them.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def explain(folder: Path, failures: Mapping[int, ProcessFailure], restarts: int = 0) -> KitaeruError:
    """The error behind processes that ended badly: what one of them said itself, or a guess from how it died."""
    said = records(folder, restarts)
    for record in said:
        if record.state == "failed" and record.kind:
            return record.error()
    for record in said:
        if record.state == "lost":
            return record.error()
    killed = [(rank, failure) for rank, failure in failures.items() if failure.exitcode < 0]
    states = {record.rank: record.state for record in said}
    killed.sort(key=lambda item: states.get(item[0]) != "running")
    for rank, failure in killed:
        return _lost(folder, rank, said, died_of(-failure.exitcode))
    for record in sorted(said, key=lambda r: r.state != "failed"):
        if record.state in ("failed", "victim"):
            return _lost(folder, record.rank, said, record.what.splitlines()[0])
    rank, failure = next(iter(failures.items()))
    return _lost(folder, rank, said, tr("it ended with code {code}", code=failure.exitcode))


def died_of(number: int) -> str:
    """What a process that a signal ended most likely died of."""
    match number:
        case signal.SIGKILL:
            return tr("killed from outside, most likely because the machine ran out of RAM (see `dmesg`)")
        case signal.SIGBUS:
            return tr("no room left in shared memory (in a container, raise --shm-size)")
        case signal.SIGSEGV | signal.SIGABRT | signal.SIGILL | signal.SIGFPE:
            return tr(
                "a library crashed ({signal}); its words are in the log of the rank", signal=signal.Signals(number).name
            )
    return tr("ended by {signal}", signal=signal.Signals(number).name)


def _lost(folder: Path, rank: int, said: list[Record], why: str) -> KitaeruError:
    host = next((record.host for record in said if record.rank == rank), "localhost")
    log = folder / "logs" / f"rank-{rank}.log"
    step = last_step(folder / "events.jsonl") or last_step(log)
    return RankLostError(lost_text(rank, host, step, why), where=str(log) if rank else None, remedy=lost_remedy())


def last_step(log: Path) -> int:
    """The last finished step that a log tells of; 0 where there is none."""
    last = 0
    with suppress(OSError), log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"kind": "step"' in line:
                with suppress(ValueError, KeyError):
                    last = max(last, int(json.loads(line)["step"]))
    return last


def tell_failed(folder: Path, error: KitaeruError) -> None:
    """Into the log of the run, since the process that writes it may be the one that died."""
    with suppress(OSError):
        path = folder / "events.jsonl"
        log, step = EventLog(path), last_step(path)
        log(Notice(level="error", text=str(error), step=step))
        log(RunFinished(outcome="failed", step=step, seconds=0.0, reason=str(error)))
        log.close()
