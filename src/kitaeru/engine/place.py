"""Who started this process, and which of several it is: kitaeru itself, torchrun, accelerate, or Slurm's srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from kitaeru.errors import UsageError
from kitaeru.i18n import tr

PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Place:
    """One process of several. `local_rank` of `local_size` counts those of this host; `restarts` how often torch's
    agent has started them anew.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    restarts: int = 0


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
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and environment.get("SLURM_STEP_NODELIST"):
        return _from_slurm(environment)
    return None


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
    """The first host of the step meets the others, at a port made of the job's number (it is free for one job)."""
    job = int(environment.get("SLURM_JOB_ID", "0"))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    return Place(
        rank=int(environment["SLURM_PROCID"]),
        size=int(environment["SLURM_NTASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=tasks_of_node(tasks, int(environment.get("SLURM_NODEID", "0"))),
        address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        port=int(environment.get("MASTER_PORT") or 20000 + job % 20000),
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
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.size), MASTER_ADDR=place.address, MASTER_PORT=str(place.port)
    )
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    except Exception as error:
        raise UsageError(
            tr("The {count} processes of this run did not meet: {error}", count=place.size, error=error),
            where=f"{place.address}:{place.port}",
            remedy=tr("Check that all were started, and that this address and port can be reached from every host."),
        ) from error
    # One store may serve several attempts: what an earlier one has left in it must not be taken for an answer.
    return PrefixStore(f"kitaeru/{place.restarts}", store)
