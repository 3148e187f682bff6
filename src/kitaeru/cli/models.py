"""`kitaeru models`: the known models, and how each is best trained on a machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from kitaeru.cli.machine import GpusOption, RamOption, machine
from kitaeru.cli.text import console
from kitaeru.i18n import N_, tr
from kitaeru.plan.known import Known, models
from kitaeru.report.prose import Prose
from kitaeru.report.wording import bytes_text, count_text, round_two


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


def _json(row: Known) -> dict[str, Any]:
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


def _table(rows: list[Known]) -> Table:
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
