"""Ranks that hold the same weights must start from the same ones, and find that frozen ones stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kitaeru.errors import TrainingError
from kitaeru.i18n import tr
from kitaeru.model.experts import PackedExperts
from kitaeru.parallel.types import Named
from kitaeru.parallel.world import World


def same_start(model: nn.Module, named: Named, world: World, group: Any = None) -> None:
    """Give every rank of `group` (all, without one) the trained weights of its first; compare the frozen ones.

    Raises:
        TrainingError: they have loaded different ones.
    """
    same_trained(named, group)
    own = hash_frozen(model)
    first = torch.tensor([own])
    dist.broadcast(first, group=group, group_src=0)
    if world.any(own != int(first)):
        raise TrainingError(
            tr("The processes have loaded different weights of this model."),
            remedy=tr("Give every host the same files, or name one version: --set model.revision=COMMIT"),
        )


def same_trained(named: Named, group: Any = None) -> None:
    """Give every rank the trained weights of the first one."""
    for _, parameter in named:
        dist.broadcast(parameter.data, group=group, group_src=0)


def hash_frozen(model: nn.Module) -> int:
    """A checksum of every weight that must not change: packed ones by their bytes, with the constants they are unpacked
    with; this rank's of those in pieces.
    """
    total, index = 0, 0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation may have left it whole
        constants = getattr(module, "quant_state", None)
        more = module.buffers(recurse=False) if isinstance(module, PackedExperts) else _tensors_in(constants)
        for tensor in (*module.parameters(recurse=False), *more):
            index += 1
            if not (tensor.requires_grad or tensor.is_meta):
                piece = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
                total ^= checksum(piece) * (2 * index + 1) & (2**63 - 1)
    return total


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes, taken four at a time."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words, rest = raw[: len(raw) // 4 * 4].view(torch.int32), raw[len(raw) // 4 * 4 :]
    return int(words.sum(dtype=torch.int64)) + 257 * int(rest.sum(dtype=torch.int64))


def _tensors_in(constants: Any) -> Iterator[torch.Tensor]:
    """Those of bitsandbytes' QuantState: scales, tables, and the same of nested scales."""
    if constants is None:
        return
    for name in ("absmax", "code", "offset"):
        value = getattr(constants, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    yield from _tensors_in(getattr(constants, "state2", None))
