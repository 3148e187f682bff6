"""Checks that stop a run before it wastes hours: a wrong number is worse than a crash."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from kitaeru.errors import TrainingError
from kitaeru.i18n import tr
from kitaeru.parallel.world import World
from kitaeru.recipe.types import TrainSection

SPIKE_WINDOW = 50


def gradient_gate(
    named: Sequence[tuple[str, nn.Parameter]],
    step: int,
    world: World | None = None,
    names: Sequence[str] = (),
    alive: Collection[str] | None = None,
) -> list[str]:
    """Every trained tensor must receive a gradient that is not all zero, or it learns nothing.

    A LoRA A whose B is still zero has no gradient yet, by its definition: it is looked at once B has moved. Experts of
    a mixture may see no token in one batch: their names are returned, for a notice. Of a tensor in pieces, one that has
    a gradient is enough. `names` are all that are trained, where ranks hold different ones. `alive`: those that this
    rank has seen to be well, where their gradients are gone.

    Raises:
        TrainingError: names the tensors that learn nothing.
    """
    names = names or [name for name, _ in named]
    if alive is None:
        alive = {name for name, parameter in named if _lives(parameter.grad)} | waiting(named)
    found = [name in alive for name in names]
    counts = (world or World()).sum(torch.tensor(found, dtype=torch.int64)).tolist()
    silent = [name for name, count in zip(names, counts, strict=True) if not count]
    experts = [name for name in silent if "expert" in name]
    dead = [name for name in silent if name not in experts]
    if dead:
        shown = ", ".join(dead[:5]) + (" …" if len(dead) > 5 else "")
        raise TrainingError(
            tr(
                "{count} of {total} trained tensors got no gradient: {names}",
                count=len(dead),
                total=len(names),
                names=shown,
            ),
            where=tr("step {step}", step=step + 1),
            remedy=tr(
                "They would never learn. Check `lora.targets` and that the model is supported; nothing is saved."
            ),
        )
    return experts


def _lives(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and (bool(gradient.reshape(-1)[:4096].any()) or bool(gradient.any()))


def waiting(named: Sequence[tuple[str, nn.Parameter]]) -> set[str]:
    """Each A of LoRA whose B is still zero."""
    weights = dict(named)
    return {name for name in weights if _waits_for_b(name, weights)}


def _waits_for_b(name: str, weights: dict[str, nn.Parameter]) -> bool:
    partner = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
    return partner != name and partner in weights and not bool(weights[partner].detach().any())


@dataclass
class LossWatch:
    """Looks at each step's loss before the weights are changed. `recent` holds the last good losses."""

    section: TrainSection
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def verdict(self, loss: float) -> str:
        """ "ok", "nan" or "spike". Good losses, and spikes that are only spoken of, join the window."""
        found = self._judged(loss)
        if self.allows(loss):
            self.recent.append(loss)
        return found

    def allows(self, loss: float) -> bool:
        """Whether weights may change by a step with this loss."""
        found = self._judged(loss)
        return found == "ok" or (found == "spike" and self.section.on_spike == "ignore")

    def _judged(self, loss: float) -> str:
        if not math.isfinite(loss):
            return "nan"
        spike = len(self.recent) >= 10 and loss > self.section.spike_factor * statistics.median(self.recent)
        return "spike" if spike else "ok"

    def restore(self, losses: Iterable[float]) -> None:
        """Go on from a checkpoint."""
        self.recent = deque(losses, maxlen=SPIKE_WINDOW)
