"""`kitaeru export`: a run's adapter, or base and adapter merged."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from kitaeru.i18n import tr
from kitaeru.report.wording import bytes_text


def run(
    folder: Annotated[Path, Parameter(name="run", help=tr("The run folder, for example runs/NAME."))],
    *,
    to: Annotated[
        Literal["adapter", "merged"],
        Parameter(help=tr("adapter: PEFT's format, small. merged: a whole model that needs no PEFT.")),
    ] = "merged",
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help=tr("The folder to write. Default: in the run folder."))
    ] = None,
    into: Annotated[
        Literal["auto", "trained", "original"],
        Parameter(
            help=tr(
                "Of a base held in 4 or 8 bits: merge into the weights as they were trained on (auto), or into the "
                "original ones."
            )
        ),
    ] = "auto",
    json_: Annotated[bool, Parameter(name="--json", negative="", help=tr("Print JSON, for a program."))] = False,
) -> int:
    """Write it, open it again, compare its logits with the run's, and print where it lies."""
    from kitaeru.export.merge import export_adapter, export_merged  # imports torch: seconds

    console = Console(highlight=False)
    if to == "adapter":
        done = export_adapter(folder, output or folder / "export-adapter")
    else:
        if not json_:
            console.print(tr("Merging and comparing …"), style="dim")
        done = export_merged(folder, output or folder / "export-merged", into)
    if json_:
        print(json.dumps({**asdict(done), "folder": str(done.folder)}, ensure_ascii=False, indent=2))
        return 0
    size = bytes_text(done.weight_bytes)
    console.print(tr("{folder}: {size} of weights", folder=done.folder, size=size), markup=False)
    if to == "merged":
        apart = tr("Compared with base and adapter as trained: logits {apart:.2%} apart.", apart=done.apart)
        console.print(apart, markup=False)
    return 0
