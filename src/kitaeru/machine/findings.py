"""What a doctor's check finds, and what it could not look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# failure: training fails here, hangs or is wrong. warning: it works and is slower or more fragile than it need be.
Level = Literal["failure", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what it is, why it matters, what to type. `ailment` is a name for programs."""

    ailment: str
    level: Level
    what: str
    why: str
    mend: str


@dataclass(frozen=True)
class Unseen:
    """Something that could not be looked at here, and why."""

    what: str
    why: str


DOCKER_RUN = "docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 …"
