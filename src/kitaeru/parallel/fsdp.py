"""Fully sharded: each rank keeps a piece of every weight and puts a layer together when it is used (torch's FSDP2).

In full training the pieces are what is trained: gradients, moments and updates are sharded too. With an adapter the
frozen base is sharded; the adapter, a hundredth of it, is whole on every rank and treated as in `ddp`, which spares a
gather of small tensors in every layer.

A layer is put together by all ranks at the same time, so all compute the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kitaeru.parallel import single
from kitaeru.parallel.reducer import Reducer
from kitaeru.parallel.single import losses as losses
from kitaeru.parallel.single import squares
from kitaeru.parallel.start import same_start
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.types import Layout

T = TypeVar("T")


@dataclass
class _Pieces:
    """`sharded`: the trained parameters in pieces, by name; empty with an adapter, which has a `reducer` instead."""

    sharded: Mapping[str, DTensor] = field(default_factory=dict)
    reducer: Reducer | None = None


def deal(tokens: Sequence[int], ranks: int) -> list[list[int | None]]:
    """Rounds of micro-batches of about the same length, one for each rank, since the ranks wait for each other in each.

    >>> deal([5, 3, 2, 6, 4], 2)
    [[3, 4, 2], [0, 1, None]]
    """
    by_length = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    order = [*by_length, *[None] * (-len(tokens) % ranks)]
    return [order[rank::ranks] for rank in range(ranks)]


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """Cut the weights into pieces, a layer at a time."""
    same_start(unit.model, named, world)
    mesh = init_device_mesh(layout.device, (world.size,))
    whole = {parameter for _, parameter in named} if layout.method in ("lora", "qlora") else set()
    device = torch.device(layout.device, torch.cuda.current_device()) if layout.device == "cuda" else None
    for parameter in whole if device is not None else ():
        parameter.data = parameter.data.to(device)
    for module in (*_blocks(unit.model), unit):
        # "grad" keeps the layers whole between a forward pass and its backward pass.
        kept = layout.variant == "grad" and module is not unit
        fully_shard(module, mesh=mesh, reshard_after_forward=not kept, ignored_params=whole)
    for module in unit.modules():
        if isinstance(module, FSDPModule):
            # A plain sum: the loss is divided by the tokens of all ranks already. Gloo knows nothing else anyway.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if whole:
        return Held(world, unit, named, _Pieces(reducer=Reducer([parameter for _, parameter in named])))
    sharded = {name: p for name, p in unit.model.named_parameters() if isinstance(p, DTensor)}
    # The optimizer works on the piece as a plain tensor in the same memory, so any elementwise one can be used.
    pieces = [(name, nn.Parameter(sharded[name].to_local().detach())) for name, _ in named]
    return Held(world, unit, pieces, _Pieces(sharded))


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that are put together one at a time: those that the model's authors keep on one device."""
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def inside(held: Held, function: Callable[[], T]) -> T:
    """Call it with the weights outside of the layers put together; the layers do it themselves."""
    result: T = held.unit(function)
    return result


def gradients(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """One micro-batch after the other; gradients of sharded weights are summed and cut up layer by layer, each time."""
    return single.in_turn(held, work, _backward)


def _backward(held: Held, loss: torch.Tensor, last: bool) -> None:
    if last and held.state.reducer is not None:
        held.state.reducer.start()
    loss.backward()


def reduce(held: Held) -> None:
    """Hand the pieces of the gradients over to the pieces of the weights."""
    if held.state.reducer is not None:
        held.state.reducer.finish()
    for name, piece in held.named:
        whole = held.state.sharded.get(name)
        if whole is not None:
            piece.grad = None if whole.grad is None else whole.grad.to_local().detach()
            whole.grad = None


def norm(held: Held) -> torch.Tensor:
    """The norm of all pieces on all ranks."""
    total = squares(held.named)
    if held.state.reducer is None:
        dist.all_reduce(total)
    return total.sqrt()


def gather(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put the pieces together."""
    whole = held.state.sharded.get(name)
    if whole is None or tensor.shape != whole.to_local().shape:
        return tensor.detach().cpu()
    return _together(tensor.detach(), whole.shape[0], held.world.size)


def _together(piece: torch.Tensor, rows: int, ranks: int) -> torch.Tensor:
    most = -(-rows // ranks)
    padded = piece.new_zeros((most, *piece.shape[1:]))
    padded[: len(piece)] = piece
    together = piece.new_empty((most * ranks, *piece.shape[1:]))
    dist.all_gather_into_tensor(together, padded)
    return together[:rows].cpu()


def scatter(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows, as torch cuts them: the same number for each rank, the last ones fewer or none."""
    whole = held.state.sharded.get(name)
    if whole is None or tensor.shape != whole.shape:
        return tensor
    for module in held.unit.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # layers that an evaluation left whole would not see what is restored
    most = -(-len(tensor) // held.world.size)
    return tensor[most * held.world.rank : most * (held.world.rank + 1)].clone()


def model_state(held: Held) -> dict[str, torch.Tensor]:
    """The model's own, with the pieces put together one weight at a time; only the main process keeps them."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in held.unit.model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = _together(tensor.to_local(), tensor.shape[0], held.world.size)
        if held.world.main:
            state[name] = tensor
    return state
