"""`kitaeru bench --scaling`: what every way to use the devices does, beside what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kitaeru.api.scaling import Bench, Row, Subject, measure, shape_subjects, subject_of, write_rows
from kitaeru.cli.text import console
from kitaeru.errors import UsageError
from kitaeru.i18n import tr
from kitaeru.machine.probe import probe
from kitaeru.recipe.read import read
from kitaeru.report.prose import Prose

# What is measured on a machine without a GPU, for want of anything larger.
BUNDLED = {
    "model": "bundled",
    "data.train": [str(Path(__file__).parent.parent / "assets" / "quickstart" / "train.jsonl")],
    "data.seq_len": 128,
    "data.max_examples": 200,
    "method": "lora",
    "train.global_batch_tokens": 1024,
    "limits.threads": 1,
}


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    recipes: tuple[Path, ...]
    shapes: tuple[str, ...]
    only: tuple[str, ...]
    devices: int | None
    cap_gib: float | None
    layers: int | None
    batch: int
    steps: int
    seconds: float
    work: Path


def measure_ways(wanted: Wanted, output: Path) -> int:
    """Measure, print a line for each way as it ends and a table at the end, and write the CSV; the exit code.

    Raises:
        UsageError: there is only one device.
    """
    hardware, out = probe(), console()
    devices = wanted.devices or len(hardware.devices) or 2
    if devices < 2:
        raise UsageError(
            tr("There is one device, and nothing to share."),
            remedy=tr("--devices 2 lets two processes share it: that shows the code, not its speed."),
        )
    bench = Bench(
        wanted.work.absolute(), wanted.steps, devices, wanted.only, wanted.cap_gib, wanted.layers, 2048, wanted.batch,
        wanted.seconds, not hardware.devices,
    )  # fmt: skip
    out.print(Prose(hardware.summary()))
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        out.print(Prose(line_of(row)))
        write_rows(output, rows, bench.cap_gib)

    for subject in _subjects(wanted, bench):
        measure(subject, hardware, bench, tell)
    out.print()
    out.print(table_of(rows))
    out.print(tr("Written: {path}", path=output), soft_wrap=True)
    return 0 if any(row.outcome == "ok" for row in rows) else 1


def _subjects(wanted: Wanted, bench: Bench) -> Iterator[Subject]:
    for recipe in wanted.recipes:
        yield subject_of(read(recipe).recipe, bench)
    shapes = wanted.shapes or (() if wanted.recipes or bench.on_cpu else ("8b", "13b", "34b", "mixtral"))
    for shape in shapes:
        yield from shape_subjects(shape, bench)
    if not shapes and not wanted.recipes:
        yield subject_of(read(None, values=BUNDLED).recipe, bench)


def line_of(row: Row) -> str:
    """A row in a line."""
    head = f"{row.subject} · {row.method} · {row.way} · {row.devices}"
    if row.outcome != "ok":
        return f"{head}: {row.outcome}"
    planned = tr("planned {rate}", rate=f"{row.predicted:,.0f}")
    unit = tr("tokens/s")
    return f"{head}: {row.tokens_per_second:,.0f} {unit} ({planned})"


def table_of(rows: Sequence[Row]) -> Table:
    """What was measured, with what was planned in brackets."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in (
        tr("way"),
        tr("tokens/s (planned)"),
        tr("over one"),
        tr("idle % (planned)"),
        tr("peak GiB (planned)"),
    ):
        table.add_column(title, justify="left" if title == tr("way") else "right")
    last = ""
    for row in rows:
        head = f"{row.subject} · {row.method}"
        if head != last:
            table.add_row(Text(head, "bold"))
            last = head
        if row.outcome != "ok":
            table.add_row(Text(f"  {row.way} · {row.devices}", "dim"), Text(_cut(row.outcome), "dim"))
            continue
        table.add_row(
            f"  {row.way} · {row.devices}",
            f"{row.tokens_per_second:,.0f} ({row.predicted:,.0f})",
            f"{row.scaling:.2f}×" if row.scaling else "—",
            f"{_percents(row.idle)} ({_percents(row.predicted_idle)})",
            f"{_sizes(row.peak_gib)} ({_sizes(row.predicted_gib)})",
        )
    return table


def _sizes(gib: Sequence[float]) -> str:
    """Each device's, or one for all where they are alike.

    >>> _sizes((1.0, 1.04)), _sizes((1.0, 2.5))
    ('1.0', '1.0/2.5')
    """
    texts = [f"{size:.1f}" for size in gib]
    return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def _percents(shares: Sequence[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)


def _cut(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
