"""What this machine is: GPUs through the driver's library, the rest from /proc and /sys. Without torch, in
milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from kitaeru.hardware import Device, Hardware, Link, find_gpu, pcie_gb_s
from kitaeru.machine.nvml import ask, opened, text

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_UNLIMITED = 1 << 60


def probe(root: Path = Path("/")) -> Hardware:
    """This machine, as this process may use it: CUDA_VISIBLE_DEVICES and container limits are respected.

    Never fails: what cannot be found out is left at its default. `root` is where /proc and /sys are looked for.
    """
    devices, links, driver, cuda = _gpus()
    total, free = host_memory(root)
    return Hardware(
        devices=devices,
        links=links,
        host_ram_bytes=total,
        host_free_bytes=free,
        cpu_cores=cpu_cores(root),
        cpu_name=_cpu_name(root),
        numa_nodes=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
        disk_free_bytes=_disk_free(),
        driver=driver,
        cuda=cuda,
        container=container(root),
        versions=_versions(),
        network_gb_s=_network(root),
    )


def _network(root: Path) -> float:
    """Both directions of the fastest network interface, GB/s; 0 where the system does not say."""
    speeds = [_number(path) for path in (root / "sys/class/net").glob("*/speed")]
    infiniband = [read_text(path).split(" ")[0] for path in (root / "sys/class/infiniband").glob("*/ports/*/rate")]
    speeds += [1000 * int(float(rate)) for rate in infiniband if rate.replace(".", "").isdigit()]
    return 2 * max((speed for speed in speeds if 0 < speed < 10**7), default=0) / 8000


# --- the host ---------------------------------------------------------------------------------------------------------


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """RAM in bytes: all of it, and what may still be taken. A cgroup's limit (v2 or v1) counts where it is smaller."""
    facts: dict[str, int] = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.strip().split(" ")[0].isdigit():
            facts[name] = int(value.split()[0]) * 1024
    total, free = facts.get("MemTotal", 0), facts.get("MemAvailable", facts.get("MemFree", 0))
    for folder, limit_file, usage_file, cache_key in _memory_groups(root):
        limit = _number(folder / limit_file)
        if 0 < limit < min(total or _UNLIMITED, _UNLIMITED):
            used = _number(folder / usage_file) - _statistic(folder / "memory.stat", cache_key)
            total, free = limit, min(free or limit, max(0, limit - max(0, used)))
    return total, free


def _memory_groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """Folders of the memory cgroups this process is in, from the root inwards, with the names of their files."""
    found: list[tuple[Path, str, str, str]] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            bases = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for base in bases:
            # In a container the path may be the host's, and only the root of the mount is there.
            steps = [base, *(base / part for part in _prefixes(path))]
            found += [(folder, *names) for folder in steps if (folder / names[0]).is_file()]
    return found


def _prefixes(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def cpu_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may run on, at most its CPU quota."""
    allowed = os.sched_getaffinity(0) if root == Path("/") else set(range(os.cpu_count() or 1))
    siblings = {
        read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)
        for cpu in allowed
    }
    cores = len(siblings)
    quota, _, period = read_text(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if not quota.isdigit():
        quota = read_text(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
        period = read_text(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return max(1, cores)


def _cpu_name(root: Path) -> str:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        if line.startswith(("model name", "Hardware")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def container(root: Path = Path("/")) -> str:
    """What kind of container this is: docker, podman, kubernetes, wsl, or "" for none that is known."""
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if "kubepods" in read_text(root / "proc/1/cgroup") or (root / "run/secrets/kubernetes.io").exists():
        return "kubernetes"
    return "wsl" if "microsoft" in read_text(root / "proc/version").lower() else ""


def _disk_free() -> int:
    with suppress(OSError):
        return shutil.disk_usage(Path.cwd()).free
    return 0


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_text(path: Path) -> str:
    """What a file of /proc or /sys says; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else 0


def _statistic(path: Path, key: str) -> int:
    for line in read_text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0


# --- the GPUs ---------------------------------------------------------------------------------------------------------


def _gpus() -> tuple[tuple[Device, ...], tuple[Link, ...], str, str]:
    """Devices and links in CUDA's order, driver version, CUDA version; nothing where there is no NVIDIA driver."""
    try:
        with opened() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            uuids = [text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
            chosen = visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))
            devices = tuple(_device(nvml, handles[at], index, uuids[at]) for index, at in enumerate(chosen))
            links = _links(nvml, [handles[at] for at in chosen], devices)
            version = int(ask(nvml, "nvmlSystemGetCudaDriverVersion_v2", default=0))
            cuda = f"{version // 1000}.{version % 1000 // 10}" if version else ""
            return devices, links, text(ask(nvml, "nvmlSystemGetDriverVersion", default="")), cuda
    except Exception:  # a driver that answers half the questions (containers, WSL) is as good as none
        return (), (), "", ""


