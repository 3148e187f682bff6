from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kitaeru.events import Devices, EventLog, Reading, parse, read
from kitaeru.machine.sampler import Host, Sampler, gpu_reading


def test_a_card_that_can_tell_everything(described: Any) -> None:
    card = described.card(
        1,
        UtilizationRates=SimpleNamespace(gpu=87, memory=40),
        MemoryInfo=SimpleNamespace(total=24 << 30, used=20 << 30, free=4 << 30),
        PowerUsage=221_300,
        Temperature=78,
        ClockInfo=1400,
        MaxClockInfo=2000,
        PcieThroughput=lambda counter: 1000 * (counter + 1),
        CurrentClocksEventReasons=0x20,
    )
    assert gpu_reading(described.Nvml([card]), card, 1, True) == Reading(
        device="1",
        name="NVIDIA RTX A5000",
        used=True,
        utilisation=0.87,
        memory_bytes=20 << 30,
        memory_total_bytes=24 << 30,
        watts=221.3,
        celsius=78.0,
        clock_mhz=1400.0,
        clock_share=0.7,
        pcie_to_bytes_s=2000 * 1024,
        pcie_from_bytes_s=1000 * 1024,
        throttles=("thermal",),
    )


def test_a_card_that_tells_nothing(described: Any) -> None:
    reading = gpu_reading(described.Nvml([{}]), {}, 0, False)
    assert reading == Reading(device="0", name="", used=False)
    assert reading.memory_share is None


def machine(root: Path, busy: int, idle: int, microjoules: int) -> None:
    for name, text in {
        "proc/stat": f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n",
        "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 250 kB\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": f"{microjoules}\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_host_between_two_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    machine(tmp_path, busy=100, idle=900, microjoules=5_000_000)
    host = Host(tmp_path)
    machine(tmp_path, busy=175, idle=925, microjoules=305_000_000)
    reading = host.read()
    assert reading.utilisation == pytest.approx(0.75)
    assert reading.memory_share == pytest.approx(0.75)
    assert reading.watts == pytest.approx(150)
    machine(tmp_path, busy=175, idle=925, microjoules=1_000)  # the counter has started anew
    again = host.read()
    assert (again.utilisation, again.watts) == (None, None)


def test_this_host_is_looked_at_in_the_background() -> None:
    seen: list[tuple[Reading, ...]] = []
    two = threading.Event()

    def tell(readings: tuple[Reading, ...]) -> None:
        seen.append(readings)
        if len(seen) > 1:
            two.set()

    sampler = Sampler(tell, 0.05, used=())
    end = time.monotonic() + 20
    while not two.is_set() and time.monotonic() < end:
        sum(range(10_000))  # some work to be seen
    sampler.close()
    count = len(seen)
    host = seen[-1][-1]
    assert host.device == "host"
    assert host.utilisation is not None
    assert 0 < host.utilisation <= 1
    assert host.memory_bytes is not None
    assert 0 < host.memory_bytes < (host.memory_total_bytes or 0)
    assert sampler.spent / count < 0.05
    time.sleep(0.15)
    assert len(seen) == count


def test_a_fault_in_the_listener_ends_the_looking_alone() -> None:
    called = threading.Event()

    def tell(_: tuple[Reading, ...]) -> None:
        called.set()
        raise OSError("disk full")

    sampler = Sampler(tell, 0.01, used=())
    assert called.wait(20)
    sampler.close()


def test_readings_go_through_the_log(tmp_path: Path) -> None:
    event = Devices(
        step=3, host=os.uname().nodename, readings=(Reading(device="0", name="A", watts=200.5, throttles=("thermal",)),
                                                    Reading(device="host", name="B", watts=40.0))
    )  # fmt: skip
    log = EventLog(tmp_path / "events.jsonl")
    log(event)
    log.close()
    assert list(read(tmp_path / "events.jsonl")) == [event]
    assert event.watts == 240.5
    # A later version may know more of a device.
    line = event.to_json().replace('"watts": 200.5', '"watts": 200.5, "fan": 1')
    assert parse(line) == event
