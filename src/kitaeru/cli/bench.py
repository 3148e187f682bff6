"""`kitaeru bench`: what this machine was measured to do; `--calibrate` measures it, `--scaling` every way to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kitaeru.cli.text import console
from kitaeru.i18n import N_, tr
from kitaeru.plan.calibrate import DeviceProfile, Profile, own_profile, profile_path
from kitaeru.report.live import live_view
from kitaeru.report.prose import Prose


def run(
    recipes: Annotated[
        tuple[Path, ...],
        Parameter(help=N_("With --scaling: recipes to measure. Default: shapes, or on a CPU `bundled`.")),
    ] = (),
    *,
    scaling: Annotated[
        bool, Parameter(negative="", help=N_("Measure every way to use the devices of this machine, beside its plan."))
    ] = False,
    shapes: Annotated[
        str | None, Parameter(help=N_("Models with random weights: 8b, 13b, 34b, mixtral, by commas."))
    ] = None,
    only: Annotated[str | None, Parameter(help=N_("These strategies only, by commas."))] = None,
    devices: Annotated[int | None, Parameter(help=N_("So many devices. Default: all, or two processes."))] = None,
    cap_gib: Annotated[float | None, Parameter(help=N_("Use at most so many GiB of each device."))] = None,
    layers: Annotated[int | None, Parameter(help=N_("Cut shapes to so many layers."))] = None,
    batch: Annotated[int, Parameter(help=N_("Examples of a step, of the longest length, for shapes."))] = 64,
    steps: Annotated[int, Parameter(help=N_("Steps of each run; the first three are not counted."))] = 8,
    seconds: Annotated[float, Parameter(help=N_("The most that one run may take."))] = 600.0,
    work: Annotated[Path, Parameter(help=N_("Where models and runs go."))] = Path("runs/scaling"),
    calibrate: Annotated[
        bool, Parameter(negative="", help=tr("Measure this machine; the planner then takes what was measured."))
    ] = False,
    quick: Annotated[bool, Parameter(negative="", help=tr("In some twenty seconds instead of two minutes."))] = False,
    alone: Annotated[bool, Parameter(negative="", help=tr("Leave out what joins the devices."))] = False,
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help=tr("The profile's file; with --scaling the table's (scaling.csv).")),
    ] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="", help=tr("Print the profile as JSON."))] = False,
) -> int:
    """Show the profile of this machine, after measuring it if asked to; or measure ways to train."""
    if scaling:
        from kitaeru.cli.scaling import Wanted, measure_ways

        wanted = Wanted(recipes, _words(shapes), _words(only), devices, cap_gib, layers, batch, steps, seconds, work)
        return measure_ways(wanted, output or Path("scaling.csv"))
    path = output or profile_path()
    profile = _measure(path, quick=quick, links=not alone) if calibrate else _known(output)
    out = console()
    if json_:
        print(path.read_text(encoding="utf-8") if profile else json.dumps(None))
    elif profile is None:
        out.print(Prose(tr("This machine has not been measured; plans take their rates from a table of GPUs.")))
        out.print(Prose(tr("Measure it with `kitaeru bench --calibrate`.")))
    else:
        _show(out, profile, path)
    return 0


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _known(output: Path | None) -> Profile | None:
    return own_profile() if output is None else Profile.load(output)


def _measure(path: Path, *, quick: bool, links: bool) -> Profile:
    from kitaeru.machine.calibration import calibrate  # imports torch: seconds
    from kitaeru.machine.probe import probe

    with live_view(console(stderr=True)) as view:
        return calibrate(probe(), path, quick=quick, links=links, tell=view.phase)


def _show(out: Console, profile: Profile, path: Path) -> None:
    version = profile.torch.split("+")[0]
    text = tr("Measured on {date} with torch {version}: {path}", date=profile.date, version=version, path=path)
    out.print(Prose(text))
    for name, device in profile.devices.items():
        out.print()
        out.print(Prose(name, "bold"))
        out.print(Padding(_rates(device), (0, 0, 0, 2)))
    pairs = [(f"{a} ↔ {b}", f"{rate:,.1f} GB/s") for (a, b), rate in profile.links.items()]
    pairs += [
        (tr("sum over {count} devices", count=name.partition("-")[2]), f"{rate:,.1f} GB/s")
        for name, rate in profile.rings.items()
    ]
    if pairs:
        out.print()
        out.print(Padding(_grid(pairs), (0, 0, 0, 2)))


def _rates(device: DeviceProfile) -> Table:
    rows: list[tuple[str, str]] = []
    for kind, table in device.products.items():
        low, high = min(table.values()), max(table.values())
        span = f"{low:,.3g}–{high:,.3g}" if low != high else f"{high:,.3g}"
        rows.append((tr("products in {kind}", kind=kind), f"{span} TFLOP/s"))
    for length, rate in device.attention_forward.items():
        both = f"{rate:,.3g} / {device.attention_backward.get(length, 0):,.3g} TFLOP/s"
        rows.append((tr("attention over {length} tokens, forward / backward", length=int(length[0])), both))
    traffic = {
        tr("memory, one large kernel"): device.stream_gb_s,
        tr("memory, small kernels"): device.eager_gb_s,
        tr("unpacking of 4-bit weights"): device.dequantise_gb_s,
        tr("copies from and to RAM, alone"): device.host_copy_alone_gb_s,
        tr("copies from and to RAM, all devices at once"): device.host_copy_gb_s,
        tr("RAM under an optimizer"): device.host_memory_gb_s,
    }
    rows += [(what, f"{rate:,.4g} GB/s") for what, rate in traffic.items() if rate]
    rows.append((tr("one operation of a model, on the host"), f"{1e6 * device.operation_seconds:,.3g} µs"))
    if device.clocks.get("hot_mhz"):
        hot = {key.removeprefix("hot_"): value for key, value in device.clocks.items() if key.startswith("hot_")}
        rows.append((tr("clock under load"), "{mhz:.0f} MHz, {degrees:.0f} °C, {watts:.0f} W".format(**hot)))
    return _grid(rows)


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(justify="right", no_wrap=True)
    for what, rate in rows:
        grid.add_row(Prose(what), Text(rate))
    return grid
