"""The hosts of a run: on each the same command runs, and starts the processes of its own devices.

They meet at a store that the first host keeps, and tell it what machine each of them is. The first host plans for all
and gives the others the plan, so that no disk need be shared; each then tokenises for itself. An attempt begins when
all are there. When it ends badly they meet again for the next one, and a host that was lost takes part again by being
started anew with the same command.

Not torch's own elastic rendezvous over hosts: there each host counts its restarts alone, the processes of hosts that
counted differently look for each other in different parts of the store (torch 2.13), and which host has rank 0, and
with it the run's files, may change with every restart. What runs on one host is torch's elastic agent.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from kitaeru.engine.ladder import RUNG
from kitaeru.engine.place import PATIENCE, Nodes, Place, attempt_key
from kitaeru.errors import KitaeruError, PlanError, SteppedDownError, TrainingError, UsageError
from kitaeru.files import write_atomic
from kitaeru.hardware import Hardware, united
from kitaeru.i18n import tr
from kitaeru.parallel.pulse import OVER, Lost

Tell = Callable[[str], None]

# How often a host says that it is there, and how long that is believed.
BEAT_SECONDS, FRESH_SECONDS = 0.3, 3.0
# Answers of the store; a host that is cut off waits so long for one.
ANSWER = timedelta(seconds=10)
# The first host goes last.
GOODBYE_SECONDS = 20.0
FILES = ("recipe.yaml", "plan.json", RUNG)


@dataclass(frozen=True)
class Team:
    """The processes of one host in one attempt: `local` of `size`, from rank `first` on, started by `agent`."""

    first: int
    local: int
    size: int
    address: str
    port: int
    attempt: int
    restarts: int
    resume: bool
    agent: int = field(default_factory=os.getpid)

    def place(self, environment: Mapping[str, str] = os.environ) -> Place:
        """The place of a process that torch's agent has started."""
        rank = int(environment["LOCAL_RANK"])
        return Place(
            self.first + rank,
            self.size,
            rank,
            self.local,
            self.address,
            self.port,
            self.restarts,
            str(self.attempt),
        )


class EndedError(Exception):
    """The first host has ended the run, and says why."""


class LeaderGoneError(Exception):
    """The first host does not answer."""


@dataclass
class Leader:
    """The first host of a run, or the only one: it keeps the store, plans, and says when an attempt begins.

    Raises:
        UsageError: the port is taken.
    """

    nodes: Nodes
    own: Hardware
    tell: Tell
    attempt: int = 0
    store: Any = field(init=False)
    _machines: list[Hardware] = field(init=False)

    def __post_init__(self) -> None:
        self._machines = [self.own]
        try:
            self.store = TCPStore(
                self.nodes.address, self.nodes.port, is_master=True, wait_for_workers=False, timeout=ANSWER
            )
        except Exception as error:
            raise UsageError(
                tr("The other hosts cannot be waited for here: {error}", error=str(error).splitlines()[0]),
                where=f"{self.nodes.address}:{self.nodes.port}",
                remedy=tr("--master is an address of the first host, and a port that is free there."),
            ) from error

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Let the others go, then the port."""
        with suppress(Exception):
            self._end("" if error is None else str(error).splitlines()[0])
        self.store = None

    def hardware(self) -> Hardware:
        """All hosts as one machine to plan for; waits until every one has said what it is.

        Raises:
            TrainingError: one did not come.
        """
        others = range(1, self.nodes.count)
        self._until(lambda: [n for n in others if not self.store.check([f"machine/{n}"])])
        self._machines += [Hardware.from_dict(json.loads(self.store.get(f"machine/{n}"))) for n in others]
        return united(self._machines) if self._machines[1:] else self.own

    def publish(self, folder: Path) -> None:
        """Give the others the plan."""
        self.store.set("plan", packed(folder))

    def meet(self, folder: Path, size: int, *, resume: bool, restarts: int) -> Team:
        """Begin an attempt of `size` processes when all hosts are there.

        Raises:
            PlanError: the processes cannot be shared out between the hosts.
            TrainingError: a host did not come (back).
        """
        counts = shares([len(machine.devices) for machine in self._machines], size)
        self.attempt += 1
        seen: dict[int, str] = {}
        moved: dict[int, float] = {}

        def missing() -> list[int]:
            for n in range(1, self.nodes.count):
                beat = self.store.get(f"here/{n}").decode() if self.store.check([f"here/{n}"]) else ""
                if beat != seen.setdefault(n, beat):
                    seen[n], moved[n] = beat, time.monotonic()
            now = time.monotonic()
            return [n for n in range(1, self.nodes.count) if now - moved.get(n, -1e9) > FRESH_SECONDS]

        self._until(missing)
        rung = _text(folder / RUNG)
        go = {"attempt": self.attempt, "restarts": restarts, "resume": resume, "rung": rung, "counts": counts}
        self.store.set("go", json.dumps(go | {"lives": {n: beat.split()[0] for n, beat in seen.items()}}))
        port = self.nodes.port or self.store.port
        return Team(0, counts[0], size, self.nodes.address, port, self.attempt, restarts, resume)

    def over(self, folder: Path, error: KitaeruError) -> None:
        """Let the processes of the other hosts know that one of this host's has failed."""
        _say_over(self.store, self.attempt, folder, error)

    def _end(self, why: str) -> None:
        self.store.set("end", why)
        until = time.monotonic() + (GOODBYE_SECONDS if not why else FRESH_SECONDS)
        others = [f"bye/{n}" for n in range(1, self.nodes.count)]
        while others and not self.store.check(others) and time.monotonic() < until:
            time.sleep(BEAT_SECONDS)

    def _until(self, missing: Callable[[], list[int]]) -> None:
        end, told = time.monotonic() + PATIENCE.total_seconds(), time.monotonic() + FRESH_SECONDS
        while names := missing():
            text = ", ".join(str(name) for name in names)
            if time.monotonic() > end:
                raise TrainingError(
                    tr("These hosts did not come within {minutes:.0f} minutes: {names}.", minutes=PATIENCE.seconds / 60,
                       names=text),
                    where=f"{self.nodes.address}:{self.nodes.port}",
                    remedy=tr("Run the same command there, with their --node-rank; they must reach this address."),
                )  # fmt: skip
            if time.monotonic() > told:
                self.tell(tr("Waiting for hosts: {names}", names=text))
                told = end
            time.sleep(BEAT_SECONDS)


