"""`kitaeru quickstart`: the bundled model on the bundled instructions, as `make quickstart` runs it."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import kitaeru
from kitaeru.cli.train import train
from kitaeru.i18n import tr
from kitaeru.recipe.read import read

RECIPE = Path(kitaeru.__file__).parent / "assets" / "quickstart" / "recipe.yaml"


def run(
    *,
    output: Annotated[
        str | None, Parameter(help=tr("The run folder. Default: the first free runs/quickstart-N."))
    ] = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", help=tr("Override one value of the recipe: a.b=c. Repeatable."))
    ] = None,
    plain: Annotated[bool, Parameter(negative="", help=tr("Plain lines instead of the live view."))] = False,
) -> int:
    """Fine-tune the bundled Japanese model on the bundled instructions with LoRA: no GPU, no network, a few minutes."""
    folder = output or str(free_folder(Path("runs")))
    return train(read(RECIPE, overrides=set_ or [], values={"output": folder}), plain=plain)


def free_folder(parent: Path) -> Path:
    """The first of `parent`/quickstart-1, -2, … that does not exist yet; nothing is created."""
    return next(folder for n in count(1) if not (folder := parent / f"quickstart-{n}").exists())
