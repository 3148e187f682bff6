"""Who started this process, and which of several it is: kitaeru itself, torchrun, accelerate, or Slurm's srun.

Two things can be started on several hosts. One process for each device: a `Place` is such a process. Or one process for
each host, which starts those of its devices itself: `Nodes` says which host it is, and `engine.hosts` does the rest.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from kitaeru.errors import UsageError
from kitaeru.i18n import tr

PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Place:
    """One process of several. `local_rank` of `local_size` counts those of this host; `restarts` how often they were
    started anew. The store at `address` and `port` is kept by rank 0, or where the processes share one that others keep
    (`attempt`), by whoever started them; each attempt has its own part of it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    restarts: int = 0
    attempt: str = ""


@dataclass(frozen=True)
class Nodes:
    """One host of several, on each of which the same command runs: number `number` of `count`. They meet at the first
    one's address and port (0: a free one).
    """

    count: int = 1
    number: int = 0
    address: str = "localhost"
    port: int = 0


def nodes_given(count: int | None, number: int | None, master: str | None) -> Nodes | None:
    """What a person says with `--nodes 2 --node-rank 0 --master host:port`; None for one host.

    >>> nodes_given(2, 1, "10.0.0.1:29500"), nodes_given(None, None, None)
    (Nodes(count=2, number=1, address='10.0.0.1', port=29500), None)
    >>> nodes_given(2, 0, "[fd00::1]:29500").address
    'fd00::1'

    Raises:
        UsageError: half of it is missing, or it does not fit together.
    """
    if count in (None, 1) and number in (None, 0):
        return None
    remedy = tr("On every host: --nodes COUNT --node-rank NUMBER (from 0) --master HOST:PORT of the first.")
    if count is None or number is None or master is None:
        raise UsageError(tr("A run on several hosts needs --nodes, --node-rank and --master."), remedy=remedy)
    address, _, port = master.rpartition(":")
    if not address or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(tr("`{master}` is not HOST:PORT.", master=master), remedy=remedy)
    if not 0 <= number < count:
        raise UsageError(tr("Host {number} of {count}: they count from 0.", number=number, count=count), remedy=remedy)
    return Nodes(count, number, address.strip("[]"), int(port))


def nodes_of_slurm(environment: Mapping[str, str] = os.environ) -> Nodes | None:
    """The host that srun has started this process on, where it has started one process on each of several.

    With more tasks on a host, each of them trains (`placed`).
    """
    if not environment.get("SLURM_STEP_NODELIST") or not _one_task_a_host(environment):
        return None
    return Nodes(
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_NODEID"]),
        environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        int(environment.get("MASTER_PORT") or _slurm_port(environment)),
    )


def _one_task_a_host(environment: Mapping[str, str]) -> bool:
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    hosts = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
    return tasks > 1 and tasks == int(hosts)


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port made of the job's number: it is free for one job."""
    return 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000


def placed(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that a launcher has given this process; None when a person started it.

    torchrun and accelerate set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; srun its
    own variables. Only those two families are read.

    Raises:
        UsageError: half of the variables are set.
    """
    if environment.get("WORLD_SIZE") and environment.get("RANK"):
        return _from_torch(environment)
    # A batch script itself is a task of its own: only srun's steps count.
    several = int(environment.get("SLURM_NTASKS", "1")) > 1 and not _one_task_a_host(environment)
    return _from_slurm(environment) if several and environment.get("SLURM_STEP_NODELIST") else None


def _from_torch(environment: Mapping[str, str]) -> Place:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UsageError(
            tr("RANK and WORLD_SIZE are set, but {names} is not.", names=", ".join(missing)),
            remedy=tr("Start with `kitaeru train`, or give all that torchrun gives."),
        )
    size = int(environment["WORLD_SIZE"])
    return Place(
        rank=int(environment["RANK"]),
        size=size,
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


def _from_slurm(environment: Mapping[str, str]) -> Place:
    """Its first host is where they meet."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        size=int(environment["SLURM_NTASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=tasks_of_node(tasks, int(environment.get("SLURM_NODEID", "0"))),
        address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        port=int(environment.get("MASTER_PORT") or _slurm_port(environment)),
    )


def first_host(nodes: str) -> str:
    """The first name in Slurm's short form of a list of hosts.

    >>> first_host("gpu[07-09,12],cpu1"), first_host("node3"), first_host("a-1,b[1-2]")
    ('gpu07', 'node3', 'a-1')
    """
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,\[]*)", nodes)
    if match is None:
        raise ValueError(f"no host in {nodes!r}")
    name, numbers, rest = match.groups()
    return name + re.split("[-,]", numbers)[0] + rest if numbers else name


def tasks_of_node(tasks: str, node: int) -> int:
    """Processes of the node of that number, from Slurm's short form.

    >>> tasks_of_node("2(x3),1", 2), tasks_of_node("2(x3),1", 3), tasks_of_node("4", 0)
    (2, 1, 4)
    """
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts[min(node, len(counts) - 1)]


def meet(place: Place) -> Any:
    """The store that all processes of a run share.

    Raises:
        UsageError: the others did not come.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if place.size > place.local_size:
        use_interface(place.address)
    try:
        if place.attempt:
            store: Any = TCPStore(place.address, place.port, is_master=False, timeout=PATIENCE)
        else:
            os.environ.update(
                RANK=str(place.rank),
                WORLD_SIZE=str(place.size),
                MASTER_ADDR=place.address,
                MASTER_PORT=str(place.port),
            )
            store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    except Exception as error:
        raise UsageError(
            tr("The {count} processes of this run did not meet: {error}", count=place.size, error=error),
            where=f"{place.address}:{place.port}",
            remedy=tr("Check that all were started, and that this address and port can be reached from every host."),
        ) from error
    # One store may serve several attempts: what an earlier one has left in it must not be taken for an answer.
    return PrefixStore(attempt_key(place.attempt or str(place.restarts)), store)


def attempt_key(attempt: str) -> str:
    """Where in the store an attempt has its own."""
    return f"kitaeru/{attempt}"


def use_interface(address: str) -> None:
    """Have gloo and NCCL meet through the network that leads to `address`, unless they were told already.

    Left alone, gloo takes the one that this host's own name stands for, which on many hosts is the loopback.
    """
    with suppress(OSError):
        kind, _, _, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram's socket: nothing is sent
            own = probe.getsockname()[0]
        name = next((name for name, addresses in _interfaces().items() if own in addresses), None)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _interfaces() -> dict[str, set[str]]:
    """The addresses of every network interface."""
    from psutil import net_if_addrs

    return {name: {each.address.partition("%")[0] for each in found} for name, found in net_if_addrs().items()}