class Member:
    """Any other host: it follows the first one."""

    def __init__(self, nodes: Nodes, own: Hardware, tell: Tell) -> None:
        self.nodes, self.own, self.tell = nodes, own, tell
        self.life = uuid.uuid4().hex
        self._beats, self._gone = 0, ""
        self.store: Any = None
        self.attempt = 0

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):
            self.store.set(f"bye/{self.nodes.number}", "")
        self.store = None

    def come(self) -> None:
        """Find the first host and tell it what this one is.

        Raises:
            TrainingError: it is not there.
        """
        address = f"{self.nodes.address}:{self.nodes.port}"
        end, told = time.monotonic() + PATIENCE.total_seconds(), False
        while True:
            try:
                self.store = TCPStore(self.nodes.address, self.nodes.port, is_master=False, timeout=ANSWER)
                self.store.set(f"machine/{self.nodes.number}", json.dumps(self.own.to_dict()))
                self._gone = ""
                return
            except Exception as error:
                if time.monotonic() > end:
                    raise TrainingError(
                        tr("The first host does not answer: {error}", error=str(error).splitlines()[0]),
                        where=address,
                        remedy=tr("Start it with the same command and --node-rank 0; this host must reach it."),
                    ) from error
            if not told:
                self.tell(tr("Waiting for the first host, {address}", address=address))
                told = True
            time.sleep(1)

    def folder(self) -> Path:
        """The run's folder, with the plan in it.

        Raises:
            EndedError, LeaderGoneError: there will be none.
        """
        while not self._has("plan"):
            time.sleep(BEAT_SECONDS)
        return unpacked(self._get("plan"))

    def meet(self, folder: Path) -> Team:
        """Wait for the next attempt.

        Raises:
            EndedError, LeaderGoneError: there will be none.
        """
        while True:
            self._beats += 1
            self._set(f"here/{self.nodes.number}", f"{self.life} {self._beats}")
            said = self._get("go") if self._has("go") else ""
            if said and said != self._gone:
                go = json.loads(said)
                if go["lives"].get(str(self.nodes.number)) == self.life:
                    break
            time.sleep(BEAT_SECONDS)
        self._gone, self.attempt = said, go["attempt"]
        _make(folder / RUNG, go["rung"])
        counts, number = go["counts"], self.nodes.number
        port = self.nodes.port
        return Team(
            sum(counts[:number]), counts[number], sum(counts), self.nodes.address, port, go["attempt"],
            go["restarts"], go["resume"],
        )  # fmt: skip

    def over(self, folder: Path, error: KitaeruError) -> None:
        """Let the processes of the other hosts know that one of this host's has failed."""
        with suppress(Exception):  # it may be the connection that failed
            _say_over(self.store, self.attempt, folder, error)

    def _has(self, key: str) -> bool:
        if self._asked(lambda: self.store.check(["end"])):
            raise EndedError(self._get("end"))
        return bool(self._asked(lambda: self.store.check([key])))

    def _get(self, key: str) -> str:
        return str(self._asked(lambda: self.store.get(key).decode()))

    def _set(self, key: str, value: str) -> None:
        self._asked(lambda: self.store.set(key, value))

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:
            raise LeaderGoneError(str(error).splitlines()[0]) from error


def shares(devices: Sequence[int], size: int) -> list[int]:
    """Processes of each host: its devices, or where there are none (or not as many) equal parts.

    >>> shares([2, 4], 6), shares([0, 0], 4)
    ([2, 4], [2, 2])

    Raises:
        PlanError: they cannot be shared out.
    """
    if sum(devices) == size:
        return list(devices)
    if size % len(devices):
        raise PlanError(
            tr("{size} processes cannot be shared out between {count} hosts.", size=size, count=len(devices)),
            remedy=tr("Set limits.devices to the devices of all hosts together, or leave it out."),
        )
    return [size // len(devices)] * len(devices)


def packed(folder: Path) -> str:
    """A planned run, for a host that does not see its folder."""
    files = {name: _text(folder / name) for name in FILES}
    return json.dumps({"folder": str(folder), "files": files})


def unpacked(text: str) -> Path:
    """The folder of a planned run, written if it is not there as it should be."""
    value = json.loads(text)
    folder = Path(value["folder"])
    for name, content in value["files"].items():
        _make(folder / name, content)
    return folder


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _make(path: Path, content: str) -> None:
    if _text(path) == content:
        return
    if content:
        write_atomic(path, content)
    else:
        path.unlink(missing_ok=True)


def _say_over(store: Any, attempt: int, folder: Path, error: KitaeruError) -> None:
    rung = _text(folder / RUNG) if isinstance(error, SteppedDownError) else ""
    lost = Lost(0, "", 0, 0, error.what, type(error).__name__, rung)
    PrefixStore(attempt_key(str(attempt)), store).set(OVER, json.dumps(asdict(lost)))
