"""Looks at the devices now and then in a thread of its own: GPUs through the driver's library, the host in /proc."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from kitaeru.events import Reading
from kitaeru.machine.facts import THROTTLES
from kitaeru.machine.nvml import NoDriver, ask, opened, text
from kitaeru.machine.probe import host_memory, read_text, visible

HOST = "host"
_PCIE_TO, _PCIE_FROM = 1, 0  # NVML's counters: received by the card, sent by it
_SM_CLOCK = 1


class Host:
    """The cores and the RAM. Utilisation and power are those since the last reading."""

    def __init__(self, root: Path = Path("/"), used: bool = True) -> None:
        self._root, self._used = root, used
        self._ticks = self._read_ticks()
        self._energy = self._read_energy()

    def read(self) -> Reading:
        """Now."""
        busy, whole = self._read_ticks()
        before_busy, before_whole = self._ticks
        self._ticks = busy, whole
        total, free = host_memory(self._root)
        return Reading(
            device=HOST,
            name=f"{os.cpu_count()} threads",
            used=self._used,
            utilisation=(busy - before_busy) / (whole - before_whole) if whole > before_whole else None,
            memory_bytes=total - free,
            memory_total_bytes=total,
            watts=self._watts(),
        )

    def _read_ticks(self) -> tuple[int, int]:
        """Busy and all ticks of all cores since the start of the machine (proc(5), /proc/stat)."""
        parts = read_text(self._root / "proc/stat").partition("\n")[0].split()[1:9]
        ticks = [int(part) for part in parts if part.isdigit()]
        whole = sum(ticks)
        return (whole - sum(ticks[3:5]), whole) if len(ticks) >= 5 else (0, 0)

    def _read_energy(self) -> tuple[float, float] | None:
        """Microjoules of all sockets (RAPL; only root may read them on most systems), and when."""
        names = (self._root / "sys/class/powercap").glob("intel-rapl:?")
        values = [read_text(name / "energy_uj").strip() for name in names]
        return (float(sum(map(int, values))), time.monotonic()) if values and all(map(str.isdigit, values)) else None

    def _watts(self) -> float | None:
        before, self._energy = self._energy, self._read_energy()
        if before is None or self._energy is None:
            return None
        joules, seconds = (self._energy[0] - before[0]) / 1e6, self._energy[1] - before[1]
        return joules / seconds if joules >= 0 and seconds > 0 else None  # the counter starts anew now and then


def gpu_reading(nvml: Any, handle: Any, device: int, used: bool) -> Reading:
    """A card now; what this driver or card cannot tell is None."""

    def question(function: str, *arguments: Any) -> Any:
        return ask(nvml, function, handle, *arguments, default=None)

    def kilobytes(counter: int) -> float | None:
        value = question("nvmlDeviceGetPcieThroughput", counter)
        return None if value is None else value * 1024.0

    rates, memory = question("nvmlDeviceGetUtilizationRates"), question("nvmlDeviceGetMemoryInfo")
    power, celsius = question("nvmlDeviceGetPowerUsage"), question("nvmlDeviceGetTemperature", 0)
    clock, most = question("nvmlDeviceGetClockInfo", _SM_CLOCK), question("nvmlDeviceGetMaxClockInfo", _SM_CLOCK)
    reasons = question("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = question("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return Reading(
        device=str(device),
        name=text(question("nvmlDeviceGetName")),
        used=used,
        utilisation=None if rates is None else rates.gpu / 100,
        memory_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        watts=None if power is None else power / 1000,
        celsius=None if celsius is None else float(celsius),
        clock_mhz=None if clock is None else float(clock),
        clock_share=clock / most if clock and most else None,
        pcie_to_bytes_s=kilobytes(_PCIE_TO),
        pcie_from_bytes_s=kilobytes(_PCIE_FROM),
        throttles=tuple(name for name, bits in THROTTLES.items() if reasons & bits),
    )


class Sampler:
    """Calls `tell` with the readings of all visible devices every `seconds`, until it is closed.

    `used` are the numbers of the GPUs (in CUDA's order) that the run computes on; none means the CPU does. A question
    to the driver takes about a millisecond, PCIe traffic 20 ms per direction and card, all without Python's lock.
    `spent` counts the seconds of processor time of this thread.
    """

    def __init__(self, tell: Callable[[tuple[Reading, ...]], None], seconds: float, used: Collection[int]) -> None:
        self._tell, self._seconds, self._used = tell, seconds, used
        self._stop = threading.Event()
        self.spent = 0.0
        self._thread = threading.Thread(target=self._work, name="devices", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, at once unless the driver is being asked."""
        self._stop.set()
        self._thread.join(5)

    def _work(self) -> None:
        host = Host(used=not self._used)
        with suppress(NoDriver), opened() as nvml:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            uuids = [text(ask(nvml, "nvmlDeviceGetUUID", handle, default="")) for handle in handles]
            order = [handles[at] for at in visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))]
            self._look(lambda: (*(gpu_reading(nvml, h, n, n in self._used) for n, h in enumerate(order)), host.read()))
            return
        self._look(lambda: (host.read(),))

    def _look(self, read: Callable[[], tuple[Reading, ...]]) -> None:
        # A fault in looking, or in whoever is told, must not reach the run: it only ends the looking.
        with suppress(Exception):
            while not self._stop.wait(self._seconds):
                started = time.thread_time()
                self._tell(read())
                self.spent += time.thread_time() - started


def this_host() -> str:
    """The name of this host."""
    return socket.gethostname()
