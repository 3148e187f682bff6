"""What can be read about a machine without trying anything: /proc, /sys, the driver's answers, the environment.

Plain data, so that the doctor's checks are functions of it. None means "could not be looked at"; `gather` never fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitaeru.machine.nvml import NoDriver, ask, opened, text
from kitaeru.machine.probe import container, cpu_cores, host_memory, read_text, visible

_NVIDIA = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
_BRIDGE_CLASS = "0x0604"
_ACS_CAPABILITY = 0x0D
# Request and completion redirect: what sends a copy between two cards up to the root and back.
_ACS_REDIRECTS = 0x04 | 0x08
_MOST_LINKS = 18
# Bits of NVML's nvmlClocksEventReason*.
THROTTLES = {"power brake": 0x80, "thermal": 0x20 | 0x40, "hardware": 0x08}
_ENVIRONMENT = re.compile(r"(NCCL|CUDA|NVIDIA|TORCH_NCCL|PYTORCH|OMP|MKL|GLOO)_|LD_LIBRARY_PATH$")


@dataclass(frozen=True)
class Process:
    """A process that holds memory of a GPU; `name` is empty where it is not of this container."""

    pid: int
    name: str
    bytes: int


@dataclass(frozen=True)
class Gpu:
    """One card as the driver describes it. `index` is the driver's; `usable` is its place in CUDA's order or None.

    `throttles` names why its clock is held down now. `fabric` is the state of its NVSwitch fabric (0 = it has none).
    """

    index: int
    name: str
    uuid: str = ""
    bus: str = ""
    usable: int | None = None
    memory_bytes: int = 0
    free_bytes: int = 0
    sm: tuple[int, int] = (0, 0)
    ecc_on: bool | None = None
    ecc_uncorrected: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    watts_limit: float | None = None
    watts_default: float | None = None
    celsius: int | None = None
    celsius_slowdown: int | None = None
    throttles: tuple[str, ...] = ()
    pcie_generation: int = 0
    pcie_generation_most: int = 0
    pcie_width: int = 0
    pcie_width_most: int = 0
    pcie_replays: int = 0
    persistence: bool | None = None
    compute_mode: int = 0
    mig: bool = False
    fabric: int = 0
    nvlinks_up: int = 0
    nvlinks_down: int = 0
    processes: tuple[Process, ...] = ()

    @property
    def title(self) -> str:
        """How people are told which card it is."""
        return f"GPU {self.index} ({self.name})"


@dataclass(frozen=True)
class Torch:
    """What torch says of itself and of CUDA, asked in a process of its own. `error`: why it cannot say it."""

    version: str = ""
    cuda: str = ""
    nccl: str = ""
    architectures: tuple[str, ...] = ()
    devices: int = 0
    error: str = ""


@dataclass(frozen=True)
class Limits:
    """Soft limits of this process; None means unlimited."""

    memlock_bytes: int | None = None
    files: int | None = None
    files_hard: int | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Facts:
    """A machine as it is. Sizes are bytes; `p2p` holds NVML's status (0 = yes) by pair of driver indices."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] = (0, 0)
    driver_error: str = ""
    kernel_driver: str = ""
    nouveau: bool = False
    cards_on_bus: int = 0
    device_files: tuple[str, ...] = ()
    p2p: Mapping[tuple[int, int], int] = field(default_factory=dict)
    acs_bridges: tuple[str, ...] | None = None
    translated: tuple[str, ...] = ()
    torch: Torch | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    container: str = ""
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    limits: Limits = field(default_factory=Limits)
    host_bytes: int = 0
    host_free_bytes: int = 0
    machine_bytes: int = 0
    cores: int = 1
    machine_cores: int = 1
    overcommit: int = 0
    pids_most: int | None = None
    governor: str = ""
    disk_free: Mapping[str, int] = field(default_factory=dict)
    unwritable: tuple[str, ...] = ()
    localhost: bool = True
    python: tuple[int, int] = (3, 11)
    versions: Mapping[str, str] = field(default_factory=dict)
    wrong_versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> list[Gpu]:
        """The cards that this process may use."""
        return [gpu for gpu in self.gpus if gpu.usable is not None]

    @property
    def contained(self) -> bool:
        """Whether this is a container that somebody has started with flags."""
        return self.container in ("docker", "podman", "kubernetes")


