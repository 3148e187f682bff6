"""Machines that are described: a tree of /proc and /sys, the driver's answers, what trials measured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kitaeru.machine.facts import Facts, Torch, gather
from kitaeru.machine.trials import Copy, Load, Sum, Trials

GIB = 1 << 30
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max stack size            8388608              unlimited            bytes
Max processes             {processes}               127826               processes
Max open files            {files}                {files_hard}              files
Max locked memory         {memlock}            unlimited            bytes
"""


def limits(
    processes: str = "127826", files: str = "65536", files_hard: str = "1048576", memlock: str = "unlimited"
) -> str:
    return LIMITS.format(processes=processes, files=files, files_hard=files_hard, memlock=memlock)


def pci_space(acs: int) -> bytes:
    """A configuration space whose extended capabilities are AER and then ACS with this control register."""
    space = bytearray(4096)
    space[0x100:0x104] = (0x0001 | 1 << 16 | 0x150 << 20).to_bytes(4, "little")
    space[0x150:0x154] = (0x000D | 1 << 16).to_bytes(4, "little")
    space[0x156:0x158] = acs.to_bytes(2, "little")
    return bytes(space)


class Nvml:
    """The driver's library with the answers of `cards`: "Name" for nvmlDeviceGetName; no answer is an NVMLError."""

    class NVMLError(Exception):
        pass

    class c_nvmlGpuFabricInfo_t(ctypes.Structure):
        _fields_ = (("state", ctypes.c_uint),)

    def __init__(self, cards: list[dict[str, Any] | None], cuda: int = 12080, error: str = "") -> None:
        self.cards, self.cuda, self.error = cards, cuda, error

    def nvmlInit(self) -> None:
        if self.error:
            raise self.NVMLError(self.error)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.15"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        card = self.cards[index]
        if card is None:
            raise self.NVMLError("GPU is lost")
        return card

    def nvmlDeviceGetGpuFabricInfo(self, card: dict[str, Any], info: Any) -> None:
        info._obj.state = card.get("GpuFabricInfo", 0)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(card: dict[str, Any], *arguments: Any) -> Any:
            value = card.get(name.removeprefix("nvmlDeviceGet"))
            if value is None:
                raise self.NVMLError("Not Supported")
            return value(*arguments) if callable(value) else value

        return answer


def card(index: int, **changes: Any) -> dict[str, Any]:
    """A healthy RTX A5000."""
    return {
        "Name": "NVIDIA RTX A5000",
        "UUID": f"GPU-{index}",
        "PciInfo_v3": SimpleNamespace(busId=f"0000:0{index + 1}:00.0".encode()),
        "MemoryInfo": SimpleNamespace(total=24 * GIB, free=23 * GIB),
        "CudaComputeCapability": (8, 6),
        "EccMode": (1, 1),
        "TotalEccErrors": 0,
        "RemappedRows": (0, 0, 0, 0),
        "PowerManagementLimit": 230_000,
        "PowerManagementDefaultLimit": 230_000,
        "Temperature": 41,
        "TemperatureThreshold": 98,
        "CurrentClocksEventReasons": 0x1,
        "CurrPcieLinkGeneration": 1,
        "MaxPcieLinkGeneration": 4,
        "CurrPcieLinkWidth": 16,
        "MaxPcieLinkWidth": 16,
        "PcieReplayCounter": 0,
        "PersistenceMode": 1,
        "ComputeMode": 0,
        "P2PStatus": lambda *_: 0,
        "ComputeRunningProcesses": [],
        **changes,
    }


FILES: dict[str, str | bytes] = {
    "proc/meminfo": "MemTotal: 131072000 kB\nMemAvailable: 120000000 kB\n",
    "proc/mounts": "tmpfs /dev/shm tmpfs rw,nosuid,nodev 0 0\n",
    "proc/self/limits": limits(),
    "proc/self/cgroup": "0::/user.slice\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "proc/modules": "nvidia_uvm 1 0 - Live 0x0\nnvidia 1 1 - Live 0x0\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 1\n",
    "proc/sys/vm/overcommit_memory": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "dev/nvidia0": "",
    "dev/nvidia1": "",
    "dev/nvidia-uvm": "",
    "sys/bus/pci/devices/0000:00:01.0/class": "0x060400\n",
    "sys/bus/pci/devices/0000:00:01.0/vendor": "0x1022\n",
    "sys/bus/pci/devices/0000:00:01.0/config": pci_space(0x01),
    **{
        f"sys/bus/pci/devices/0000:0{n}:00.0/{name}": text
        for n in (1, 2)
        for name, text in (("class", "0x030000\n"), ("vendor", "0x10de\n"), ("iommu_group/type", "identity\n"))
    },
    **{f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n}\n" for n in range(16)},
}
TORCH = Torch("2.11.0", "12.8", "2.27.5", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120"), 2)
TRIALS = Trials(
    torch=TORCH,
    loads=tuple(Load(gpu, 25.1, 24.8, 4, 16) for gpu in (0, 1)),
    copies=tuple(Copy(a, 1 - a, direct, 22.0 if direct else 11.0) for a in (0, 1) for direct in (True, False)),
    sums=(
        Sum("default", "nccl", 2, 20.0, used="P2P"),
        Sum("p2p", "nccl", 2, 20.1, used="P2P"),
        Sum("shm", "nccl", 2, 9.0, used="SHM"),
        Sum("socket", "nccl", 2, 2.0, used="NET"),
        Sum("cpu", "gloo", 2, 1.0),
    ),
)


class Machine:
    """The healthy machine, two RTX A5000, to be changed by a test before it is examined."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = dict(FILES)
        self.cards: list[dict[str, Any] | None] = [card(0), card(1)]
        self.environment: dict[str, str] = {}
        self.cuda, self.driver_error = 12080, ""
        self.trials = TRIALS
        self.folders: dict[str, Path] = {}
        self.changes: dict[str, Any] = {}

    def facts(self) -> Facts:
        for name, content in self.files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        nvml = Nvml(self.cards, self.cuda, self.driver_error)
        found = gather(self.root, nvml, self.environment, self.folders, self.trials.torch)
        return replace(found, **self.changes)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    return Machine(tmp_path / "root")


@pytest.fixture(scope="session")
def described() -> SimpleNamespace:
    """The makers of parts."""
    return SimpleNamespace(card=card, limits=limits, pci_space=pci_space, Nvml=Nvml)
