"""ZeRO through DeepSpeed's own engine: the optimizer's state in pieces (stage 1), gradients too (2), weights too (3).

DeepSpeed cuts the weights, sums gradients, drives the optimizer on each rank's piece and hands new weights out. What
decides the mathematics stays kitaeru's: the division of the loss, the clipping, the rates, and whether a step is made.

A rank's piece of a parameter is a run of its numbers, in the 32-bit copy that DeepSpeed's optimizer works on. All ranks
compute the same number of micro-batches, since they meet in every backward pass.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from kitaeru.errors import CheckpointError, MissingLibraryError, UsageError
from kitaeru.i18n import tr
from kitaeru.model.parts import Parts
from kitaeru.parallel import single
from kitaeru.parallel.fsdp import arriving
from kitaeru.parallel.fsdp import deal as deal
from kitaeru.parallel.single import squares
from kitaeru.parallel.start import same_start
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.deepspeed import deepspeed_config
from kitaeru.plan.types import Layout, Plan

T = TypeVar("T")
INSTALL = "pip install 'kitaeru[deepspeed]'"


@dataclass(frozen=True)
class _Piece:
    """Where this rank's part of a parameter lies: `count` numbers of flat tensor `flat` from `start` on; in the whole
    parameter of `shape` they are those from `first` on. `weight` is the model's own parameter.
    """

    weight: nn.Parameter
    shape: torch.Size
    flat: int
    start: int
    count: int
    first: int


@dataclass
class _Engine:
    """DeepSpeed's engine, `zero` its optimizer. `stale`: pieces have been restored that the model has not seen yet."""

    engine: Any
    zero: Any
    stage: int
    offloaded: bool
    pieces: dict[str, _Piece] = field(default_factory=dict)
    stale: bool = False

    @property
    def flats(self) -> list[torch.Tensor]:
        """The 32-bit tensors that the optimizer works on, all this rank's pieces."""
        found: list[torch.Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        return found


def configuration(plan: Plan) -> dict[str, Any]:
    """The configuration of a planned run, looked at by DeepSpeed itself where a person has written some of it.

    Raises:
        UsageError: the person's file is no configuration, or says something else than the recipe.
    """
    config = deepspeed_config(plan.layout, plan.recipe, plan.chosen.trained_parameters)
    own = plan.recipe.limits.ds_config
    if own is not None:
        library(plan.layout)
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        try:
            DeepSpeedZeroConfig(**config["zero_optimization"])
        except ValueError as error:
            raise UsageError(
                tr("DeepSpeed refuses `zero_optimization`: {error}", error=error),
                where=own,
                remedy=tr("Correct it, or leave `limits.ds_config` out: one is made."),
            ) from error
    return config


def need(strategy: str) -> None:
    """Say early that DeepSpeed is missing.

    Raises:
        MissingLibraryError: it is not installed.
    """
    if find_spec("deepspeed") is None:
        raise MissingLibraryError("deepspeed", tr("The strategy {name}", name=strategy), INSTALL)


def library(layout: Layout) -> Any:
    """DeepSpeed, told which kind of device to use.

    Raises:
        MissingLibraryError: it is not installed.
    """
    need(layout.strategy)
    os.environ.setdefault("DS_ACCELERATOR", layout.device)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls what newer versions of torch have renamed, in every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # A shared-memory sum for CPUs, compiled when first used; gloo does without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """Hand the model and its optimizer to DeepSpeed; with ZeRO-3 a layer at a time, as the layers arrive."""
    deepspeed = library(layout)
    assert unit.engine is not None
    if unit.parts is None:
        same_start(unit.model, named, world)
    optimizer = unit.engine.optimizer(named)  # before anything is cut: shapes decide its groups
    groups = [list(group["params"]) for group in optimizer.param_groups]
    config = dict(unit.engine.config)
    shapes = {name: parameter.shape for name, parameter in named}
    device = single.own_device(layout)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes its device from there; ranks may share one
    if layout.strategy == "zero3":
        deepspeed.init_distributed(dist_init_required=False)
        cut = partial(deepspeed.zero.Init, config_dict_or_path=config)
        if unit.parts is not None:
            _as_they_come(unit.parts, world, device, cut)
            unit.parts = None
        cut(module=unit)  # what is whole yet, one weight after another on its way to the device
        for buffer in unit.buffers():  # which DeepSpeed leaves where they are
            buffer.data = buffer.data.to(device)
    engine, zero, _, _ = deepspeed.initialize(model=unit, optimizer=optimizer, config=config, dist_init_required=False)
    own = _Engine(engine, zero, engine.zero_optimization_stage(), layout.variant.startswith("offload"))
    own.pieces = {name: _piece(own, p, groups, shapes[name], world) for name, p in named}
    flats = own.flats
    pieces = [
        (name, nn.Parameter(flats[at.flat].detach()[at.start : at.start + at.count])) for name, at in own.pieces.items()
    ]
    held = Held(world, unit, pieces, own, at=device, elsewhere=_elsewhere(unit.model))
    held.optimizer = driven(held, optimizer, groups)
    return held


def _as_they_come(parts: Parts, world: World, device: torch.device, cut: Callable[..., Any]) -> None:
    """Fill an outline a layer at a time, and cut each before the next comes."""
    for number, tensors in arriving(parts, world, device):
        owners = {name: parts.owners[name] for name in tensors}
        # A table that is input and output comes with the first layer and again with the last, when it is cut already.
        done = {name for name, (module, own) in owners.items() if hasattr(getattr(module, own), "ds_id")}
        parts.put({name: tensor for name, tensor in tensors.items() if name not in done})
        del tensors
        cut(module=nn.ModuleList([parts.layers[number], *(module for module, _ in owners.values())]))


def _elsewhere(model: nn.Module) -> tuple[int, int]:
    """Numbers of the trained parameters and of all that the model shows as empty; small ones are whole once used."""
    parameters: list[Any] = list(model.parameters())
    cut = [p for p in parameters if hasattr(p, "ds_id") and not p.ds_persist]
    return sum(p.ds_numel for p in cut if p.requires_grad), sum(p.ds_numel for p in cut)


def _piece(
    own: _Engine, weight: nn.Parameter, groups: list[list[nn.Parameter]], shape: torch.Size, world: World
) -> _Piece:
    """This rank's part of a parameter; one that lies on other ranks has none of its numbers here."""
    total = shape.numel()
    if own.stage == 3:
        flat, start, size = own.zero.grad_position[own.zero.get_param_id(weight)]
        first = min(total, world.rank * size)
        return _Piece(weight, shape, flat, start, min(size, total - first), first)
    flat = next(i for i, group in enumerate(groups) if any(p is weight for p in group))
    mapped = weight._hp_mapping  # type: ignore[attr-defined]
    if mapped is None:
        return _Piece(weight, shape, flat, 0, 0, 0)
    here, there = mapped.hp_fragment_address, mapped.lp_fragment_address
    return _Piece(weight, shape, flat, here.start, here.numel, there.start)


# --- the passes -------------------------------------------------------------------------------------------------------


def inside(held: Held, function: Callable[[], T]) -> T:
    """Call it with the weights outside of the layers put together; the layers do it themselves."""
    _fresh(held)
    found: list[T] = []

    def call() -> list[torch.Tensor]:
        found.append(function())
        return []  # DeepSpeed looks for tensors in what a module gives

    held.unit(call)
    return found[0]


def gradients(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """One micro-batch after the other; DeepSpeed sums gradients in the last one (stage 1) or in each."""
    _fresh(held)
    engine, shares = held.state.engine, {}
    for place, number in enumerate(work.numbers):
        work.begin(number)
        engine.set_gradient_accumulation_boundary(place + 1 == len(work.numbers))
        batch = work.batch(number, single.device_of(held))

        def loss_sum(batch: Any = batch) -> torch.Tensor:
            with work.autocast():  # inside: DeepSpeed's engine ends one that is around it
                return held.unit.loss_sum(batch)

        share = work.share(engine(loss_sum))
        # DeepSpeed divides by the ranks; the loss is divided by the tokens of all of them already.
        engine.backward(share * (0 if number is None else held.world.size), scale_wrt_gas=False)
        if number is not None:
            shares[number] = share.detach()
    return shares


def losses(held: Held, work: Work) -> dict[int, torch.Tensor]:
    """The same without gradients."""
    _fresh(held)
    return single.losses(held, work)


def reduce(held: Held) -> None:
    """DeepSpeed has summed them: show them at the pieces, in the memory that its step reads."""
    own: _Engine = held.state
    device = single.device_of(held)
    if own.offloaded and device.type == "cuda":
        torch.cuda.synchronize(device)  # they are on their way to RAM, where they are read next
    for name, piece in held.named:
        at = own.pieces[name]
        piece.grad = _gradient(own, at).reshape(-1)[: at.count] if at.count else torch.zeros_like(piece)


def _gradient(own: _Engine, at: _Piece) -> torch.Tensor:
    """This rank's part of a gradient, where DeepSpeed keeps it until its step."""
    zero = own.zero
    if own.offloaded:
        whole: torch.Tensor = own.flats[at.flat].grad  # type: ignore[assignment]
        return whole[at.start : at.start + at.count]
    members = zero.fp16_groups if own.stage == 3 else zero.params_in_partition
    place = next(i for i, p in enumerate(members[at.flat]) if p is at.weight)
    found: torch.Tensor = zero.averaged_gradients[at.flat][place]
    return found


def norm(held: Held) -> torch.Tensor:
    """The norm of all pieces on all ranks."""
    total = squares(held.named).to(single.device_of(held))
    dist.all_reduce(total)
    return total.sqrt()


# --- the optimizer ----------------------------------------------------------------------------------------------------


class _Driven(torch.optim.Optimizer):
    """An optimizer over the pieces by name, as the engine room expects one; the work is done by DeepSpeed with the one
    that it drives. Its states are views of that one's; states that are put here are taken over before the next step.
    """

    def __init__(self, held: Held, base: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._own: _Engine = held.state
        self._base = base
        self._given: dict[torch.Tensor, dict[str, Any]] = {}
        self._members: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, piece in held.named:
            self._members.setdefault(self._own.pieces[name].flat, []).append((name, piece))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """DeepSpeed's step."""
        for ours, theirs in zip(self.param_groups, self._base.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        self._give()
        self._own.engine.set_gradient_accumulation_boundary(True)
        self._own.engine.step()
        self._take()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, whether a step was made with them or not."""
        super().zero_grad(set_to_none=True)
        zero = self._own.zero
        zero.zero_grad(set_to_none=True)
        if self._own.offloaded:
            zero.reset_cpu_buffers()
        elif self._own.stage == 3:
            zero.averaged_gradients = {}
        else:
            for kept in (zero.averaged_gradients, zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))
        if self._own.stage < 3:
            zero.micro_step_id = -1  # before a step's first backward pass

    def _give(self) -> None:
        for number, flat in enumerate(self._own.flats):
            members = self._members.get(number, [])
            if all(self.state.get(piece) is self._given.get(piece) for _, piece in members):
                continue
            self._base.state.pop(flat, None)
            for _, piece in members:
                self._given.pop(piece, None)  # or what was cleared stays in memory beside its successor
            states = [self.state[piece] for _, piece in members if self.state.get(piece)]
            if states:
                self._base.state[flat] = self._together(flat, members, states)

    def _together(
        self, flat: torch.Tensor, members: list[tuple[str, torch.Tensor]], states: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """One state of all the pieces in a flat tensor.

        Raises:
            CheckpointError: they are not of the same number of steps.
        """
        whole: dict[str, Any] = {}
        for key, value in states[0].items():
            if isinstance(value, torch.Tensor) and value.ndim == 1:
                whole[key] = torch.zeros_like(flat, dtype=value.dtype, requires_grad=False)
                for (name, _), state in zip(members, states, strict=False):
                    at = self._own.pieces[name]
                    whole[key][at.start : at.start + at.count] = state[key]
            else:
                whole[key] = value
                if len(states) != len(members) or any(float(state[key]) != float(value) for state in states):
                    raise CheckpointError(
                        tr("The weights of this checkpoint were not all updated equally often, as DeepSpeed needs."),
                        where=members[0][0],
                        remedy=tr("Go on with another strategy: --set strategy=fsdp"),
                    )
        return whole

    def _take(self) -> None:
        for number, flat in enumerate(self._own.flats):
            state = self._base.state.get(flat, {})
            for name, piece in self._members.get(number, []):
                at = self._own.pieces[name]
                views = {
                    key: value[at.start : at.start + at.count]
                    if isinstance(value, torch.Tensor) and value.shape == flat.shape
                    else value
                    for key, value in state.items()
                }
                if views:
                    self.state[piece] = self._given[piece] = views


def driven(held: Held, base: torch.optim.Optimizer, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """`base`, which DeepSpeed drives, as an optimizer over the pieces; checkpoints know it by the name of `base`."""
    piece_of = {id(held.state.pieces[name].weight): piece for name, piece in held.named}
    ours = [
        {**{k: v for k, v in group.items() if k != "params"}, "params": [piece_of[id(p)] for p in members]}
        for group, members in zip(base.param_groups, groups, strict=True)
    ]
    made: torch.optim.Optimizer = type(type(base).__name__, (_Driven,), {})(held, base, ours)
    return made


# --- whole tensors ----------------------------------------------------------------------------------------------------


def gather(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put the pieces together; only the main process keeps them, as RAM may not hold all of them on every rank."""
    at = held.state.pieces.get(name)
    if at is None or tensor.shape != (at.count,):
        return tensor.detach().cpu()
    whole = torch.zeros(at.shape.numel(), dtype=tensor.dtype, device=single.device_of(held))
    whole[at.first : at.first + at.count] = tensor.detach()
    dist.reduce(whole, 0)
    return whole.view(at.shape).cpu() if held.world.main else torch.empty(0, dtype=tensor.dtype)


def scatter(held: Held, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's run of numbers."""
    at = held.state.pieces.get(name)
    if at is None or tensor.shape != at.shape:
        return tensor
    held.state.stale = True
    return tensor.reshape(-1)[at.first : at.first + at.count].clone()


def _fresh(held: Held) -> None:
    """Let the model see pieces that have been restored."""
    own: _Engine = held.state
    if not own.stale:
        return
    own.stale = False
    zero = own.zero
    if own.stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for number in range(len(own.flats)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def model_state(held: Held) -> dict[str, torch.Tensor]:
    """The model's own, with the pieces put together one weight at a time; only the main process keeps them."""
    _fresh(held)
    if held.state.stage < 3:
        return single.model_state(held)
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    found: Mapping[str, torch.Tensor] = held.unit.model.state_dict(keep_vars=True)
    for name, tensor in found.items():
        with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
            if held.world.main:
                state[name] = tensor.detach().cpu().clone()
    return state