def gather(
    root: Path = Path("/"),
    nvml: Any = None,
    environment: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
    torch: Torch | None = None,
) -> Facts:
    """The facts of the machine under `root`, of the driver `nvml` (default: the real one) and of `environment`.

    `folders` are those that a run writes to, by what they are for; `torch` is what the trial process found.
    """
    environment = dict(os.environ if environment is None else environment)
    told = {k: v for k, v in environment.items() if _ENVIRONMENT.match(k)}
    host_bytes, host_free = host_memory(root)
    shm_bytes, shm_free = shared_memory(root)
    wrong, versions = _versions()
    disk, unwritable = _folders(folders or {})
    card = _driver(root, nvml, told)
    return Facts(
        **card,
        kernel_driver=_first(r"Kernel Module\D*?(?:for \S+)?\s+(\d{3}\.[\d.]+)", root / "proc/driver/nvidia/version"),
        nouveau=bool(re.search(r"^nouveau ", read_text(root / "proc/modules"), re.MULTILINE)),
        cards_on_bus=len(_cards(root)),
        device_files=tuple(sorted(path.name for path in (root / "dev").glob("nvidia*"))),
        acs_bridges=acs_bridges(root),
        translated=tuple(
            bus.name for bus in _cards(root) if read_text(bus / "iommu_group/type").strip().startswith("DMA")
        ),
        torch=torch,
        environment=told,
        container=container(root),
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free,
        limits=limits(root),
        host_bytes=host_bytes,
        host_free_bytes=host_free,
        machine_bytes=int(_first(r"MemTotal:\s+(\d+)", root / "proc/meminfo") or 0) * 1024,
        cores=cpu_cores(root),
        machine_cores=_cores_of_machine(root),
        overcommit=int(read_text(root / "proc/sys/vm/overcommit_memory").strip() or 0),
        pids_most=_number(
            read_text(root / "sys/fs/cgroup/pids.max") or read_text(root / "sys/fs/cgroup/pids/pids.max")
        ),
        governor=read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        disk_free=disk,
        unwritable=unwritable,
        localhost=_localhost(root),
        python=sys.version_info[:2],
        versions=versions,
        wrong_versions=wrong,
    )


# --- the host ---------------------------------------------------------------------------------------------------------


def shared_memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Size of /dev/shm and what is free of it, in bytes. Elsewhere than here the free part is not known."""
    size: int | None = None
    for line in read_text(root / "proc/mounts").splitlines():
        parts = line.split()
        if len(parts) > 3 and parts[1] == "/dev/shm":
            match = re.search(r"(?:^|,)size=(\d+)([kmg]?)", parts[3])
            unit = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
            # Without a size the kernel takes half of the RAM.
            half = int(_first(r"MemTotal:\s+(\d+)", root / "proc/meminfo") or 0) * 512
            size = int(match[1]) * unit[match[2]] if match else half
    if root != Path("/"):
        return size, None
    with suppress(OSError):
        room = os.statvfs("/dev/shm")
        return room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    return size, None


def limits(root: Path = Path("/")) -> Limits:
    """The limits in /proc/self/limits."""
    rows = {}
    for line in read_text(root / "proc/self/limits").splitlines():
        match = re.match(r"(Max [a-z ]+?)\s{2,}(\S+)\s+(\S+)", line)
        if match:
            rows[match[1]] = (_number(match[2]), _number(match[3]))
    return Limits(
        memlock_bytes=rows.get("Max locked memory", (None, None))[0],
        files=rows.get("Max open files", (None, None))[0],
        files_hard=rows.get("Max open files", (None, None))[1],
        processes=rows.get("Max processes", (None, None))[0],
    )


def acs_bridges(root: Path = Path("/")) -> tuple[str, ...] | None:
    """PCI bridges that redirect copies between cards to the root (ACS), from their configuration space.

    The extended space, where this stands, is root's to read: None without that right, and where there is no bridge.
    """
    found, looked = [], False
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        if not read_text(device / "class").startswith(_BRIDGE_CLASS):
            continue
        with suppress(OSError):
            space = (device / "config").read_bytes()
            if len(space) > 256:
                looked = True
                if acs_control(space) & _ACS_REDIRECTS:
                    found.append(device.name)
    return tuple(found) if looked else None


def acs_control(space: bytes) -> int:
    """The ACS control register in a PCI Express configuration space; 0 where there is none.

    PCI Express base specification, 7.7.11: capability 0x000D, its control register 6 bytes in. Extended capabilities
    are a linked list that begins at 0x100: 16 bits of id, 4 of version, 12 of the next one's place.
    """
    at, seen = 0x100, 0
    while 0x100 <= at <= len(space) - 8 and seen < 64:
        head = int.from_bytes(space[at : at + 4], "little")
        if head & 0xFFFF == _ACS_CAPABILITY:
            return int.from_bytes(space[at + 6 : at + 8], "little")
        at, seen = head >> 20, seen + 1
    return 0


def _cards(root: Path) -> list[Path]:
    return [
        device
        for device in sorted((root / "sys/bus/pci/devices").glob("*"))
        if read_text(device / "vendor").strip() == _NVIDIA
        and read_text(device / "class").strip().startswith(_DISPLAY_CLASSES)
    ]


def _cores_of_machine(root: Path) -> int:
    listed = {
        read_text(path).strip()
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    }
    return max(1, len(listed))


def _localhost(root: Path) -> bool:
    """Whether the name localhost leads anywhere; elsewhere than here, by that root's /etc/hosts."""
    if root != Path("/"):
        return re.search(r"^[^#]*\blocalhost\b", read_text(root / "etc/hosts"), re.MULTILINE) is not None
    try:
        return bool(socket.getaddrinfo("localhost", None))
    except OSError:
        return False


