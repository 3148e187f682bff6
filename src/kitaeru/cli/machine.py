"""The machine a command line speaks of: this one, one in words, or one from a file. Without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kitaeru.hardware import Hardware, parse_gpus, parse_size
from kitaeru.i18n import N_
from kitaeru.plan.what_if import FREE_SHARE

GpusOption = Annotated[
    str | None,
    Parameter(help=N_('Another machine: "2x RTX A5000, nvlink", or a JSON file saved there. Default: this one.')),
]
RamOption = Annotated[str | None, Parameter(help=N_("RAM of that machine, for example 128GB."))]


def machine(gpus: str | None, ram: str | None) -> Hardware:
    """The machine meant.

    Raises:
        UsageError: a card that is not in the table, a file that is no machine's description, a size that is none.
    """
    if gpus is None:
        from kitaeru.machine.probe import probe

        found = probe()
    elif gpus.endswith(".json") or Path(gpus).is_file():
        found = replace(Hardware.load(Path(gpus)), described=True)
    else:
        return parse_gpus(gpus, ram)
    if ram is None:
        return found
    size = parse_size(ram)
    return replace(found, host_ram_bytes=size, host_free_bytes=int(size * FREE_SHARE), described=True)
