"""The profile of a machine: what was measured on it, as a JSON file that the planner takes instead of the table.

`machine.measure` fills it, the planner (`plan.rates`) reads it. What a profile does not hold is taken from the table.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import PlanError
from kitaeru.files import write_json
from kitaeru.i18n import tr

VERSION = 2

Products = Mapping[tuple[float, ...], float]
# Who computes attention: a model's own layers, fused ones, fused ones over examples of one length.
AttentionKind = Literal["attention", "fused", "even"]
ATTENTION: tuple[AttentionKind, ...] = ("attention", "fused", "even")
_BY_LENGTH = tuple(f"{kind}_{way}" for kind in ATTENTION for way in ("forward", "backward"))


@dataclass(frozen=True)
class DeviceProfile:
    """Measured rates of one kind of device; 0 or nothing is "not measured".

    `products`: TFLOP/s of matrix products by arithmetic (bf16, fp16, fp32, tf32, fp8, int8) and by (rows, width), a
    square matrix of that width. `attention_forward`, `attention_backward`: TFLOP/s of causal packed attention by length
    of the example, half of the square counted; `fused_` in fused layers, `even_` there with examples of one length.
    TFLOP/s of an adapter's products (`skinny_tflops`) and of experts'
    (`grouped_tflops`). GB/s of one large kernel (`stream`), of a chain of small eager kernels (`eager`), of NF4
    unpacking counted as 2.5 bytes a weight, of pinned copies one way, alone and with all devices copying at once
    (`host_copy`), of the host's memory under an optimizer; seconds of the host for one eager operation of a model.
    `clocks`: MHz, degrees and watts before and after, for people.
    """

    products: Mapping[str, Products] = field(default_factory=dict)
    attention_forward: Products = field(default_factory=dict)
    attention_backward: Products = field(default_factory=dict)
    fused_forward: Products = field(default_factory=dict)
    fused_backward: Products = field(default_factory=dict)
    even_forward: Products = field(default_factory=dict)
    even_backward: Products = field(default_factory=dict)
    skinny_tflops: float = 0.0
    grouped_tflops: float = 0.0
    stream_gb_s: float = 0.0
    eager_gb_s: float = 0.0
    dequantise_gb_s: float = 0.0
    host_copy_alone_gb_s: float = 0.0
    host_copy_gb_s: float = 0.0
    host_memory_gb_s: float = 0.0
    operation_seconds: float = 0.0
    clocks: Mapping[str, float] = field(default_factory=dict)

    def product_tflops(self, arithmetic: str, rows: float, width: float) -> float:
        """TFLOP/s of a product of `rows` with a square matrix of `width`; 0 when that arithmetic was not measured.

        >>> measured = DeviceProfile({"bf16": {(512, 1024): 100.0, (512, 4096): 300.0}})
        >>> measured.product_tflops("bf16", 4096, 2048), measured.product_tflops("bf16", 512, 9999)
        (200.0, 300.0)
        """
        return _between(self.products.get(arithmetic, {}), (rows, width))

    def attention_tflops(self, length: float, kind: AttentionKind) -> tuple[float, float]:
        """TFLOP/s forward and backward for examples of `length` tokens; 0 where not measured."""
        forward, backward = (getattr(self, f"{kind}_{way}") for way in ("forward", "backward"))
        return _between(forward, (length,)), _between(backward, (length,))


def _between(table: Products, at: tuple[float, ...]) -> float:
    """The value at a point, between the measured ones of each size by its logarithm; at the edges, the edge's."""
    if not table:
        return 0.0
    if not at:
        return next(iter(table.values()))
    sizes = sorted({key[0] for key in table})
    place = bisect_right(sizes, at[0])
    below, above = sizes[max(0, place - 1)], sizes[min(place, len(sizes) - 1)]
    first, second = (_between({k[1:]: v for k, v in table.items() if k[0] == size}, at[1:]) for size in (below, above))
    if below == above or at[0] <= below:
        return first
    share = math.log(at[0] / below) / math.log(above / below)
    return first + share * (second - first)