def _folders(folders: Mapping[str, Path]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Free bytes by folder, and those that cannot be written to. A folder not there yet counts as its parent."""
    free: dict[str, int] = {}
    unwritable = []
    for path in folders.values():
        at = path
        while not at.exists() and at != at.parent:
            at = at.parent
        with suppress(OSError):
            free[str(path)] = shutil.disk_usage(at).free
        if not os.access(at, os.W_OK):
            unwritable.append(str(path))
    return free, tuple(unwritable)


def _versions() -> tuple[dict[str, str], dict[str, str]]:
    """Libraries that do not satisfy what this kitaeru asks for, with that; and the version of each that it asks for."""
    wrong: dict[str, str] = {}
    found: dict[str, str] = {}
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in importlib.metadata.requires("kitaeru") or ()]
    except Exception:  # not installed as a package, or without packaging: nothing to compare with
        return wrong, found
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                wrong[requirement.name] = str(requirement.specifier)
        except importlib.metadata.PackageNotFoundError:
            wrong[requirement.name] = str(requirement.specifier)
    return wrong, found


def _first(pattern: str, path: Path) -> str:
    match = re.search(pattern, read_text(path))
    return match[1] if match else ""


def _number(word: str) -> int | None:
    word = word.strip()
    return int(word) if word.isdigit() else None


# --- the GPUs ---------------------------------------------------------------------------------------------------------


def _driver(root: Path, nvml: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """All that the driver says, as arguments of `Facts`."""
    try:
        if nvml is not None:
            nvml.nvmlInit()
            return _asked(nvml, root, environment)
        with opened() as real:
            return _asked(real, root, environment)
    except NoDriver as error:
        return {"driver_error": str(error)}
    except Exception as error:  # NVML's own class is known only once it is loaded
        return {"driver_error": str(error) or type(error).__name__}


def _asked(nvml: Any, root: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    handles, lost = [], 0
    for i in range(nvml.nvmlDeviceGetCount()):
        handle = ask(nvml, "nvmlDeviceGetHandleByIndex", i, default=None)
        if handle is None:
            lost += 1
        else:
            handles.append((i, handle))
    uuids = [text(ask(nvml, "nvmlDeviceGetUUID", handle, default="")) for _, handle in handles]
    order = visible(uuids, environment.get("CUDA_VISIBLE_DEVICES"))
    gpus = [
        _gpu(nvml, root, i, handle, uuids[at], order.index(at) if at in order else None)
        for at, (i, handle) in enumerate(handles)
    ]
    version = int(ask(nvml, "nvmlSystemGetCudaDriverVersion_v2", default=0))
    p2p = {}
    for i, first in handles:
        for j, second in handles:
            if i < j:
                p2p[i, j] = int(ask(nvml, "nvmlDeviceGetP2PStatus", first, second, 0, default=6))
    return {
        "gpus": tuple(gpus),
        "driver": text(ask(nvml, "nvmlSystemGetDriverVersion", default="")),
        "driver_cuda": (version // 1000, version % 1000 // 10),
        "p2p": p2p,
    }


def _gpu(nvml: Any, root: Path, index: int, handle: Any, uuid: str, usable: int | None) -> Gpu:
    def question(function: str, *arguments: Any, default: Any) -> Any:
        return ask(nvml, function, handle, *arguments, default=default)

    memory = question("nvmlDeviceGetMemoryInfo", default=None)
    place = question("nvmlDeviceGetPciInfo_v3", default=None)
    ecc = question("nvmlDeviceGetEccMode", default=None)
    # corrected, uncorrected, pending, failed
    remapped = question("nvmlDeviceGetRemappedRows", default=(0, 0, 0, 0))
    reasons = int(
        question("nvmlDeviceGetCurrentClocksEventReasons", default=None)
        or question("nvmlDeviceGetCurrentClocksThrottleReasons", default=0)
    )
    links = [question("nvmlDeviceGetNvLinkState", link, default=None) for link in range(_MOST_LINKS)]
    persistence = question("nvmlDeviceGetPersistenceMode", default=None)
    return Gpu(
        index=index,
        name=text(question("nvmlDeviceGetName", default="")),
        uuid=uuid,
        bus=text(place.busId).lower() if place is not None else "",
        usable=usable,
        memory_bytes=int(memory.total) if memory is not None else 0,
        free_bytes=int(memory.free) if memory is not None else 0,
        sm=tuple(question("nvmlDeviceGetCudaComputeCapability", default=(0, 0))),
        ecc_on=bool(ecc[0]) if ecc is not None else None,
        ecc_uncorrected=int(question("nvmlDeviceGetTotalEccErrors", 1, 0, default=0)),
        remap_pending=bool(remapped[2]) or bool(question("nvmlDeviceGetRetiredPagesPendingStatus", default=0)),
        remap_failed=bool(remapped[3]),
        watts_limit=_watts(question("nvmlDeviceGetPowerManagementLimit", default=None)),
        watts_default=_watts(question("nvmlDeviceGetPowerManagementDefaultLimit", default=None)),
        celsius=question("nvmlDeviceGetTemperature", 0, default=None),
        celsius_slowdown=question("nvmlDeviceGetTemperatureThreshold", 1, default=None),
        throttles=tuple(name for name, bits in THROTTLES.items() if reasons & bits),
        pcie_generation=int(question("nvmlDeviceGetCurrPcieLinkGeneration", default=0)),
        pcie_generation_most=int(question("nvmlDeviceGetMaxPcieLinkGeneration", default=0)),
        pcie_width=int(question("nvmlDeviceGetCurrPcieLinkWidth", default=0)),
        pcie_width_most=int(question("nvmlDeviceGetMaxPcieLinkWidth", default=0)),
        pcie_replays=int(question("nvmlDeviceGetPcieReplayCounter", default=0)),
        persistence=None if persistence is None else bool(persistence),
        compute_mode=int(question("nvmlDeviceGetComputeMode", default=0)),
        mig=bool(question("nvmlDeviceGetMigMode", default=(0, 0))[0]),
        fabric=_fabric(nvml, handle),
        nvlinks_up=sum(1 for state in links if state == 1),
        nvlinks_down=sum(1 for state in links if state == 0),
        processes=_processes(question("nvmlDeviceGetComputeRunningProcesses", default=[]), root),
    )


def _processes(found: Any, root: Path) -> tuple[Process, ...]:
    return tuple(
        Process(int(p.pid), read_text(root / f"proc/{p.pid}/comm").strip(), int(p.usedGpuMemory or 0))
        for p in found
        if int(p.pid) != os.getpid()
    )


def _fabric(nvml: Any, handle: Any) -> int:
    """State of the NVSwitch fabric: 0 none, 1 not started, 2 in progress, 3 complete."""
    try:
        from ctypes import byref

        info = nvml.c_nvmlGpuFabricInfo_t()
        nvml.nvmlDeviceGetGpuFabricInfo(handle, byref(info))
        return int(info.state)
    except Exception:  # an old library, or a card that was never joined by a switch
        return 0


def _watts(milliwatts: Any) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
