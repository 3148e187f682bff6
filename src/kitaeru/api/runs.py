"""Plan and train with everything a person sees around it: what `kitaeru train` and the trainers both do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kitaeru.api import ranks
from kitaeru.api.ranks import SHOWN, Show
from kitaeru.engine.place import Nodes, nodes_of_slurm, placed
from kitaeru.errors import UsageError
from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.recipe.types import Recipe
from kitaeru.report.live import live_view
from kitaeru.report.page import write_page
from kitaeru.report.trackers import trackers

if TYPE_CHECKING:
    from kitaeru.engine.run import Run
    from kitaeru.report.live import View


def train(wish: Recipe, *, resume: bool = False, show: Show = SHOWN, nodes: Nodes | None = None) -> Path | None:
    """Plan and train `wish` on as many processes as its plan says; the run's folder.

    Alone, this process trains or starts those that do. Started by torchrun, accelerate or srun it is one of them: then
    the main one plans and shows, and the others get None when it could not begin. With `nodes`, or one process of
    srun on each host, it is one of several that each start the processes of their host.

    Raises:
        KitaeruError: planning or training cannot go on; Interrupted when a person stopped it, after saving.
    """
    # Fragmentation is what makes a plan that fits run out of memory; must be set before CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that goes away is told in our own words
    from kitaeru.engine.hosts import Leader  # imports torch: seconds
    from kitaeru.engine.run import prepare

    console = Console(highlight=False)
    place = placed() if nodes is None else None
    if place is None:
        nodes = nodes or nodes_of_slurm()
    if nodes is not None:
        return _on_hosts(wish, nodes, resume=resume, show=show)
    if place is not None:
        _refuse_a_group()
        result = ranks.join(wish, place, resume=resume, show=show)
        if result is not None and place.rank == 0:
            page(result.folder, console)
        return None if result is None else result.folder
    with live_view(console, show.plain or None, show.every) as view:
        view.phase(tr("Starting"), 0, 0)
        prepared = prepare(wish, resume=resume, phase=view.phase)
        view.show_plan(prepared.plan)
        if prepared.plan.layout.processes == 1:
            _here(prepared, view, console)
    if prepared.plan.layout.processes > 1:
        try:
            with Leader(Nodes(), Hardware.from_dict(prepared.plan.hardware), console.print) as leader:
                ranks.start(prepared, leader, resume=resume, show=show)
        finally:
            page(prepared.folder, console)
    return prepared.folder


def _on_hosts(wish: Recipe, nodes: Nodes, *, resume: bool, show: Show) -> Path:
    """Train as one of several hosts, each of which has started this program once; the run's folder.

    Raises:
        KitaeruError: as `train`.
    """
    from kitaeru.engine.hosts import Leader, Member
    from kitaeru.engine.run import prepare
    from kitaeru.machine.probe import probe

    console = Console(highlight=False)
    if nodes.number:
        with Member(nodes, probe(), console.print) as member:
            return ranks.help_out(member, show=show)
    with Leader(nodes, probe(), console.print) as leader:
        hardware = leader.hardware()
        size = wish.limits.devices or len(hardware.devices) or nodes.count
        with live_view(console, show.plain or None, show.every) as view:
            prepared = prepare(ranks.for_size(wish, size), resume=resume, phase=view.phase, hardware=hardware)
            view.show_plan(prepared.plan)
        try:
            ranks.start(prepared, leader, resume=resume, show=show)
        finally:
            page(prepared.folder, console)
    return prepared.folder


def _refuse_a_group() -> None:
    """A process group is made when it is known what the processes will do together.

    Raises:
        UsageError: the script has made one already.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        raise UsageError(
            tr("This process is in a process group already."),
            remedy=tr("Make no Accelerator and call no init_process_group before training: kitaeru makes the group."),
        )


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
        page(prepared.folder, console)


def page(folder: Path, console: Console) -> None:
    """Write the report; it is written whatever happened, and a fault in it must not hide what happened."""
    if not (folder / "events.jsonl").exists():
        return
    try:
        write_page(folder)
    except Exception as error:
        text = tr("The report page could not be written: {error}", error=f"{type(error).__name__}: {error}")
        console.print(text, style="yellow", markup=False)
