"""`kitaeru launch --on slurm RECIPE`: the job file of a scheduler, from the plan. Without torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kitaeru.cli.machine import GpusOption, RamOption, machine
from kitaeru.cli.text import console
from kitaeru.errors import UsageError
from kitaeru.files import write_atomic
from kitaeru.hardware import united
from kitaeru.i18n import N_, tr
from kitaeru.plan.choose import make_plan
from kitaeru.plan.jobfile import job_of, write_job
from kitaeru.recipe.read import read
from kitaeru.shape import find_shape


def run(
    recipe: Annotated[Path, Parameter(help=N_("A recipe (.yaml)."))],
    *,
    on: Annotated[str, Parameter(help=N_("slurm, kubernetes (Kubeflow Trainer) or skypilot."))],
    nodes: Annotated[int, Parameter(help=N_("Hosts."))] = 1,
    gpus: GpusOption = None,
    ram: RamOption = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", help=N_("Override one value of the recipe: a.b=c. Repeatable."))
    ] = None,
    time: Annotated[str, Parameter(help=N_("Slurm: the time limit."))] = "24:00:00",
    partition: Annotated[str | None, Parameter(help=N_("Slurm: the partition."))] = None,
    image: Annotated[str, Parameter(help=N_("Kubernetes: the image of the container."))] = "kitaeru:cuda",
    volume: Annotated[
        str, Parameter(help=N_("Kubernetes: the volume claim with recipe, data and runs."))
    ] = "kitaeru-work",
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help=N_("Write to this file instead of the screen."))
    ] = None,
) -> int:
    """Plan for the hosts (`--gpus` and `--ram` describe one of them) and write the job."""
    if recipe.suffix not in (".yaml", ".yml"):
        raise UsageError(tr("{path} is not a recipe.", path=recipe), remedy=tr("Write one: kitaeru plan MODEL -o FILE"))
    overrides = set_ or []
    wish = read(recipe, overrides=overrides).recipe
    one = machine(gpus, ram)
    hardware = united([one] * nodes) if nodes > 1 else one
    if nodes > 1 and wish.limits.devices is None:
        size = len(hardware.devices) or nodes
        wish = wish.model_copy(update={"limits": wish.limits.model_copy(update={"devices": size})})
    plan = make_plan(wish, hardware, find_shape(wish.model.name))
    job = job_of(
        plan, recipe, hardware, time_limit=time, partition=partition, image=image, volume=volume,
        own=tuple(word for each in overrides for word in ("--set", each)),
    )  # fmt: skip
    text = write_job(on, job)
    if output is None:
        sys.stdout.write(text)
        return 0
    write_atomic(output, text)
    console().print(tr("Written: {path}", path=output), soft_wrap=True)
    return 0
