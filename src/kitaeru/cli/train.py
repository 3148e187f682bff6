"""`kitaeru train`: plan, then train; `--resume` goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from kitaeru.engine.place import nodes_given, nodes_of_slurm, placed
from kitaeru.errors import UsageError
from kitaeru.i18n import tr
from kitaeru.recipe.read import Effective, read
from kitaeru.report.closing import print_samples, print_summary


def run(
    target: Annotated[str, Parameter(help=tr("A recipe (.yaml), a run folder to resume, or a model with --data."))],
    *,
    data: Annotated[list[str] | None, Parameter(help=tr("What to train on, when the target is a model."))] = None,
    valid: Annotated[list[str] | None, Parameter(help=tr("What to validate on."))] = None,
    method: Annotated[str | None, Parameter(help=tr("auto, full, lora, qlora or pretrain."))] = None,
    output: Annotated[str | None, Parameter(help=tr("The run folder."))] = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", help=tr("Override one value of the recipe: a.b=c. Repeatable."))
    ] = None,
    resume: Annotated[bool, Parameter(negative="", help=tr("Go on from the newest good checkpoint."))] = False,
    plain: Annotated[bool, Parameter(negative="", help=tr("Plain lines instead of the live view."))] = False,
    nodes: Annotated[
        int | None, Parameter(help=tr("Train on so many hosts, with this command on each; srun needs no such words."))
    ] = None,
    node_rank: Annotated[int | None, Parameter(help=tr("Which host this is, from 0."))] = None,
    master: Annotated[str | None, Parameter(help=tr("HOST:PORT of the first host, where they meet."))] = None,
) -> int:
    """Train and return the exit code."""
    effective = _recipe(target, data or [], valid or [], method, output, set_ or [], resume)
    return train(effective, resume=resume, plain=plain, hosts=(nodes, node_rank, master))


def train(
    effective: Effective,
    *,
    resume: bool = False,
    plain: bool = False,
    hosts: tuple[int | None, int | None, str | None] = (None, None, None),
) -> int:
    """Plan and train an effective recipe with everything a person sees around it."""
    from kitaeru.api import runs  # not for `kitaeru train --help`
    from kitaeru.api.ranks import Show

    nodes = nodes_given(*hosts) or nodes_of_slurm()
    folder = runs.train(effective.recipe, resume=resume, show=Show(plain), nodes=nodes)
    if folder is None:
        return 1
    place = placed()
    if nodes.number == 0 if nodes else place is None or place.rank == 0:
        console = Console(highlight=False)
        print_samples(console, folder)
        print_summary(console, folder)
    return 0


def _recipe(
    target: str,
    data: list[str],
    valid: list[str],
    method: str | None,
    output: str | None,
    overrides: list[str],
    resume: bool,
) -> Effective:
    path = Path(target)
    values: dict[str, Any] = {}
    if method is not None:
        values["method"] = method
    if output is not None:
        values["output"] = output
    if data:
        values["data.train"] = data
    if valid:
        values["data.valid"] = valid
    if path.is_dir() and (path / "recipe.yaml").exists() and (path / "plan.json").exists():
        if not resume:
            raise UsageError(tr("{folder} is a run.", folder=target), remedy=tr("To go on with it, add --resume."))
        return read(path / "recipe.yaml", overrides=overrides, values=values)
    if path.suffix in (".yaml", ".yml"):
        return read(path, overrides=overrides, values=values)
    if not data:
        raise UsageError(
            tr("{target} is not a recipe; a model needs data.", target=target),
            remedy=tr("kitaeru train {target} --data my.jsonl, or write a recipe (.yaml).", target=target),
        )
    return read(None, overrides=overrides, values={"model": target, **values})
