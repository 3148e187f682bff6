"""`kitaeru quantize`: a copy of a model in 4 or 8 bits."""

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
    model: Annotated[str, Parameter(help=tr("A model folder, a Hub id, or `bundled`."))],
    *,
    to: Annotated[
        Literal["4bit", "8bit"], Parameter(help=tr("4bit: NF4 with double quantisation. 8bit: LLM.int8."))
    ] = "4bit",
    output: Annotated[Path, Parameter(name=("--output", "-o"), help=tr("The folder to write."))],
    json_: Annotated[bool, Parameter(name="--json", negative="", help=tr("Print JSON, for a program."))] = False,
) -> int:
    """Write it, open it again, compare, and print its size and how far its logits are from the original's."""
    from kitaeru.export.quantize import quantize  # imports torch: seconds
    from kitaeru.recipe.types import ModelSection

    console = Console(highlight=False)
    if not json_:
        console.print(tr("Loading {target} …", target=model), style="dim", markup=False)
    done = quantize(ModelSection(name=model), 4 if to == "4bit" else 8, output)
    if json_:
        print(json.dumps({**asdict(done), "folder": str(done.folder)}, ensure_ascii=False, indent=2))
        return 0
    size = bytes_text(done.weight_bytes)
    console.print(tr("{folder}: {size} of weights", folder=done.folder, size=size), markup=False)
    console.print(tr("Compared with the original: logits {apart:.2%} apart.", apart=done.apart), markup=False)
    return 0