def visible(uuids: list[str], variable: str | None) -> list[int]:
    """Which of the machine's GPUs CUDA_VISIBLE_DEVICES leaves, in its order; CUDA stops at the first it does not know.

    >>> visible(["GPU-aa", "GPU-bb", "GPU-cc"], "2,0"), visible(["GPU-aa", "GPU-bb"], "GPU-b")
    ([2, 0], [1])
    >>> visible(["GPU-aa"], ""), visible(["GPU-aa", "GPU-bb"], None), visible(["GPU-aa", "GPU-bb"], "1,7,0")
    ([], [0, 1], [1])
    """
    if variable is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for item in (part.strip() for part in variable.split(",")):
        if item.isdigit():
            found = [int(item)] if int(item) < len(uuids) else []
        else:
            found = [i for i, uuid in enumerate(uuids) if item and uuid.startswith(item)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def _device(nvml: Any, handle: Any, index: int, uuid: str) -> Device:
    name = text(nvml.nvmlDeviceGetName(handle))
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle, default=(0, 0))
    known = find_gpu(name, int(memory.total))
    # An idle link sleeps at generation 1: the most that card and slot can do is what a copy will wake.
    generation = int(ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle, default=0))
    width = int(ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle, default=0))
    sheet = known.device() if known else Device(name)
    return Device(
        name=name,
        index=index,
        memory_bytes=int(memory.total),
        free_bytes=int(memory.free),
        sm=float(f"{major}.{minor}") if major else sheet.sm,
        sm_count=sheet.sm_count,
        bf16_tflops=sheet.bf16_tflops,
        fp16_tflops=sheet.fp16_tflops,
        int8_tops=sheet.int8_tops,
        fp8_tflops=sheet.fp8_tflops,
        bandwidth_gb_s=sheet.bandwidth_gb_s,
        pcie_generation=generation or sheet.pcie_generation,
        pcie_width=width or sheet.pcie_width,
        p2p=sheet.p2p,
        uuid=uuid,
        doubt=sheet.doubt if known else "not in the table of known GPUs",
    )


def _links(nvml: Any, handles: list[Any], devices: tuple[Device, ...]) -> tuple[Link, ...]:
    links = []
    for b in range(len(handles)):
        for a in range(b):
            joined = _nvlinks(nvml, handles[a], handles[b])
            known = find_gpu(devices[a].name, devices[a].memory_bytes)
            if joined:
                links.append(Link(a, b, "nvlink", known.nvlink_gb_s if known else 50.0 * joined))
            else:
                width = min(devices[a].pcie_width, devices[b].pcie_width)
                generation = min(devices[a].pcie_generation, devices[b].pcie_generation)
                links.append(Link(a, b, "pcie", pcie_gb_s(generation, width)))
    return tuple(links)


def _nvlinks(nvml: Any, first: Any, second: Any) -> int:
    """How many NVLinks lead from one card to the other, directly or through a switch."""
    place = ask(nvml, "nvmlDeviceGetPciInfo_v3", second, default=None)
    bus = text(place.busId) if place is not None else ""
    count = 0
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        if not ask(nvml, "nvmlDeviceGetNvLinkState", first, link, default=0):
            continue
        remote = ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo_v2", first, link, default=None)
        kind = ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", first, link, default=None)
        through_switch = kind == getattr(nvml, "NVML_NVLINK_DEVICE_TYPE_SWITCH", 2)
        if through_switch or (remote is not None and text(remote.busId) == bus):
            count += 1
    return count
