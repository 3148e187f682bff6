"""Calibration: this machine measured group by group, what is found kept at once, so that an interrupted one goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitaeru.errors import PlanError
from kitaeru.files import write_json
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, tr
from kitaeru.machine.links import measure_links
from kitaeru.machine.measure import GROUPS, Bench, copies, heat
from kitaeru.plan.calibrate import DeviceProfile, Profile, cpu_key, device_from_json, device_json

# What an interrupted calibration has found is good for so long: the card is as hot, the machine as busy.
FRESH_SECONDS = 3600.0

TITLES: dict[str, str] = {
    "heat": N_("warming up, so that the clocks are those of long training"),
    "products": N_("matrix products"),
    "attention": N_("attention"),
    "memory": N_("memory"),
    "unpacking": N_("unpacking of 4-bit weights"),
    "copies": N_("copies between RAM and device"),
    "launches": N_("launching of operations"),
    "links": N_("sums over all devices, and each pair"),
}

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effort:
    """How thoroughly: seconds of load before, seconds for each number."""

    heat: float
    number: float


EFFORTS = {False: Effort(30.0, 0.15), True: Effort(4.0, 0.04)}


def calibrate(
    hardware: Hardware, path: Path, *, quick: bool = False, links: bool = True, tell: Tell = lambda *_: None
) -> Profile:
    """Measure this machine and keep the profile at `path`: each kind of GPU once, or without one the CPU.

    Devices that an earlier profile knows and that are not here now stay in it. `links`: measure what joins the devices.

    Raises:
        TrainingError: the devices do not get through to each other.
    """
    effort = EFFORTS[quick]
    on_gpu = bool(hardware.devices)
    count = len(hardware.devices) if on_gpu else 2
    kinds = {device.name: torch.device("cuda", device.index) for device in reversed(hardware.devices)}
    kinds = kinds or {cpu_key(hardware.cpu_name, hardware.cpu_cores): torch.device("cpu")}
    kept = _Kept(
        path.with_name("profile.partial.json"), {"kinds": list(kinds), "quick": quick, "torch": torch.__version__}
    )
    links = links and count > 1
    steps = [(name, group) for name in kinds for group in ("heat", *GROUPS)]
    total = len(steps) + links
    for number, (name, group) in enumerate(steps):
        if kept.has(name, group):
            continue
        tell(f"{name}: {tr(TITLES[group])}", number, total)
        bench = Bench(kinds[name], effort.number, quick)
        kept.put(name, group, _measured(bench, group, effort, len(hardware.devices)))
        _free(bench)
    found = Profile(
        date=time.strftime("%Y-%m-%d"),
        devices={**_earlier(path).devices, **{name: kept.device(name) for name in kinds}},
        torch=torch.__version__,
        quick=quick,
    )
    if links:
        tell(tr(TITLES["links"]), total - 1, total)
        found = _with_links(found, measure_links(count, on_gpu=on_gpu, seconds=effort.number * 3), on_gpu, count)
    found.save(path)
    kept.forget()
    return found


def _measured(bench: Bench, group: str, effort: Effort, cards: int) -> dict[str, Any]:
    if group == "heat":
        return {"clocks": heat(bench, effort.heat)}
    return copies(bench, cards) if group == "copies" else GROUPS[group](bench)


def _free(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.empty_cache()


def _with_links(profile: Profile, found: dict[str, Any], on_gpu: bool, count: int) -> Profile:
    key = f"{'cuda' if on_gpu else 'cpu'}-{count}"
    pairs = {tuple(int(part) for part in name.split("-")): rate for name, rate in found["pairs"].items()}
    return Profile(
        date=profile.date,
        devices=profile.devices,
        links={(a, b): rate for (a, b), rate in pairs.items()} if on_gpu else {},
        rings={key: found["ring"]},
        latencies={key: found["latency"]},
        torch=profile.torch,
        quick=profile.quick,
    )


def _earlier(path: Path) -> Profile:
    with suppress(PlanError):
        return Profile.load(path)
    return Profile("")


class _Kept:
    """What has been measured so far, in a file that the next attempt reads if it asks for the same."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        self.groups: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["asked"] == asked and time.time() - value["time"] < FRESH_SECONDS:
                self.groups = value["groups"]

    def has(self, name: str, group: str) -> bool:
        return group in self.groups.get(name, {}) and group != "heat"  # it has cooled down since

    def put(self, name: str, group: str, found: dict[str, Any]) -> None:
        rates = device_json(DeviceProfile(**found))
        self.groups.setdefault(name, {})[group] = {key: rates[key] for key in found}
        write_json(self.path, {"asked": self.asked, "time": time.time(), "groups": self.groups})

    def device(self, name: str) -> DeviceProfile:
        return device_from_json({key: rate for rates in self.groups[name].values() for key, rate in rates.items()})

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
