"""Ranks that hold the same weights must start from the same ones, and find that frozen ones stay as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from kitaeru.errors import TrainingError
from kitaeru.i18n import tr
from kitaeru.parallel.types import Named
from kitaeru.parallel.world import World


def same_start(model: nn.Module, named: Named, world: World, group: Any = None) -> None:
    """Give every rank of `group` (all, without one) the trained weights of its first; compare the frozen ones.

    Raises:
        TrainingError: they have loaded different ones.
    """
    for _, parameter in named:
        dist.broadcast(parameter.data, group=group, group_src=0)
    own = hash_frozen(model)
    first = torch.tensor([own])
    dist.broadcast(first, group=group, group_src=0)
    if world.any(own != int(first)):
        raise TrainingError(
            tr("The processes have loaded different weights of this model."),
            remedy=tr("Give every host the same files, or name one version: --set model.revision=COMMIT"),
        )


def hash_frozen(model: nn.Module) -> int:
    """A checksum of every weight that must not change: packed ones by their bytes, this rank's of those in pieces."""
    total = 0
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad or parameter.is_meta or parameter.numel() == 0:
            continue
        piece = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if piece.numel() == 0:
            continue
        raw = piece.detach().reshape(-1).view(torch.uint8)
        words, rest = raw[: len(raw) // 4 * 4].view(torch.int32), raw[len(raw) // 4 * 4 :]
        of_this = int(words.sum(dtype=torch.int64)) + 257 * int(rest.sum(dtype=torch.int64))
        total ^= of_this * (2 * index + 1) & (2**63 - 1)
    return total
