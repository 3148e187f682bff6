"""How fast processes that train together tell each other things: all of them in an all-reduce, and each pair."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn  # type: ignore[attr-defined]

from kitaeru.errors import TrainingError
from kitaeru.i18n import tr

GIGA = 1e9
GPU_BYTES, CPU_BYTES = 256 << 20, 16 << 20
PATIENCE_SECONDS = 90.0


def measure_links(count: int, *, on_gpu: bool, seconds: float) -> dict[str, Any]:
    """GB/s and latency between `count` processes, one on each GPU (NCCL) or all on the CPU (gloo).

    `ring`: GB/s each sends in an all-reduce; `latency`: seconds of an empty one; `pairs`: GB/s one way by "a-b".

    Raises:
        TrainingError: they do not get through to each other.
    """
    with tempfile.TemporaryDirectory(prefix="kitaeru-links-") as folder:
        place = Path(folder)
        jobs: Any = spawn(_work, args=(count, on_gpu, seconds, folder), nprocs=count, join=False)
        end = time.monotonic() + PATIENCE_SECONDS + 20 * seconds
        try:
            done = False
            while not done and time.monotonic() < end:
                done = jobs.join(timeout=1)
        except Exception as error:
            raise _broken(str(error).strip().splitlines()[-1]) from error
        finally:
            for process in jobs.processes:
                with suppress(Exception):
                    process.kill()
        if not done:
            raise _broken(tr("they waited for each other for {seconds:.0f} s", seconds=PATIENCE_SECONDS))
        found: dict[str, Any] = json.loads((place / "found.json").read_text(encoding="utf-8"))
        return found


def _broken(why: str) -> TrainingError:
    return TrainingError(
        tr("The devices do not get through to each other: {why}", why=why),
        remedy=tr(
            "`kitaeru doctor` finds out why; measure the devices alone with `kitaeru bench --calibrate --alone`."
        ),
    )


def _work(rank: int, count: int, on_gpu: bool, seconds: float, folder: str) -> None:
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(  # type: ignore[attr-defined]
        f"{folder}/store", count
    )
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    flat = torch.ones((GPU_BYTES if on_gpu else CPU_BYTES) // 4, device=device)
    small = torch.ones(1, device=device)
    found: dict[str, Any] = {}
    taken = _repeated(lambda: dist.all_reduce(flat), flat, seconds)
    found["ring"] = 2 * (count - 1) / count * flat.nbytes / taken / GIGA
    found["latency"] = _repeated(lambda: dist.all_reduce(small), small, min(seconds, 0.1))
    found["pairs"] = {}
    for a, b in itertools.combinations(range(count), 2):
        dist.barrier()
        if rank in (a, b):
            go = (lambda b=b: dist.send(flat, b)) if rank == a else (lambda a=a: dist.recv(flat, a))
            found["pairs"][f"{a}-{b}"] = flat.nbytes / _repeated(go, flat, 0.0) / GIGA
    every: list[Any] = [None] * count
    dist.all_gather_object(every, found)
    if rank == 0:
        pairs = {name: rate for one in every for name, rate in one["pairs"].items()}
        answer: dict[str, Any] = {name: float(f"{found[name]:.4g}") for name in ("ring", "latency")}
        answer |= {"pairs": {name: float(f"{rate:.4g}") for name, rate in sorted(pairs.items())}}
        (Path(folder) / "found.json").write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _repeated(function: Callable[[], Any], tensor: torch.Tensor, seconds: float) -> float:
    """Seconds of one call: the same number of calls on all ranks, about `seconds` of them, at least five."""
    for _ in range(2):
        function()
    _settle(tensor)
    started = time.perf_counter()
    function()
    _settle(tensor)
    once = time.perf_counter() - started
    count = 5
    if seconds:
        most = torch.tensor([seconds / max(once, 1e-6)], device=tensor.device)
        dist.all_reduce(most, op=dist.ReduceOp.MIN)
        count = max(5, min(1000, int(most.item())))
    started = time.perf_counter()
    for _ in range(count):
        function()
    _settle(tensor)
    return (time.perf_counter() - started) / count


def _settle(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
