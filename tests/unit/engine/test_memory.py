"""The heap does not keep what training freed."""

import subprocess
import sys

import pytest

FRAGMENT = """
import torch
from kitaeru.engine.memory import trim

def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")) / 1024

torch.empty(16 << 20, dtype=torch.uint8).fill_(1)  # from here on the C library takes such blocks from the heap
held = [torch.empty(4 << 20, dtype=torch.uint8).fill_(1) for _ in range(60)]
last = torch.empty(64 << 10, dtype=torch.uint8).fill_(1)
keep = held[::10]
del held
before = resident()
trim(torch.device("cpu"))
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_trimming_returns_the_holes_between_blocks_in_use():
    done = subprocess.run([sys.executable, "-c", FRAGMENT], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 100, "MB"
