"""What only trying can tell: copies between cards whose content is checked, a sum over all of them, the link at load.

All of it runs in a process of its own (`python -m kitaeru.machine.trials`), which forks one more for every attempt and
kills it when its time is up: a driver that hangs takes an attempt with it, never the doctor.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kitaeru.machine.attempt import HUNG, attempt, end_group
from kitaeru.machine.facts import Torch
from kitaeru.machine.probe import read_text

# Ways for NCCL to carry bytes between two cards of a host, with the environment that leaves it nothing else.
TRANSPORTS: dict[str, dict[str, str]] = {
    "default": {},
    "p2p": {"NCCL_P2P_DISABLE": "0", "NCCL_P2P_LEVEL": "SYS", "NCCL_SHM_DISABLE": "1"},
    "shm": {"NCCL_P2P_DISABLE": "1"},
    "socket": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"},
}
_ATTEMPT_SECONDS = 40.0
_WHOLE_SECONDS = 300.0
_COPY_BYTES = 64 << 20
_SUM_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
_PATTERN = 251


@dataclass(frozen=True)
class Sum:
    """An all-reduce over `ranks` processes. `gb_s` is what each moves: NCCL's bus bandwidth, 2 (n - 1) / n x bytes / s.

    `error`: it failed or hung (`hung`); `wrong`: it ended, with wrong content. `used`: what NCCL says carried it.
    """

    transport: str
    backend: str
    ranks: int
    gb_s: float = 0.0
    seconds: float = 0.0
    wrong: bool = False
    hung: bool = False
    error: str = ""
    used: str = ""

    @property
    def good(self) -> bool:
        """Whether training may rely on it."""
        return not (self.wrong or self.hung or self.error)


@dataclass(frozen=True)
class Copy:
    """A copy from card `a` to card `b` (CUDA's order): directly, or through the host's memory. GB/s, one direction."""

    a: int
    b: int
    direct: bool
    gb_s: float = 0.0
    wrong: bool = False
    hung: bool = False
    error: str = ""


@dataclass(frozen=True)
class Load:
    """The PCIe link of a card (CUDA's order) while it copies: GB/s to and from pinned memory, generation and width."""

    gpu: int
    to_gb_s: float = 0.0
    from_gb_s: float = 0.0
    generation: int = 0
    width: int = 0
    error: str = ""


@dataclass(frozen=True)
class Trials:
    """The outcome of all attempts. `error`: why there is none."""

    torch: Torch = field(default_factory=Torch)
    sums: tuple[Sum, ...] = ()
    copies: tuple[Copy, ...] = ()
    loads: tuple[Load, ...] = ()
    error: str = ""

    @property
    def fastest(self) -> Sum | None:
        """The fastest sum whose content was right; NCCL's own choice where it is within a tenth of it."""
        good = sorted((s for s in self.sums if s.good), key=lambda s: -s.gb_s)
        own = [s for s in good if s.transport == "default" and s.gb_s >= 0.9 * good[0].gb_s]
        return next(iter(own or good), None)

    @property
    def environment(self) -> dict[str, str]:
        """The environment that proved fastest; empty where NCCL's own choice did."""
        best = self.fastest
        if best is None or best.backend != "nccl":
            return {}
        return {k: v for k, v in TRANSPORTS[best.transport].items() if k != "NCCL_IB_DISABLE"}


def run_trials(environment: Mapping[str, str] | None = None, seconds: float = _WHOLE_SECONDS) -> Trials:
    """All attempts that make sense on this machine. Never fails and never hangs."""
    # What an earlier remedy left in the environment would hide what the machine can do.
    clean = {k: v for k, v in (environment or os.environ).items() if not k.startswith("NCCL_")}
    with tempfile.TemporaryDirectory(prefix="kitaeru-doctor-") as folder:
        child = subprocess.Popen(
            [sys.executable, "-m", "kitaeru.machine.trials", folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=clean,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        try:
            _, said = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            end_group(child.pid)
            said = ""
        answer = Path(folder) / "answer.json"
        if not answer.is_file():
            last = said.strip().splitlines()
            return Trials(error=last[-1] if last else "no answer")
        return _from_json(json.loads(answer.read_text(encoding="utf-8")))


def _from_json(value: dict[str, Any]) -> Trials:
    torch = value["torch"]
    return Trials(
        torch=Torch(**{**torch, "architectures": tuple(torch["architectures"])}),
        sums=tuple(Sum(**s) for s in value["sums"]),
        copies=tuple(Copy(**c) for c in value["copies"]),
        loads=tuple(Load(**x) for x in value["loads"]),
    )


# --- in the process of the trials -------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Try everything; the answer goes to `folder`/answer.json, anew after each attempt, so that nothing is lost."""
    found: dict[str, Any] = {"sums": [], "copies": [], "loads": []}

    def tell() -> None:
        new = folder / "answer.new"
        new.write_text(json.dumps(found), encoding="utf-8")
        new.replace(folder / "answer.json")

    torch = attempt(folder, 1, {}, _torch, seconds=_ATTEMPT_SECONDS)[0]
    found["torch"] = torch if isinstance(torch, dict) else asdict(Torch(error=str(torch)))
    tell()
    devices = found["torch"]["devices"]
    for gpu in range(devices):
        answer = attempt(folder, 1, {}, _load, gpu, seconds=_ATTEMPT_SECONDS)[0]
        found["loads"].append(answer if isinstance(answer, dict) else asdict(Load(gpu, error=str(answer))))
        tell()
    for a in range(devices):
        for b in range(devices):
            if a != b and len(found["copies"]) < 2 * 56:
                for direct in (True, False):
                    found["copies"].append(_tried_copy(folder, a, b, direct))
        tell()
    if devices > 1:
        for transport in TRANSPORTS:
            found["sums"].append(_tried_sum(folder, transport, "nccl", devices))
            tell()
    # On a GPU machine, too: losses and verdicts travel over it.
    found["sums"].append(_tried_sum(folder, "cpu", "gloo", 2))
    tell()


def _tried_sum(folder: Path, transport: str, backend: str, ranks: int) -> dict[str, Any]:
    answers = attempt(folder, ranks, TRANSPORTS.get(transport, {}), _sum, backend, seconds=_ATTEMPT_SECONDS)
    facts: dict[str, Any] = {"transport": transport, "backend": backend, "ranks": ranks}
    whole = [answer for answer in answers if isinstance(answer, dict)]
    if len(whole) < len(answers):
        # The rank that failed says why; the one that waited for it only that it did.
        errors = sorted((str(a) for a in answers if not isinstance(a, dict)), key=lambda e: (e == HUNG, len(e)))
        hung = errors[0] == HUNG
        return asdict(Sum(**facts, hung=hung, error="" if hung else errors[0]))
    seconds = max(answer["seconds"] for answer in whole)
    wrong = any(answer["wrong"] for answer in whole)
    rate, used = min(answer["gb_s"] for answer in whole), whole[0]["used"]
    return asdict(Sum(**facts, gb_s=rate, seconds=seconds, wrong=wrong, used=used))


def _tried_copy(folder: Path, a: int, b: int, direct: bool) -> dict[str, Any]:
    answer = attempt(folder, 1, {}, _copy, a, b, direct, seconds=_ATTEMPT_SECONDS)[0]
    if isinstance(answer, dict):
        return answer
    hung = answer == HUNG
    return asdict(Copy(a, b, direct, hung=hung, error="" if hung else str(answer)))


def _torch(rank: int, ranks: int, store: Path) -> dict[str, Any]:
    import torch

    nccl = ""
    if torch.distributed.is_nccl_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    error, devices = "", 0
    try:
        devices = torch.cuda.device_count()
        for device in range(devices):
            if int(torch.ones(8, device=f"cuda:{device}").sum()) != 8:
                raise RuntimeError(f"cuda:{device}: 8 x 1 is not 8")
    except Exception as problem:
        error, devices = str(problem).strip().splitlines()[0], 0
    return asdict(
        Torch(
            version=torch.__version__,
            cuda=torch.version.cuda or "",
            nccl=nccl,
            architectures=tuple(torch.cuda.get_arch_list()),
            devices=devices,
            error=error,
        )
    )


def _pattern(count: int, device: str) -> Any:
    import torch

    return torch.arange(count, device=device, dtype=torch.int32).remainder_(_PATTERN).float()


def _sum(rank: int, ranks: int, store: Path, backend: str) -> dict[str, Any]:
    """Each rank gives (rank + 1) x a pattern of small whole numbers: the sum is exact in fp32."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_FILE=str(store / f"nccl-{rank}"))
        torch.cuda.set_device(rank)
    files = dist.FileStore(  # type: ignore[attr-defined]
        str(store / "store"), ranks
    )
    dist.init_process_group(
        backend, store=files, rank=rank, world_size=ranks, timeout=timedelta(seconds=_ATTEMPT_SECONDS)
    )
    size = _SUM_BYTES[device.split(":")[0]]
    pattern = _pattern(size // 4, device)
    expected = pattern * (ranks * (ranks + 1) // 2)
    wrong, seconds = False, float("inf")
    for _ in range(4):
        value = pattern * (rank + 1)
        _ready(device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(value)
        _ready(device)
        seconds = min(seconds, time.perf_counter() - started)
        wrong = wrong or not torch.equal(value, expected)
    dist.destroy_process_group()
    used = "+".join(sorted(set(re.findall(r"via (P2P|SHM|NET)", read_text(store / f"nccl-{rank}")))))
    rate = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    return {"seconds": seconds, "gb_s": rate, "wrong": wrong, "used": used}


def _copy(rank: int, ranks: int, store: Path, a: int, b: int, direct: bool) -> dict[str, Any]:
    """The pattern from one card to the other, there compared with one made there."""
    import torch

    if direct and not torch.cuda.can_device_access_peer(b, a):
        return asdict(Copy(a, b, direct, error="no peer access"))
    count = _COPY_BYTES // 4
    here, there = _pattern(count, f"cuda:{a}"), torch.empty(count, device=f"cuda:{b}")
    host = torch.empty(count, pin_memory=True)
    expected = _pattern(count, f"cuda:{b}")
    seconds = float("inf")
    for _ in range(4):
        there.zero_()
        _ready("cuda")
        started = time.perf_counter()
        if direct:
            there.copy_(here)
        else:
            host.copy_(here)
            there.copy_(host)
        _ready("cuda")
        seconds = min(seconds, time.perf_counter() - started)
    wrong = not torch.equal(there, expected)
    return asdict(Copy(a, b, direct, gb_s=_COPY_BYTES / seconds / 1e9, wrong=wrong))


def _load(rank: int, ranks: int, store: Path, gpu: int) -> dict[str, Any]:
    """Copies to and from the host; the driver is asked for the link while they are under way."""
    import torch

    from kitaeru.machine.nvml import ask, opened, text

    torch.cuda.set_device(gpu)
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    rates = []
    for target, source in ((card, host), (host, card)):
        target.copy_(source)
        _ready("cuda")
        started = time.perf_counter()
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        _ready("cuda")
        rates.append(8 * _COPY_BYTES / (time.perf_counter() - started) / 1e9)
    generation = width = 0
    uuid = str(torch.cuda.get_device_properties(gpu).uuid)
    with suppress(Exception), opened() as nvml:
        for i in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(i)
            if text(nvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-") != uuid:
                continue
            for _ in range(64):
                card.copy_(host, non_blocking=True)
            generation = int(ask(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle, default=0))
            width = int(ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle, default=0))
            _ready("cuda")
    return asdict(Load(gpu, rates[0], rates[1], generation, width))


def _ready(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


if __name__ == "__main__":
    import torch.distributed  # noqa: F401 - once, for all forks

    main(Path(sys.argv[1]))
