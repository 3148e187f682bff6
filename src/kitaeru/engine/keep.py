"""What a run must remember: saved as checkpoints, put back from them, and the weights of the best validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kitaeru.data.batches import Sampler
from kitaeru.data.corpus import Corpus
from kitaeru.engine import checkpoint
from kitaeru.engine.background import Background
from kitaeru.engine.build import Trainee
from kitaeru.engine.gates import LossWatch
from kitaeru.engine.optim import load_optimizer_state, optimizer_state
from kitaeru.errors import CheckpointError
from kitaeru.events import Saved
from kitaeru.i18n import tr
from kitaeru.machine.probe import host_memory

# What takes longer to write than training should wait.
BACKGROUND_BYTES = 256 << 20


@dataclass
class Progress:
    """Where training stands. `step` counts finished optimizer steps; `best_step` is 0 until a validation."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    since_best: int = 0


class Kept:
    """A `Trainee` on a corpus, with all the state that a resumed run needs."""

    def __init__(
        self, trainee: Trainee, train: Corpus, valid: Corpus | None, run: Path, fingerprints: dict[str, Any]
    ) -> None:
        recipe = trainee.plan.recipe
        self.trainee, self.train, self.valid, self.run = trainee, train, valid, run
        self.world = trainee.world
        self.section = recipe.train
        self.fingerprints = fingerprints
        self.sampler = Sampler(
            train,
            seed=self.section.seed,
            global_batch_tokens=self.section.global_batch_tokens,
            global_batch_examples=self.section.global_batch_examples,
        )
        self.progress = Progress()
        self.watch = LossWatch(self.section)
        self._all, self._mine = set(trainee.names), {name for name, _ in trainee.named}
        self._writing: Background[Saved | None] = Background()

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self.run / "checkpoints"

    def save(self) -> None:
        """Write a checkpoint of this step, verified, and prune old ones. A large one is copied into RAM and written
        while training goes on; `settle` tells how that went.

        Raises:
            CheckpointError: this or the one before cannot be written; the earlier ones are whole.
        """
        self.settle(wait=True)
        self.world.pulse.waiting()
        started, trainee, step = time.perf_counter(), self.trainee, self.progress.step
        moments, scalars = optimizer_state(trainee.optimizer, trainee.named, copy=False)
        mine = {f"model/{name}": p.detach() for name, p in trainee.named}
        mine |= {f"optimizer/{name}": value for name, value in moments.items()}
        scalars["values"] = {n: value for each in self.world.each_of(scalars["values"]) for n, value in each.items()}
        meta = {
            "step": step,
            "sampler": self.sampler.state_dict(),
            "optimizer": scalars,
            "scaler": trainee.scaler.state_dict(),
            "random": {"seed": self.section.seed, "step": step},
            "progress": vars(self.progress) | {"best_loss": _or_none(self.progress.best_loss)},
            "recent_losses": list(self.watch.recent),
            "fingerprints": self.fingerprints,
        }
        tensors, temporary, complete = self._ready(mine, step, meta)
        if temporary is None:
            return
        behind = self._has_room_for_a_copy(tensors)
        if behind:
            live = {tensor.data_ptr() for tensor in mine.values()}
            tensors = {
                key: tensor.to("cpu", copy=True) if tensor.is_cuda or tensor.data_ptr() in live else tensor
                for key, tensor in tensors.items()
            }
        protected = {self.progress.best_step} if self.section.keep_best and self.progress.best_step else set()

        def write() -> Saved | None:
            checkpoint.write_part(temporary, self.world.rank, tensors)
            if complete is None:
                return None
            path = complete()
            checkpoint.prune(self.folder, self.section.keep_checkpoints, protect=protected)
            size, seconds = checkpoint.size_bytes(path), time.perf_counter() - started
            return Saved(step=step, path=str(path), bytes=size, seconds=seconds)

        self.world.pulse.free()  # the others go on, and wait in the next step
        self._writing.start(write)
        self.settle(wait=not behind)

    def _has_room_for_a_copy(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether what this process writes takes so long that it should not be waited for, and the machine's RAM can
        hold a copy of it, and of as much in each process beside this one.
        """
        size = checkpoint.room_bytes(tensors)
        return size >= BACKGROUND_BYTES and 2 * size * self.world.size < host_memory()[1]

    def settle(self, *, wait: bool) -> None:
        """Take in what is written in the background: done (with `wait` when it is), it is told.

        Raises:
            CheckpointError: it cannot be written; the earlier checkpoints are whole.
        """
        saved = self._writing.done(wait=wait)
        if saved is not None:
            self.trainee.emit(saved)

    def _ready(
        self, mine: dict[str, torch.Tensor], step: int, meta: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], Path | None, Callable[[], Path] | None]:
        """What this process writes of a checkpoint, where it does (None: nothing), and on the main one
        what completes it. Who has rows of parameters writes these; where not all see the same disk, the main one writes
        everything.
        """
        world, rows = self.world, self.trainee.held.rows
        cut = world.any(bool(rows))
        tensors = self._rows(mine) if cut else self._whole(mine)
        needed = sum(world.numbers([checkpoint.room_bytes(tensors)]))
        draft = checkpoint.begin(self.folder, step, needed, meta) if world.main else None
        temporary, parts = None if draft is None else draft.temporary, 1
        if cut:
            place = world.said(temporary)
            assert place is not None
            if world.any(not place.is_dir()):
                tensors = self._whole(mine)
            else:
                temporary, parts = place if rows else None, sum(world.numbers([bool(rows)]))
        return tensors, temporary, None if draft is None else partial(draft.complete, parts)

    def _rows(self, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's rows; on the main process also what is whole on every rank."""
        found, weights = {}, dict(self.trainee.named)
        for key, tensor in mine.items():
            name = _parameter(key)
            rows = self.trainee.held.rows.get(name)
            if rows is None or tensor.shape != weights[name].shape or len(rows.shape) != tensor.ndim:
                if self.world.main:
                    found[key] = tensor
            elif len(tensor):
                found[f"{key}{checkpoint.ROW}{rows.first}"] = tensor
        return found

    def _whole(self, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the main process everything, whole, on the CPU; nothing on the others."""
        trainee = self.trainee
        whole = {key: trainee.strategy.gather(trainee.held, _parameter(key), tensor) for key, tensor in mine.items()}
        found = self.world.united(whole)
        return found if self.world.main else {}

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, schedule, sampler, scaler, best loss.

        Raises:
            CheckpointError: it is damaged, or belongs to another recipe or data set.
        """
        tensors, meta = checkpoint.load(path) if self.world.main else ({}, {})
        meta = self.world.said(meta)
        checkpoint.compare(meta["fingerprints"], self.fingerprints)
        moments = self._put_weights(tensors)
        scalars = meta["optimizer"]
        mine = {name: value for name, value in scalars["values"].items() if not self._elsewhere(name)}
        load_optimizer_state(self.trainee.optimizer, self.trainee.named, moments, {**scalars, "values": mine})
        self.trainee.scaler.load_state_dict(meta["scaler"])
        self.sampler.load_state_dict(meta["sampler"])
        stored = meta["progress"]
        self.progress = Progress(
            **{**stored, "best_loss": math.inf if stored["best_loss"] is None else stored["best_loss"]}
        )
        self.watch.restore(meta["recent_losses"])

    def take_best(self) -> int:
        """Put the weights of the best validation back; the step they are of."""
        self.settle(wait=True)
        best = self.progress.best_step
        if not self.section.keep_best or self.valid is None or best in (0, self.progress.step):
            return self.progress.step
        found = [p for p in checkpoint.available(self.folder) if checkpoint.step_of(p) == best]
        path = self.world.said(found[0] if found else None)
        if path is None:
            return self.progress.step
        self._put_weights(checkpoint.load(path)[0] if self.world.main else {}, moments=False)
        return best

    def _pieces(self, tensors: Mapping[str, torch.Tensor], *, moments: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's pieces of a checkpoint that the main process has read, one at a time."""
        trainee = self.trainee
        for key, tensor in self.world.each(tensors):
            name = _parameter(key)
            if not self._elsewhere(name) and (moments or key.startswith("model/")):
                yield key, trainee.strategy.scatter(trainee.held, name, tensor)

    def _elsewhere(self, name: str) -> bool:
        """Whether a parameter is trained on other ranks only."""
        return name in self._all and name not in self._mine

    def _put_weights(self, tensors: Mapping[str, torch.Tensor], *, moments: bool = True) -> dict[str, torch.Tensor]:
        """Take a checkpoint's weights over, one at a time; the optimizer's tensors by "PARAMETER/KEY"."""
        weights, found = dict(self.trainee.named), {}
        with torch.no_grad():
            for key, piece in self._pieces(tensors, moments=moments):
                kind, _, name = key.partition("/")
                if kind == "optimizer":
                    found[name] = piece
                elif name in weights:
                    weights.pop(name).copy_(piece)
        if weights:
            raise CheckpointError(tr("The checkpoint has no weights for {name}.", name=next(iter(weights))))
        return found


def _parameter(key: str) -> str:
    """The parameter that a tensor of a checkpoint belongs to: "model/NAME" and "optimizer/NAME/KEY"."""
    kind, _, rest = key.partition("/")
    return rest if kind == "model" else rest.rpartition("/")[0]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
