"""Fully sharded: each rank keeps a piece of every weight and puts a layer together when it is used (torch's FSDP2).

In full training the pieces are what is trained: gradients, moments and updates are sharded too. With an adapter the
frozen base is sharded; the adapter, a hundredth of it, is whole on every rank and treated as in `ddp`, which spares a
gather of small tensors in every layer. A base in 4 bits is sharded as the bytes it is packed into: nothing takes them
for numbers on the way. Their constants, a thirtieth of them, are whole on every rank.

With `layout.shards` there are several copies, each cut among so many ranks that follow each other: gathers stay among
them, and gradients of the copies are added up once a step. The variant `grad` keeps layers whole between a forward pass
and its backward pass; `offload` keeps the pieces of a frozen base in RAM (`parallel.offload` trains all from there).

A layer is put together by all ranks at the same time, so all compute the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor

from kitaeru.model.parts import Parts
from kitaeru.parallel import single
from kitaeru.parallel.reducer import Reducer
from kitaeru.parallel.single import losses as losses
from kitaeru.parallel.single import squares
from kitaeru.parallel.start import same_start, same_trained
from kitaeru.parallel.types import Held, Named, Rows, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.types import Layout

T = TypeVar("T")


@dataclass
class _Pieces:
    """`sharded`: the trained parameters in pieces, by name; empty with an adapter, which has a `reducer` instead.

    `group`: the ranks that hold one copy between them (None: all), of which this is number `place` of `ranks`.
    """

    ranks: int
    place: int
    group: Any = None
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
    """Cut the weights into pieces, a layer at a time; where they are not here yet, as the layers arrive."""
    mesh, ranks = mesh_of(world, layout), layout.shared_by
    group = mesh.get_group("pieces") if layout.shards else None
    adapter = layout.method in ("lora", "qlora")
    whole = {parameter for _, parameter in named} if adapter else set()
    device = single.own_device(layout)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    policy = CPUOffloadPolicy(pin_memory=layout.device == "cuda") if layout.variant == "offload" else OffloadPolicy()

    def cut(module: nn.Module) -> None:
        # "grad" keeps the layers whole between a forward pass and its backward pass.
        kept = layout.variant == "grad" and module is not unit
        before = [p for p in module.parameters() if p not in whole and not isinstance(p, DTensor)]
        with _bytes_may_be_parameters():
            fully_shard(module, mesh=mesh, reshard_after_forward=not kept, ignored_params=whole, offload_policy=policy)
        for parameter in before:  # a list of what is trained still has them
            parameter.data = parameter.data.new_empty(0)

    blocks = _blocks(unit.model)
    if unit.parts is None:
        same_start(unit.model, named, world)
        for module in blocks:
            cut(module)
    else:
        for number, tensors in arriving(unit.parts, world, device):
            unit.parts.put(tensors)
            del tensors
            inside_it = set(unit.parts.layers[number].modules())
            for module in (block for block in blocks if block in inside_it):
                cut(module)
        unit.parts = None
        if adapter:
            same_trained(named)
    cut(unit)
    for module in unit.modules():
        if isinstance(module, FSDPModule):
            # A plain sum: the loss is divided by the tokens of all ranks already. Gloo knows nothing else anyway.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    pieces = _Pieces(ranks, world.rank % ranks, group)
    if adapter:
        pieces.reducer = Reducer([parameter for _, parameter in named])
        return Held(world, unit, named, pieces, at=device)
    sharded = {name: p for name, p in unit.model.named_parameters() if isinstance(p, DTensor)}
    pieces.sharded = sharded
    # The optimizer works on the piece as a plain tensor in the same memory, so any elementwise one can be used.
    own = [(name, nn.Parameter(sharded[name].to_local().detach())) for name, _ in named]
    # One copy is enough for a checkpoint.
    written = sharded if world.rank < ranks else {}
    rows = {name: Rows(tuple(t.shape), pieces.place * -(-t.shape[0] // ranks)) for name, t in written.items()}
    return Held(world, unit, own, pieces, at=device, rows=rows)


@contextmanager
def _bytes_may_be_parameters() -> Iterator[None]:
    """Up to torch 2.11 a piece is first made a parameter that asks for a gradient, which no tensor of bytes may."""

    def parameter(data: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    module: Any = _fsdp_param
    module.nn = SimpleNamespace(Parameter=parameter, Module=nn.Module)
    try:
        yield
    finally:
        module.nn = nn


def mesh_of(world: World, layout: Layout) -> DeviceMesh:
    """All ranks in a row, or copies by pieces: ranks of one machine follow each other, and share a copy."""
    if not layout.shards:
        return init_device_mesh(layout.device, (world.size,))
    return init_device_mesh(
        layout.device, (world.size // layout.shards, layout.shards), mesh_dim_names=("copies", "pieces")
    )


def arriving(parts: Parts, world: World, device: torch.device) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Each part in order, whole: read by one rank, which sends it to all. As many are read at a time as there are
    ranks, one by each.
    """
    count = len(parts.layers)
    if world.size == 1:
        yield from ((number, parts.read(number)) for number in range(count))
        return
    for first in range(0, count, world.size):
        number = first + world.rank
        mine = parts.read(number) if number < count else {}
        for source in range(min(world.size, count - first)):
            outline = [[(name, t.shape, t.dtype) for name, t in mine.items()]]
            dist.broadcast_object_list(outline, src=source)
            found = mine if source == world.rank else {}
            for name, shape, dtype in outline[0]:
                tensor = mine.pop(name) if source == world.rank else torch.empty(shape, dtype=dtype, device=device)
                tensor = tensor.to(device).contiguous()
                if tensor.numel():
                    dist.broadcast(tensor.view(-1).view(torch.uint8), src=source)
                found[name] = tensor
            yield first + source, found


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
    """One micro-batch after the other; gradients of sharded weights are summed and cut up layer by layer, each time,
    and those of several copies are added up in the last backward pass.
    """
    return single.in_turn(held, work, _backward)


