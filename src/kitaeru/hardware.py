"""The machine as plain data, and the table of known GPUs.

A plan needs no GPU to be present: a `Hardware` may be probed here (`machine.probe`), saved on another machine
(`to_dict`, `from_dict`), or described in words (`parse_gpus("2x RTX A5000, nvlink")`). Sizes are bytes, rates are
dense (no sparsity) teraflops or gigabytes per second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import UsageError
from kitaeru.i18n import tr

MIB = 1 << 20
_UNITS = {"": 10**9, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20}
_UNITS |= {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "gib": 2**30, "tib": 2**40}
# Words the driver adds to a card's name, or that a sheet adds and the driver does not.
_NOISE = {"nvidia", "geforce", "tesla", "generation", "edition", "workstation", "server", "max", "q", "sxm4", "sxm2"}


@dataclass(frozen=True)
class Device:
    """One accelerator. `sm` is its compute capability (8.6 for an RTX A5000); a rate of 0 means "has no such
    arithmetic".

    `doubt` says which facts come from memory rather than a sheet or a measurement; empty when none do.
    """

    name: str
    index: int = 0
    kind: Literal["cuda"] = "cuda"
    memory_bytes: int = 0
    free_bytes: int = 0
    sm: float = 0.0
    sm_count: int = 0
    bf16_tflops: float = 0.0
    fp16_tflops: float = 0.0
    int8_tops: float = 0.0
    fp8_tflops: float = 0.0
    bandwidth_gb_s: float = 0.0
    pcie_generation: int = 0
    pcie_width: int = 0
    p2p: bool = False
    uuid: str = ""
    doubt: str = ""

    @property
    def has_bf16(self) -> bool:
        """Whether its matrix units compute in bfloat16 (compute capability 8.0 and later)."""
        return self.sm >= 8.0


@dataclass(frozen=True)
class Link:
    """What joins devices `a` and `b` (indices): gigabytes per second, both directions counted."""

    a: int
    b: int
    kind: Literal["nvlink", "pcie", "network"]
    gb_s: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """A machine, or several `hosts` together (`united`). `host_free_bytes` is what this process may still take,
    container limits counted in; `network_gb_s` what the fastest network interface carries, both directions counted (0:
    not known).
    """

    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    host_ram_bytes: int = 0
    host_free_bytes: int = 0
    cpu_cores: int = 1
    cpu_name: str = ""
    numa_nodes: int = 1
    disk_free_bytes: int = 0
    driver: str = ""
    cuda: str = ""
    container: str = ""
    described: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    hosts: int = 1
    network_gb_s: float = 0.0

    def summary(self) -> str:
        """One line for people: `2 x NVIDIA RTX A5000 (24 GB), 128 GB of RAM, 16 cores`."""
        counts: dict[tuple[str, int], int] = {}
        for device in self.devices:
            key = (device.name, round(device.memory_bytes / 2**30))
            counts[key] = counts.get(key, 0) + 1
        parts = [f"{count} x {name} ({size} GB)" for (name, size), count in counts.items()] or [tr("no GPU")]
        ram = tr("{size} GB of RAM", size=round(self.host_ram_bytes / 1e9))
        hosts = [tr("{count} hosts", count=self.hosts)] if self.hosts > 1 else []
        return ", ".join([*hosts, *parts, ram, tr("{count} cores", count=self.cpu_cores)])

    @property
    def roomiest(self) -> Device | None:
        """The GPU with most memory free, the first of several: where a run on one device goes. None without a GPU."""
        return max(self.devices, key=lambda device: device.free_bytes, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back, on this machine or another."""
        return {"version": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Hardware:
        """The inverse of `to_dict`. Unknown keys are ignored, so that a file of a later version can be read.

        Raises:
            UsageError: this is not a description of a machine.
        """
        try:
            known = {key: value[key] for key in (f.name for f in fields(cls)) if key in value}
            known["devices"] = tuple(Device(**_known(Device, d)) for d in value.get("devices", ()))
            known["links"] = tuple(Link(**_known(Link, d)) for d in value.get("links", ()))
            if value.get("version") != 1:
                raise ValueError("version")
            return cls(**known)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                tr("This is not a description of a machine that kitaeru can read."),
                remedy=tr("Save one on the other machine with `kitaeru doctor --json > machine.json`."),
            ) from error

    @classmethod
    def load(cls, path: Path) -> Hardware:
        """Read a description from a JSON file.

        Raises:
            UsageError: the file is missing, not JSON, or not a description.
        """
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                tr("{path} cannot be read as JSON: {error}", path=path, error=error),
                remedy=tr("Save one on the other machine with `kitaeru doctor --json > machine.json`."),
            ) from error
        return cls.from_dict(value.get("hardware", value) if isinstance(value, dict) else {})


