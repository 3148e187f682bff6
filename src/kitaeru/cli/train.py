"""`kitaeru train`: plan, then train; `--resume` goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from kitaeru.cli import ranks
from kitaeru.errors import UsageError
from kitaeru.i18n import tr
from kitaeru.recipe.read import Effective, read
from kitaeru.report.closing import print_samples, print_summary
from kitaeru.report.live import View, live_view
from kitaeru.report.page import write_page
from kitaeru.report.trackers import trackers

if TYPE_CHECKING:
    from kitaeru.engine.run import Run


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
) -> int:
    """Train and return the exit code."""
    effective = _recipe(target, data or [], valid or [], method, output, set_ or [], resume)
    return train(effective, resume=resume, plain=plain)


def train(effective: Effective, *, resume: bool = False, plain: bool = False) -> int:
    """Plan and train an effective recipe with everything a person sees around it."""
    # Fragmentation is what makes a plan that fits run out of memory; must be set before CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from kitaeru.engine import run as engine  # imports torch: seconds
    from kitaeru.engine.place import placed

    console = Console(highlight=False)
    place = placed()
    if place is not None:
        result = ranks.join(effective.recipe, place, resume=resume, plain=plain)
        if result is not None and place.rank == 0:
            _closing(console, result.folder)
        return 0 if result is not None else 1
    with live_view(console, plain=plain or None) as view:
        view.phase(tr("Starting"), 0, 0)
        prepared = engine.prepare(effective.recipe, resume=resume, phase=view.phase)
        view.show_plan(prepared.plan)
        if prepared.plan.layout.devices == 1:
            _here(prepared, view, console)
    if prepared.plan.layout.devices > 1:
        try:
            ranks.start(prepared, resume=resume, plain=plain)
        finally:
            _page(prepared.folder, console)
    _closing(console, prepared.folder, page=False)
    return 0


def _here(prepared: Run, view: View, console: Console) -> None:
    """Train in this process."""
    from kitaeru.engine import run as engine

    wish = prepared.wish.model_dump(mode="json")
    followers = trackers(prepared.plan.recipe.track, prepared.folder, wish, notify=view)
    try:
        engine.train(prepared, [view, *followers], view.phase)
    finally:
        for follower in followers:
            follower.close()
        _page(prepared.folder, console)


def _closing(console: Console, folder: Path, *, page: bool = True) -> None:
    """What is shown of a finished run."""
    if page:
        _page(folder, console)
    print_samples(console, folder)
    print_summary(console, folder)


def _page(folder: Path, console: Console) -> None:
    """The report is written whatever happened; a fault in it must not hide what happened."""
    if not (folder / "events.jsonl").exists():
        return
    try:
        write_page(folder)
    except Exception as error:
        text = tr("The report page could not be written: {error}", error=f"{type(error).__name__}: {error}")
        console.print(text, style="yellow", markup=False)


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
