"""What a run must remember: saved as checkpoints, put back from them, and the weights of the best validation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitaeru.data.batches import Sampler
from kitaeru.data.corpus import Corpus
from kitaeru.engine import checkpoint
from kitaeru.engine.build import Trainee
from kitaeru.engine.gates import LossWatch
from kitaeru.engine.optim import load_optimizer_state, optimizer_state
from kitaeru.errors import CheckpointError
from kitaeru.events import Saved
from kitaeru.i18n import tr


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

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self.run / "checkpoints"

    def save(self) -> None:
        """Write a checkpoint of this step, verified, and prune old ones."""
        self.world.pulse.waiting()
        started, trainee, step = time.perf_counter(), self.trainee, self.progress.step
        moments, scalars = optimizer_state(trainee.optimizer, trainee.named)
        pieces = {f"model/{name}": p.detach() for name, p in trainee.named}
        pieces |= {f"optimizer/{name}": value for name, value in moments.items()}
        whole = {key: trainee.strategy.gather(trainee.held, _parameter(key), p) for key, p in pieces.items()}
        tensors = self.world.united(whole)
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
        if self.world.main:
            self.world.pulse.free()  # the others go on, and wait in the next step
            path = checkpoint.save(self.folder, step, tensors, meta)
            protected = {self.progress.best_step} if self.section.keep_best and self.progress.best_step else set()
            checkpoint.prune(self.folder, self.section.keep_checkpoints, protect=protected)
            size, seconds = checkpoint.size_bytes(path), time.perf_counter() - started
            trainee.emit(Saved(step=step, path=str(path), bytes=size, seconds=seconds))

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint: weights, optimizer, schedule, sampler, scaler, best loss.

        Raises:
            CheckpointError: it is damaged, or belongs to another recipe or data set.
        """
        tensors, meta = checkpoint.load(path) if self.world.main else ({}, {})
        meta = self.world.said(meta)
        checkpoint.compare(meta["fingerprints"], self.fingerprints)
        pieces = self._pieces(tensors)
        self._put_weights(pieces)
        moments = {k.removeprefix("optimizer/"): v for k, v in pieces.items() if k.startswith("optimizer/")}
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
        best = self.progress.best_step
        if not self.section.keep_best or self.valid is None or best in (0, self.progress.step):
            return self.progress.step
        found = [p for p in checkpoint.available(self.folder) if checkpoint.step_of(p) == best]
        path = self.world.said(found[0] if found else None)
        if path is None:
            return self.progress.step
        self._put_weights(self._pieces(checkpoint.load(path)[0] if self.world.main else {}))
        return best

    def _pieces(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's pieces of a checkpoint that the main process has read."""
        trainee = self.trainee
        return {
            key: trainee.strategy.scatter(trainee.held, _parameter(key), tensor)
            for key, tensor in self.world.each(tensors)
            if not self._elsewhere(_parameter(key))
        }

    def _elsewhere(self, name: str) -> bool:
        """Whether a parameter is trained on other ranks only."""
        return name in self._all and name not in self._mine

    def _put_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        missing = [name for name, _ in self.trainee.named if f"model/{name}" not in tensors]
        if missing:
            raise CheckpointError(tr("The checkpoint has no weights for {name}.", name=missing[0]))
        with torch.no_grad():
            for name, parameter in self.trainee.named:
                parameter.copy_(tensors[f"model/{name}"])


def _parameter(key: str) -> str:
    """The parameter that a tensor of a checkpoint belongs to: "model/NAME" and "optimizer/NAME/KEY"."""
    kind, _, rest = key.partition("/")
    return rest if kind == "model" else rest.rpartition("/")[0]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
