from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kitaeru.machine.probe import cpu_cores, host_memory, probe, visible


def test_this_machine() -> None:
    machine = probe()  # the library of the driver is loaded once
    took = 9.9
    for _ in range(10):  # or so often until the machine is not too busy
        started = time.perf_counter()
        machine = probe()
        took = min(took, time.perf_counter() - started)
        if took < 0.5:
            break
    assert took < 0.5
    assert 0 < machine.host_free_bytes <= machine.host_ram_bytes
    assert machine.cpu_cores >= 1
    assert machine.disk_free_bytes > 0
    assert machine.versions["torch"]


def test_no_torch_is_imported() -> None:
    code = "import sys; from kitaeru.machine.probe import probe; probe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 1000000 kB\nMemFree: 100000 kB\nMemAvailable: 800000 kB\n"}


def test_memory_without_a_container(tmp_path: Path) -> None:
    assert host_memory(machine(tmp_path, MEMINFO)) == (1_024_000_000, 819_200_000)


def test_memory_in_a_cgroup_of_version_2(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "0::/app/job\n",
            "sys/fs/cgroup/app/memory.max": "max\n",
            "sys/fs/cgroup/app/job/memory.max": "500000000\n",
            "sys/fs/cgroup/app/job/memory.current": "300000000\n",
            "sys/fs/cgroup/app/job/memory.stat": "anon 1\ninactive_file 100000000\n",
        },
    )
    assert host_memory(root) == (500_000_000, 300_000_000)


def test_memory_in_a_cgroup_of_version_1(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "8:pids:/\n4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "600000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "150000000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 50000000\n",
        },
    )
    assert host_memory(root) == (600_000_000, 500_000_000)


def test_a_limit_larger_than_the_machine_is_none(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
    )
    assert host_memory(root)[0] == 1_024_000_000


def test_a_cpu_quota_bounds_the_cores(tmp_path: Path) -> None:
    assert cpu_cores(machine(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000\n"})) == 1


def test_nothing_readable_is_no_error(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == (0, 0)


@pytest.mark.parametrize(
    ("variable", "chosen"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,9,1", [0]),
        ("GPU-b", [1]),
        ("0,0", [0]),
    ],
)
def test_cuda_visible_devices(variable: str | None, chosen: list[int]) -> None:
    assert visible(["GPU-aa", "GPU-bb", "GPU-cc"], variable) == chosen
