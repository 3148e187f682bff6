"""`kitaeru models`: the known models, and how each is best trained on a machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from kitaeru.cli.machine import GpusOption, RamOption, machine
from kitaeru.cli.plan_view import round_two
from kitaeru.cli.text import console
from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, tr
from kitaeru.plan.choose import survey
from kitaeru.plan.types import Candidate
from kitaeru.recipe.read import read
from kitaeru.report.prose import Prose
from kitaeru.report.wording import bytes_text, count_text
from kitaeru.shape import ModelShape, catalogue

MILLION = 10**6


@dataclass(frozen=True)
class Row:
    """A model and its best way; None where it cannot be trained on this machine."""

    name: str
    parameters: int
    best: Candidate | None

    @property
    def hours_per_million_tokens(self) -> float | None:
        """How long a million tokens take."""
        if self.best is None or self.best.speed is None:
            return None
        return MILLION / self.best.speed.tokens_per_second / 3600


def run(
    *,
    gpus: GpusOption = None,
    ram: RamOption = None,
    seq_len: Annotated[int | None, Parameter(help=N_("The longest example in tokens."))] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="", help=N_("Print JSON, for a program."))] = False,
) -> int:
    """Plan every known model and print a line each."""
    hardware = machine(gpus, ram)
    rows = list(models(hardware, seq_len))
    if json_:
        print(json.dumps({"hardware": hardware.to_dict(), "models": [_json(row) for row in rows]}, ensure_ascii=False,
                         indent=2))  # fmt: skip
        return 0
    out = console()
    out.print(Prose(hardware.summary(), "dim"))
    out.print()
    out.print(_table(rows))
    out.print()
    note = tr("Hours are for a million tokens. A star marks a way that is not built yet; a dash, what does not fit.")
    out.print(Prose(note, "dim"))
    return 0


def models(hardware: Hardware, seq_len: int | None = None) -> Iterator[Row]:
    """Every model of the catalogue with its best way: the one that would be chosen, else the fastest not built yet."""
    for entry in catalogue():
        shape = ModelShape.from_config(entry.config, entry.name)
        recipe = read(None, values={"model": entry.name, "data.train": ["-"], "data.seq_len": seq_len}).recipe
        try:
            found = survey(recipe, hardware, shape)
        except PlanError:
            yield Row(entry.name, shape.parameters(), None)
            continue
        fitting = [c for c in found.candidates if c.fits]
        yield Row(entry.name, shape.parameters(), found.plan.chosen if found.plan else fitting[0])


def _json(row: Row) -> dict[str, Any]:
    best = row.best
    found: dict[str, Any] = {"model": row.name, "parameters": row.parameters, "fits": best is not None}
    if best is None or best.speed is None:
        return found
    return found | {
        "name": best.layout.name,
        "method": best.layout.method,
        "strategy": best.layout.strategy,
        "built": best.built,
        "peak_bytes": list(best.device_peaks),
        "tokens_per_second": best.speed.tokens_per_second,
        "tokens_per_second_low": best.speed.low,
        "tokens_per_second_high": best.speed.high,
        "hours_per_million_tokens": row.hours_per_million_tokens,
    }


def _table(rows: list[Row]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold", ratio=1)
    grid.add_column(overflow="fold", max_width=23)
    for _ in range(3):
        grid.add_column(justify="right", no_wrap=True)
    titles = (tr("model"), tr("way"), tr("memory"), tr("tokens/s"), tr("hours"))
    grid.add_row(*(Text(title, "bold") for title in titles))
    for row in rows:
        best, hours = row.best, row.hours_per_million_tokens
        if best is None or best.speed is None or hours is None:
            grid.add_row(Text(row.name, "dim"), Text("—", "dim"))
            continue
        way = f"{best.layout.method}, {best.layout.way}" + ("" if best.built else " *")
        rate, size = count_text(round_two(best.speed.tokens_per_second)), bytes_text(max(best.device_peaks))
        grid.add_row(*(Text(cell) for cell in (row.name, way, size, rate, f"{hours:.2f}")))
    return grid