@dataclass(frozen=True)
class Profile:
    """What was measured on a machine, when, and with which torch. `quick`: in seconds instead of minutes.

    `links` are GB/s one way between two devices, by `(a, b)`, a < b; `rings` GB/s at which each of so many devices
    ("cuda-2", "cpu-2") sends in an all-reduce, `latencies` the seconds of an empty one.
    """

    date: str
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    links: Mapping[tuple[int, int], float] = field(default_factory=dict)
    rings: Mapping[str, float] = field(default_factory=dict)
    latencies: Mapping[str, float] = field(default_factory=dict)
    torch: str = ""
    quick: bool = False

    def device(self, name: str) -> DeviceProfile | None:
        """The rates of the device of this name; None when it was not there."""
        return self.devices.get(name)

    def link(self, a: int, b: int) -> float:
        """GB/s one way between two devices; 0 when that was not measured."""
        return self.links.get((min(a, b), max(a, b)), 0.0)

    def save(self, path: Path) -> None:
        """Write the profile, atomically."""
        write_json(
            path,
            {
                "version": VERSION,
                "date": self.date,
                "torch": self.torch,
                "quick": self.quick,
                "devices": {name: device_json(p) for name, p in self.devices.items()},
                "links": {f"{a}-{b}": rate for (a, b), rate in self.links.items()},
                "rings": dict(self.rings),
                "latencies": dict(self.latencies),
            },
        )

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
            return cls(
                date=str(value["date"]),
                devices={name: device_from_json(rates) for name, rates in value["devices"].items()},
                links={_pair(key): _rate(rate) for key, rate in value.get("links", {}).items()},
                rings={key: _rate(rate) for key, rate in value.get("rings", {}).items()},
                latencies={key: _rate(rate) for key, rate in value.get("latencies", {}).items()},
                torch=str(value.get("torch", "")),
                quick=bool(value.get("quick", False)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                tr("{path} is not a profile this version can read.", path=path),
                remedy=tr("Measure again with `kitaeru bench --calibrate`, or delete it."),
            ) from error


def device_json(profile: DeviceProfile) -> dict[str, Any]:
    """A device's rates as JSON data: sizes of tables are written "512x1024"."""
    found: dict[str, Any] = {f.name: getattr(profile, f.name) for f in fields(profile)}
    found["products"] = {kind: _written(table) for kind, table in profile.products.items()}
    for name in _BY_LENGTH:
        found[name] = _written(found[name])
    return {**found, "clocks": dict(profile.clocks)}


def device_from_json(value: Mapping[str, Any]) -> DeviceProfile:
    """The inverse of `device_json`; names that are not known are left out.

    Raises:
        ValueError, TypeError, AttributeError: a rate is no number.
    """
    known = {f.name for f in fields(DeviceProfile)}
    found: dict[str, Any] = {}
    for name, rate in value.items():
        if name == "products":
            found[name] = {kind: _read(table) for kind, table in rate.items()}
        elif name in _BY_LENGTH:
            found[name] = _read(rate)
        elif name == "clocks":
            found[name] = {key: _rate(number) for key, number in rate.items()}
        elif name in known:
            found[name] = _rate(rate)
    return DeviceProfile(**found)


def _written(table: Products) -> dict[str, float]:
    return {"x".join(f"{size:g}" for size in key): rate for key, rate in table.items()}


def _read(table: Mapping[str, Any]) -> dict[tuple[float, ...], float]:
    return {tuple(float(size) for size in key.split("x")): _rate(rate) for key, rate in table.items()}


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError("rate")
    return float(value)


def _pair(key: str) -> tuple[int, int]:
    a, b = sorted(int(part) for part in key.split("-"))
    return a, b


def cpu_key(cpu_name: str, cores: int) -> str:
    """The name a CPU has in a profile: another share of its cores is another device."""
    return f"CPU {cpu_name or '?'} x{cores}"


def profile_path() -> Path:
    """Where this machine's profile is kept: `$KITAERU_DATA/profile.json`, else in `~/.local/share/kitaeru`."""
    data = os.environ.get("KITAERU_DATA")
    base = Path(data) if data else Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "kitaeru"
    return base / "profile.json"


def own_profile() -> Profile | None:
    """This machine's profile; None when it was never measured."""
    path = profile_path()
    return Profile.load(path) if path.is_file() else None
