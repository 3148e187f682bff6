"""The profile of a machine: what was measured on it, as a JSON file that the planner takes instead of the table.

The file is `{"version": 1, "date": "2026-12-01", "devices": {NAME: {RATE: number}}, "links": {"0-1": GB/s}}` with the
rates of `DeviceProfile`, measured hot. A rate that is missing or 0 is taken from the table. Nothing here measures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kitaeru.errors import PlanError
from kitaeru.files import write_json
from kitaeru.i18n import tr

VERSION = 1


@dataclass(frozen=True)
class DeviceProfile:
    """Measured rates of one kind of device; 0 is "not measured".

    TFLOP/s of large matrix products and of causal attention; GB/s of one large kernel (`stream`), of a chain of small
    eager kernels (`eager`), of NF4 unpacking counted as 2.5 bytes a weight, of pinned copies one way with all devices
    copying at once, of the host's memory under an optimizer; seconds of the host for one eager operation.
    """

    gemm_bf16_tflops: float = 0.0
    gemm_fp16_tflops: float = 0.0
    gemm_fp32_tflops: float = 0.0
    attention_forward_tflops: float = 0.0
    attention_backward_tflops: float = 0.0
    stream_gb_s: float = 0.0
    eager_gb_s: float = 0.0
    dequantise_gb_s: float = 0.0
    host_copy_gb_s: float = 0.0
    host_memory_gb_s: float = 0.0
    operation_seconds: float = 0.0


@dataclass(frozen=True)
class Profile:
    """What was measured on a machine, and when. `links` are GB/s one way between two devices, by `(a, b)`, a < b."""

    date: str
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    links: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def device(self, name: str) -> DeviceProfile | None:
        """The rates of the device of this name; None when it was not there."""
        return self.devices.get(name)

    def link(self, a: int, b: int) -> float:
        """GB/s one way between two devices; 0 when that was not measured."""
        return self.links.get((min(a, b), max(a, b)), 0.0)

    def save(self, path: Path) -> None:
        """Write the profile, atomically."""
        devices = {name: {f.name: getattr(p, f.name) for f in fields(p)} for name, p in self.devices.items()}
        links = {f"{a}-{b}": rate for (a, b), rate in self.links.items()}
        write_json(path, {"version": VERSION, "date": self.date, "devices": devices, "links": links})

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile.

        Raises:
            PlanError: it cannot be read, or a rate is no number.
        """
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
            if value["version"] != VERSION:
                raise ValueError("version")
            known = {f.name for f in fields(DeviceProfile)}
            devices = {
                name: DeviceProfile(**{key: _rate(rate) for key, rate in rates.items() if key in known})
                for name, rates in value["devices"].items()
            }
            links = {_pair(key): _rate(rate) for key, rate in value.get("links", {}).items()}
            return cls(str(value["date"]), devices, links)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                tr("{path} is not a profile this version can read.", path=path),
                remedy=tr("Delete it; the planner then takes the rates of its table."),
            ) from error


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError("rate")
    return float(value)


def _pair(key: str) -> tuple[int, int]:
    a, b = sorted(int(part) for part in key.split("-"))
    return a, b


def profile_path() -> Path:
    """Where this machine's profile is kept: `profile.json` in kitaeru's cache folder."""
    cache = os.environ.get("KITAERU_CACHE")
    base = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kitaeru"
    return base / "profile.json"


def own_profile() -> Profile | None:
    """This machine's profile; None when it was never measured."""
    path = profile_path()
    return Profile.load(path) if path.is_file() else None
