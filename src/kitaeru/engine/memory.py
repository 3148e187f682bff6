"""Memory while a run goes on: how much was needed, and giving back what is not."""

from __future__ import annotations

import ctypes
import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trim(device: torch.device) -> None:
    """On a CPU, return the C library's free blocks to the system.

    Micro-batches differ in length, so blocks of every size are freed, none fits the next request, and the heap grows by
    tens of MB a step (seen: 1.0 to 2.1 GB in 14 steps, 1.2 GB after this). GPU memory has an allocator of its own.
    """
    if device.type == "cpu" and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


_LIBC = ctypes.CDLL(None)