def _known(cls: type[Any], value: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    return {key: item for key, item in value.items() if key in names}


# Where nobody knows what the network carries: ten gigabits a second, both directions counted.
NETWORK_GB_S = 2.5


def united(machines: Sequence[Hardware]) -> Hardware:
    """Several hosts as one machine to plan for. Devices count on from host to host; those of different hosts are joined
    by the slowest host's network. RAM and cores are those of all, each as good as the poorest.

    >>> two = united([parse_gpus("2x RTX A5000"), parse_gpus("2x RTX A5000")])
    >>> two.hosts, [device.index for device in two.devices], [(l.a, l.b, l.kind) for l in two.links if l.b == l.a + 1]
    (2, [0, 1, 2, 3], [(0, 1, 'pcie'), (1, 2, 'network'), (2, 3, 'pcie')])
    """
    devices: list[Device] = []
    links: list[Link] = []
    network = min((machine.network_gb_s or NETWORK_GB_S for machine in machines), default=NETWORK_GB_S)
    for machine in machines:
        first = len(devices)
        links += [Link(a, first + b, "network", network) for b in range(len(machine.devices)) for a in range(first)]
        links += [replace(link, a=first + link.a, b=first + link.b) for link in machine.links]
        devices += [replace(device, index=first + number) for number, device in enumerate(machine.devices)]
    return replace(
        machines[0],
        devices=tuple(devices),
        links=tuple(links),
        host_ram_bytes=len(machines) * min(machine.host_ram_bytes for machine in machines),
        host_free_bytes=len(machines) * min(machine.host_free_bytes for machine in machines),
        cpu_cores=len(machines) * min(machine.cpu_cores for machine in machines),
        hosts=len(machines),
        network_gb_s=network,
    )


@dataclass(frozen=True)
class KnownGpu:
    """A row of the table: what is known of a card without having it."""

    name: str
    memory_mib: int
    bandwidth_gb_s: float
    bf16_tflops: float
    int8_tops: float
    fp8_tflops: float
    fp16_tflops: float
    sm: str
    sm_count: int
    pcie_generation: int
    nvlink_gb_s: float
    p2p: bool
    doubt: str

    def device(self, index: int = 0) -> Device:
        """A card of this kind with all its memory free."""
        return Device(
            name=self.name,
            index=index,
            memory_bytes=self.memory_mib * MIB,
            free_bytes=self.memory_mib * MIB,
            sm=float(self.sm),
            sm_count=self.sm_count,
            bf16_tflops=self.bf16_tflops,
            fp16_tflops=self.fp16_tflops,
            int8_tops=self.int8_tops,
            fp8_tflops=self.fp8_tflops,
            bandwidth_gb_s=self.bandwidth_gb_s,
            pcie_generation=self.pcie_generation,
            pcie_width=16,
            p2p=self.p2p,
            doubt=self.doubt,
        )


@cache
def known_gpus() -> tuple[KnownGpu, ...]:
    """The table of known GPUs, in the order of the file."""
    text = (Path(__file__).parent / "hardware_table.json").read_text(encoding="utf-8")
    return tuple(KnownGpu(**row) for row in json.loads(text)["gpus"])


@lru_cache(maxsize=512)
def _words(name: str) -> frozenset[str]:
    spaced = re.sub(r"(?<=[a-z])[\s-]*(?=\d+\s*gb\b)", " ", name.lower().replace("(r)", ""))
    spaced = re.sub(r"\b(\d+)\s*gb\b", r"\1gb", spaced)
    spaced = re.sub(r"\b(rtx|gtx|tesla|quadro)(?=[a-z]?\d)", r"\1 ", spaced)
    return frozenset(word for word in re.split(r"[^a-z0-9]+", spaced) if word and word not in _NOISE)


@lru_cache(maxsize=512)
def find_gpu(name: str, memory_bytes: int = 0) -> KnownGpu | None:
    """The row for a card by the name a person or the driver gives it; None when it is not in the table.

    Cards that differ by size only (A100 40GB, A100 80GB) are told apart by `memory_bytes` where the name is silent;
    the larger one is meant when nothing tells. A word more or less ("RTX 3090" against "RTX 3090 Ti") is another card.

    >>> find_gpu("NVIDIA RTX A5000").sm, find_gpu("a5000").memory_mib, find_gpu("RTX 3090 Ti").name
    ('8.6', 24564, 'RTX 3090 Ti')
    >>> find_gpu("NVIDIA H100 80GB HBM3").name, find_gpu("A100", 42 * 10**9).name
    ('H100 SXM', 'A100 40GB')
    """
    words = _words(name) - {"rtx", "quadro"}
    sizes = {word for word in words if re.fullmatch(r"\d+gb", word)}
    form = {"hbm3": "sxm", "sxm5": "sxm", "hbm3e": "", "hbm2e": ""}
    core = {form.get(word, word) for word in words - sizes} - {""}
    if core == {"h100"}:
        core |= {"sxm"}  # the driver calls the SXM card "H100 80GB HBM3", and people just "H100"
    found: list[tuple[int, KnownGpu]] = []
    for gpu in known_gpus():
        row = _words(gpu.name) - {"rtx", "quadro"}
        row_sizes = {word for word in row if re.fullmatch(r"\d+gb", word)}
        if (row - row_sizes) - {"pcie"} == core - {"pcie"} and ("pcie" in row) <= ("pcie" in core):
            distance = abs(gpu.memory_mib * MIB - memory_bytes) if memory_bytes else -gpu.memory_mib
            exact = 0 if row_sizes and row_sizes <= sizes else 1
            found.append((exact * 10**15 + distance, gpu))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def parse_size(text: str) -> int:
    """Bytes of a size in words; a bare number is GB. "GB" is 10^9 bytes, "GiB" is 2^30.

    >>> parse_size("128GB"), parse_size("24 GiB"), parse_size("16")
    (128000000000, 25769803776, 16000000000)

    Raises:
        UsageError: this is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(tr("`{text}` is not a size.", text=text), remedy=tr("Write it like 128GB, 24GiB or 500MB."))
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_gpus(gpus: str, ram: str | None = None, *, cores: int = 8) -> Hardware:
    """A machine described in words: cards separated by commas, each with a count and maybe a size; `nvlink` joins all.

    >>> machine = parse_gpus("2x RTX A5000, nvlink", "128GB")
    >>> len(machine.devices), machine.links[0].kind, machine.host_ram_bytes
    (2, 'nvlink', 128000000000)
    >>> [d.name for d in parse_gpus("RTX 3090 + 2 x L4").devices]
    ['RTX 3090', 'L4', 'L4']

    Without `ram`, 64 GB or twice the cards' memory, whichever is more. `none` means a machine without a GPU.

    Raises:
        UsageError: a card that is not in the table and has no size given, or text that cannot be read.
    """
    devices: list[Device] = []
    nvlink = False
    for part in (piece.strip() for piece in re.split(r"[,+;]", gpus)):
        if part.lower() == "nvlink":
            nvlink = True
        elif part and part.lower() not in ("none", "cpu"):
            count, device = _parse_card(part)
            devices += [replace(device, index=len(devices) + i) for i in range(count)]
    total = sum(device.memory_bytes for device in devices)
    memory = parse_size(ram) if ram else max(64 * 10**9, 2 * total)
    return Hardware(
        devices=tuple(devices),
        links=_links(devices, nvlink),
        host_ram_bytes=memory,
        host_free_bytes=int(memory * 0.9),
        cpu_cores=cores,
        described=True,
    )


def _parse_card(text: str) -> tuple[int, Device]:
    counted = re.match(r"(\d+)\s*(?:[x×*]\s*|\s(?=[a-zA-Z]))(.+)", text, re.IGNORECASE)
    count, name = (int(counted[1]), counted[2].strip()) if counted else (1, text)
    size = re.search(r"\(?\b(\d+(?:\.\d+)?)\s*(g|gb|gib)\b\)?", name, re.IGNORECASE)
    gpu = find_gpu(name)
    if gpu is None and size:
        gpu = find_gpu(name.replace(size[0], " "))
    if gpu is None:
        names = ", ".join(row.name for row in _alike(name)) or ", ".join(row.name for row in known_gpus()[:8])
        raise UsageError(
            tr("The GPU `{name}` is not in kitaeru's table.", name=name),
            remedy=tr(
                "Names like this one: {names}. Or save that machine's description there and read it here.", names=names
            ),
        )
    if not 1 <= count <= 4096:
        raise UsageError(tr("`{text}` asks for {count} cards.", text=text, count=count), remedy=tr("Write at least 1."))
    device = gpu.device()
    if size and abs(float(size[1]) * 2**30 - device.memory_bytes) > 0.08 * device.memory_bytes:
        device = replace(device, memory_bytes=int(float(size[1]) * 2**30), free_bytes=int(float(size[1]) * 2**30))
    return count, device


def _alike(name: str) -> list[KnownGpu]:
    digits = set(re.findall(r"\d{2,}", name))
    return [gpu for gpu in known_gpus() if digits & set(re.findall(r"\d{2,}", gpu.name))]


def _links(devices: list[Device], nvlink: bool) -> tuple[Link, ...]:
    """Each pair's link: NVLink where asked for and both cards have it, else PCIe at its sheet rate."""
    links = []
    for b in range(len(devices)):
        for a in range(b):
            pair = [find_gpu(devices[i].name) for i in (a, b)]
            bridge = min((gpu.nvlink_gb_s if gpu else 0.0) for gpu in pair)
            if nvlink and bridge:
                links.append(Link(a, b, "nvlink", bridge))
            else:
                generation = min(devices[a].pcie_generation, devices[b].pcie_generation)
                links.append(Link(a, b, "pcie", pcie_gb_s(generation, 16)))
    return tuple(links)


def pcie_gb_s(generation: int, width: int) -> float:
    """Both directions of a PCIe link as the sheet counts it: 4.0 x16 has 64 GB/s.

    >>> pcie_gb_s(4, 16), pcie_gb_s(3, 8)
    (64.0, 16.0)
    """
    return 2 * width * 2.0 ** (generation - 4) * 2 if generation else 0.0
