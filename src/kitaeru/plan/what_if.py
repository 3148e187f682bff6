"""Other machines and wishes by a few words: `add 1 GPU`, `nvlink`, `ram=256GB`, `seq-len=8192`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from kitaeru.errors import UsageError
from kitaeru.hardware import Device, Hardware, Link, find_gpu, parse_size, pcie_gb_s
from kitaeru.i18n import tr
from kitaeru.plan.decide import fill
from kitaeru.plan.types import Decision
from kitaeru.recipe.types import Recipe

# What `host_free_bytes` is of a described machine's RAM (hardware.parse_gpus).
FREE_SHARE = 0.9

Changed = tuple[Recipe, Hardware]


def what_if(text: str, recipe: Recipe, hardware: Hardware) -> Changed:
    """The recipe and the machine after the change.

    >>> from kitaeru.hardware import parse_gpus
    >>> wish = Recipe.model_validate({"model": "m", "data": {"train": "d"}})
    >>> len(what_if("add 2 GPUs", wish, parse_gpus("RTX A5000"))[1].devices)
    3
    >>> what_if("seq-len=8192", wish, parse_gpus("RTX A5000"))[0].data.seq_len
    8192

    Raises:
        UsageError: the text is none of the changes known, or the machine cannot be changed so.
    """
    for pattern, change in _CHANGES:
        match = re.fullmatch(pattern, text.strip(), re.IGNORECASE)
        if match is not None:
            return change(recipe, hardware, match)
    raise UsageError(
        tr("`{text}` is not a change the planner knows.", text=text),
        remedy=tr("Try one of these: {changes}", changes='"add 1 GPU", "nvlink", "ram=256GB", "seq-len=8192"'),
    )


def _add_devices(recipe: Recipe, hardware: Hardware, match: re.Match[str]) -> Changed:
    if not hardware.devices:
        raise UsageError(
            tr("There is no GPU here that another could be like."), remedy=tr('Name one: --gpus "RTX A5000"')
        )
    last = hardware.devices[-1]
    at = len(hardware.devices)
    fresh = [replace(last, index=at + i, free_bytes=last.memory_bytes, uuid="") for i in range(int(match[1]))]
    devices = (*hardware.devices, *fresh)
    known = {(link.a, link.b) for link in hardware.links}
    pairs = [(a, b) for b in range(len(devices)) for a in range(b) if (a, b) not in known]
    links = hardware.links + tuple(_pcie(devices, a, b) for a, b in pairs)
    return recipe, replace(hardware, devices=devices, links=links, described=True)


def _pcie(devices: tuple[Device, ...], a: int, b: int) -> Link:
    pair = (devices[a], devices[b])
    generation, width = min(d.pcie_generation for d in pair), min(d.pcie_width or 16 for d in pair)
    return Link(a, b, "pcie", pcie_gb_s(generation, width))


def _nvlink(recipe: Recipe, hardware: Hardware, match: re.Match[str]) -> Changed:
    if len(hardware.devices) < 2:
        raise UsageError(tr("NVLink joins two cards; there are fewer."), remedy=tr('Try "add 1 GPU" first.'))
    rates = []
    for device in hardware.devices:
        known = find_gpu(device.name, device.memory_bytes)
        if known is None or not known.nvlink_gb_s:
            raise UsageError(
                tr("{device} has no NVLink.", device=device.name), remedy=tr('Leave out --what-if "nvlink".')
            )
        rates.append(known.nvlink_gb_s)
    count = len(hardware.devices)
    links = tuple(Link(a, b, "nvlink", min(rates[a], rates[b])) for b in range(count) for a in range(b))
    return recipe, replace(hardware, links=links, described=True)


def _ram(recipe: Recipe, hardware: Hardware, match: re.Match[str]) -> Changed:
    size = parse_size(match[1])
    return recipe, replace(hardware, host_ram_bytes=size, host_free_bytes=int(size * FREE_SHARE), described=True)


def _seq_len(recipe: Recipe, hardware: Hardware, match: re.Match[str]) -> Changed:
    return fill(recipe, [Decision("data.seq_len", int(match[1]), "")]), hardware


_CHANGES: tuple[tuple[str, Callable[[Recipe, Hardware, re.Match[str]], Changed]], ...] = (
    (r"add\s+(\d+)\s+(?:gpus?|cards?)", _add_devices),
    (r"nvlink", _nvlink),
    (r"ram\s*=\s*(.+)", _ram),
    (r"seq[-_ ]?len\s*=\s*(\d+)", _seq_len),
)