def _backward(held: Held, loss: torch.Tensor, last: bool) -> None:
    if held.state.reducer is None:
        root: Any = held.unit
        root.set_requires_all_reduce(last)
    elif last:
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
        dist.all_reduce(total, group=held.state.group)
    return total.sqrt()


def gather(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put the pieces together."""
    whole = held.state.sharded.get(name)
    if whole is None or tensor.shape != whole.to_local().shape:
        return tensor.detach().cpu()
    return together(tensor.detach(), whole.shape[0], held.state.ranks, held.state.group)


def together(piece: torch.Tensor, rows: int, ranks: int, group: Any = None) -> torch.Tensor:
    """A tensor of so many rows from every rank's piece of it, on the CPU."""
    most = -(-rows // ranks)
    padded = piece.new_zeros((most, *piece.shape[1:]))
    padded[: len(piece)] = piece
    whole = piece.new_empty((most * ranks, *piece.shape[1:]))
    # As bytes: gloo does not carry every dtype.
    dist.all_gather_into_tensor(whole.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8), group=group)
    return whole[:rows].cpu()


def scatter(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows, as torch cuts them: the same number for each rank, the last ones fewer or none."""
    whole = held.state.sharded.get(name)
    if whole is None or tensor.shape != whole.shape:
        return tensor
    for module in held.unit.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # layers that an evaluation left whole would not see what is restored
    most, place = -(-len(tensor) // held.state.ranks), held.state.place
    return tensor[most * place : most * (place + 1)].clone()


def model_state(held: Held) -> dict[str, torch.Tensor]:
    """The model's own, with the pieces put together one weight at a time; only the main process keeps them."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in held.unit.model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = together(tensor.to_local(), tensor.shape[0], held.state.ranks, held.state.group)
        if held.world.main:
            state[name] = tensor
    return state
