"""Tensor parallel: every layer is cut lengthwise, each rank computes its heads and its part of the MLP of every token.

What is cut how is the model's own `base_model_tp_plan`: a `colwise` linear layer gives some of its outputs, the
`rowwise` one behind it takes those as its inputs and gives a summand of the whole. So a layer needs two sums of
hidden states forward (after attention and MLP) and two of their gradients backward (before them). An adapter's
matrices are cut like the weight they stand beside: A of a rowwise and B of a colwise layer; the other one is whole on
every rank, and sees only what is this rank's, so that its gradient is a summand. Embedding, norms and head are whole
on every rank; the head gives each rank's losses for some of the tokens only.

All ranks of a copy compute the same micro-batches. With `replicas` several such copies train side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from kitaeru.data.types import MicroBatch
from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.kernels.linear_cross_entropy import IGNORED
from kitaeru.model.layers import decoder_of, layers_of
from kitaeru.parallel import ddp, single
from kitaeru.parallel.fsdp import arriving
from kitaeru.parallel.reducer import Reducer
from kitaeru.parallel.start import same_start, same_trained
from kitaeru.parallel.types import Held, Named, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.types import Layout

# Every rank calls the model at the same time.
inside, deal = single.inside, ddp.deal

COLUMN, ROW, WHOLE = "colwise", "rowwise", "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class Team:
    """The ranks that share one copy of the model, and this one's place among them."""

    ranks: int
    place: int
    group: Any

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        width = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.place * width, width).clone(memory_format=torch.contiguous_format)

    def together(self, part: Tensor, dim: int) -> Tensor:
        """All ranks' parts, in order, on the CPU."""
        if "nccl" not in str(dist.get_backend_config()):  # gloo gathers in RAM only
            part = part.cpu()
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat([found.cpu() for found in parts], dim)


@dataclass
class _Cut:
    """`parts`: the parameters that are cut, by name, each with the dimension it is cut along. `summed` adds up the
    gradients of trained ones that are whole on every rank: of `alike` ones each rank of a copy has all of it, of the
    others a summand. `copies` adds up those of the cut ones over the copies.
    """

    team: Team
    parts: Mapping[str, tuple[nn.Parameter, int]]
    summed: Reducer
    alike: Sequence[nn.Parameter]
    copies: Reducer | None


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """Cut the weights, as the layers arrive where they are not here yet; connect the ranks.

    Raises:
        ModelError: the model's authors say nothing of how it is cut, or something that is not known here.
    """
    team, same = _teams(world, layout.ranks_per_replica)
    device = single.own_device(layout)
    model: Any = unit.model.get_base_model() if isinstance(unit.model, PeftModel) else unit.model
    seams = list(_seams(model, team.ranks))
    _check(model, seams)
    before = _numbers(unit.model)
    if unit.parts is None:
        same_start(unit.model, named, world)
        dims = _cut(seams, team)
    else:
        if layout.method == "lora":
            same_trained(named)
        dims = {}
        for number, tensors in arriving(unit.parts, world, device):
            unit.parts.put(tensors)
            del tensors
            layer = set(unit.parts.layers[number].modules())
            dims |= _cut([seam for seam in seams if seam.module in layer], team)
        unit.parts = None
    unit.model.to(device)
    _connect(model, seams, team)
    parts = {name: (p, dims[id(p)]) for name, p in unit.model.named_parameters() if id(p) in dims}
    whole = [p for name, p in named if name not in parts]
    summands = {id(p) for p in _with_summands(model, seams)}
    alike = [p for p in whole if id(p) not in summands]
    copies = Reducer([p for name, p in named if name in parts], group=same) if layout.replicas > 1 else None
    after = _numbers(unit.model)
    elsewhere = before[0] - after[0], before[1] - after[1]
    return Held(world, unit, named, _Cut(team, parts, Reducer(whole), alike, copies), at=device, elsewhere=elsewhere)


def _numbers(model: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and all."""
    every = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in every if trained), sum(n for n, _ in every)


def _teams(world: World, ranks: int) -> tuple[Team, Any]:
    """This rank's team, and the ranks that have the same part in other teams; all processes make all groups."""
    team, same = None, None
    for first in range(0, world.size, ranks):
        group = dist.new_group(list(range(first, first + ranks)))
        if first <= world.rank < first + ranks:
            team = Team(ranks, world.rank - first, group)
    for place in range(ranks if ranks < world.size else 0):
        group = dist.new_group(list(range(place, world.size, ranks)))
        same = group if world.rank % ranks == place else same
    assert team is not None
    return team, same


# --- what is cut ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seam:
    """A module of the plan: its path in the model, its style, and the module that it is a part of."""

    path: str
    style: str
    module: nn.Module
    parent: nn.Module

    @property
    def linear(self) -> Any:
        """The linear layer, without the adapter around it."""
        return self.module.get_base_layer() if isinstance(self.module, LoraLayer) else self.module


def _seams(model: PreTrainedModel, ranks: int) -> Iterator[_Seam]:
    decoder = decoder_of(model)
    config: Any = decoder.config
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if not plan or decoder is model:
        raise _refused(model, tr("its authors do not say how its layers are cut"))
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or ranks
        if heads % ranks:
            raise _refused(
                model, tr("{name} is {heads}, which {count} cannot share", name=name, heads=heads, count=ranks)
            )
    styles = [(re.compile(re.escape(path).replace(r"\*", r"\d+")), style) for path, style in plan.items()]
    for path, module in decoder.named_modules():
        style = next((style for pattern, style in styles if pattern.fullmatch(path)), None)
        if style is None:
            continue
        seam = _Seam(path, style, module, decoder.get_submodule(path.rpartition(".")[0]))
        known = isinstance(seam.linear, nn.Linear) if style in (COLUMN, ROW) else style == WHOLE
        if not known:
            raise _refused(
                model, tr("{path} is to be cut in a way that is not known here ({style})", path=path, style=style)
            )
        if style != WHOLE and seam.linear.weight.shape[0 if style == COLUMN else 1] % ranks:
            raise _refused(model, tr("the width of {path} cannot be shared by {count}", path=path, count=ranks))
        yield seam


def _check(model: PreTrainedModel, seams: Sequence[_Seam]) -> None:
    """Beside parts of layers there must be nothing of which the plan does not speak: is its gradient a summand?"""
    found = layers_of(model)
    layers = set(found[1]) if found else set()
    spoken_of = {id(p) for seam in seams for p in seam.module.parameters()}
    for seam in seams:
        for name, parameter in seam.parent.named_parameters() if seam.parent not in layers else ():
            if id(parameter) not in spoken_of:
                where = f"{seam.path.rpartition('.')[0]}.{name}"
                raise _refused(model, tr("its authors do not say how {path} is cut", path=where))


def _refused(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        tr("{kind} cannot be trained tensor-parallel: {why}.", kind=type(model).__name__, why=why),
        remedy=tr("Train it with another strategy: --set strategy=ddp or --set strategy=fsdp."),
    )


def _cut(seams: Sequence[_Seam], team: Team) -> dict[int, int]:
    """Keep this rank's part of every weight that is cut. Along which dimension, by the parameters' ids."""
    dims: dict[int, int] = {}
    for seam in seams:
        if seam.style == WHOLE:
            continue
        dim = 0 if seam.style == COLUMN else 1
        cut = [(seam.linear.weight, dim)]
        if seam.linear.bias is not None and seam.style == COLUMN:
            cut.append((seam.linear.bias, 0))
        if isinstance(seam.module, LoraLayer):
            matrices = seam.module.lora_B if seam.style == COLUMN else seam.module.lora_A
            cut += [(matrix.weight, dim) for matrix in matrices.values()]
        known = {id(p) for p, _ in cut} | {id(p) for p in _summands(seam)}
        for name, parameter in seam.module.named_parameters():
            if id(parameter) not in known:
                raise _refused(
                    seam.module, tr("{path} has a part that is not known here ({name})", path=seam.path, name=name)
                )
        for parameter, along in cut:
            parameter.data = team.part(parameter.data, along)
            dims[id(parameter)] = along
    return dims


def _summands(seam: _Seam) -> list[nn.Parameter]:
    """Parameters of a seam that are whole on every rank, and get a summand of their gradient there."""
    if seam.style == WHOLE:
        return list(seam.module.parameters())
    found = [] if seam.style == COLUMN or seam.linear.bias is None else [seam.linear.bias]
    if isinstance(seam.module, LoraLayer):
        matrices = seam.module.lora_A if seam.style == COLUMN else seam.module.lora_B
        found += [matrix.weight for matrix in matrices.values()]
    return found


def _with_summands(model: PreTrainedModel, seams: Sequence[_Seam]) -> Iterator[nn.Parameter]:
    """All whole parameters of whose gradient each rank has a summand: those at seams, of the embedding, and what
    follows the decoder.
    """
    for seam in seams:
        yield from _summands(seam)
    yield from model.get_input_embeddings().parameters()
    below = {id(p) for p in decoder_of(model).parameters()}
    yield from (p for p in model.parameters() if id(p) not in below)


# --- how the ranks meet -----------------------------------------------------------------------------------------------


class _Enter(torch.autograd.Function):
    """From what is whole to what each rank does with its part: the gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Leave(torch.autograd.Function):
    """From summands to their sum, which all ranks go on with."""

    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Any) -> Tensor:
        whole = summand.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Door:
    """Before the colwise layers of one module: those that read the same tensor enter together, with one sum."""

    def __init__(self, team: Team, layers: int) -> None:
        self._team, self._layers = team, layers
        self._left, self._seen, self._entered = 0, None, None

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        tensor, *rest = arguments
        if self._left == 0 or tensor is not self._seen:
            self._left, self._seen = self._layers, tensor
            if torch.is_autocast_enabled(tensor.device.type):  # the layer does so itself; here the sum is in 16 bits
                tensor = tensor.to(torch.get_autocast_dtype(tensor.device.type))
            self._entered = _Enter.apply(tensor, self._team.group)  # type: ignore[no-untyped-call]
        entered, self._left = self._entered, self._left - 1
        if self._left == 0:  # nothing is kept longer than it is needed
            self._seen, self._entered = None, None
        return (entered, *rest)


class _PartOfDropout(nn.Dropout):
    """The dropout of a tensor of which only a part is here: drawn for the whole, as on one device."""

    def __init__(self, p: float, team: Team) -> None:
        super().__init__(p)
        self._team = team

    def forward(self, part: Tensor) -> Tensor:
        if not self.training:
            return part
        whole = part.new_ones(*part.shape[:-1], part.shape[-1] * self._team.ranks)
        return part * self._team.part(F.dropout(whole, self.p), -1)


def _connect(model: PreTrainedModel, seams: Sequence[_Seam], team: Team) -> None:
    """Put the sums where parts begin and end."""

    def summed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return _Leave.apply(output, team.group)  # type: ignore[no-untyped-call, no-any-return]

    doors: dict[nn.Module, _Door] = {}
    columns = [seam for seam in seams if seam.style == COLUMN]
    for seam in columns:
        if seam.parent not in doors:
            doors[seam.parent] = _Door(team, sum(other.parent is seam.parent for other in columns))
        seam.module.register_forward_pre_hook(doors[seam.parent])
    for seam in seams:
        if seam.style != ROW:
            continue
        if isinstance(seam.module, LoraLayer):
            for name, dropout in seam.module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                    seam.module.lora_dropout[name] = _PartOfDropout(dropout.p, team)
        if seam.linear.bias is not None and team.place:  # it is added once
            seam.linear.forward = _WithoutBias(seam.linear)
        seam.module.register_forward_hook(summed)

    def losses_of_some(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = _Enter.apply(output.last_hidden_state, team.group)  # type: ignore[no-untyped-call]
        return output

    def counted_once(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad and team.place:
            output.register_hook(torch.zeros_like)

    def same_logits(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        # An answer's tokens must not depend on how one rank's kernels round.
        if not torch.is_grad_enabled():
            output = output.contiguous()
            dist.broadcast(output, group=team.group, group_src=0)
        return output

    decoder_of(model).register_forward_hook(losses_of_some)
    model.get_input_embeddings().register_forward_hook(counted_once)
    model.get_output_embeddings().register_forward_hook(same_logits)


class _WithoutBias:
    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def __call__(self, part: Tensor) -> Tensor:
        return F.linear(part, self._linear.weight)


# --- what a step does -------------------------------------------------------------------------------------------------


def gradients(held: Held, work: Work) -> dict[int, Tensor]:
    """One micro-batch after the other; each rank has the losses of some of the tokens."""
    return single.gradients(held, _own_tokens(held, work))


def losses(held: Held, work: Work) -> dict[int, Tensor]:
    """The same without gradients."""
    return single.losses(held, _own_tokens(held, work))


def _own_tokens(held: Held, work: Work) -> Work:
    """Work in which the tokens that count are dealt out to the ranks."""
    team = _team(held)

    def batch(number: int | None, device: torch.device) -> MicroBatch:
        whole = work.batch(number, device)
        place = (whole.targets != IGNORED).cumsum(-1) % team.ranks
        return replace(whole, targets=whole.targets.masked_fill(place != team.place, IGNORED), counted=None)

    return replace(work, batch=batch)


def reduce(held: Held) -> None:
    """Add up the summands, and the copies' gradients."""
    cut: _Cut = held.state
    if cut.team.place:
        for parameter in cut.alike:
            parameter.grad = None
    cut.summed.finish()
    if cut.copies is not None:
        cut.copies.finish()


def norm(held: Held) -> Tensor:
    """The norm of all parts, and of what is whole once."""
    cut: _Cut = held.state
    total = single.squares([(n, p) for n, p in held.named if n in cut.parts]).to(held.at)
    dist.all_reduce(total, group=cut.team.group)
    return (total + single.squares([(n, p) for n, p in held.named if n not in cut.parts]).to(held.at)).sqrt()


def gather(held: Held, name: str, tensor: Tensor) -> Tensor:
    """Put the parts together."""
    part, dim = held.state.parts.get(name, (None, 0))
    if part is None or tensor.shape != part.shape:
        return tensor.detach().cpu()
    return _team(held).together(tensor.detach(), dim)


def scatter(held: Held, name: str, tensor: Tensor) -> Tensor:
    """This rank's part."""
    part, dim = held.state.parts.get(name, (None, 0))
    return tensor if part is None or tensor.ndim != part.ndim else _team(held).part(tensor, dim)


def model_state(held: Held) -> dict[str, Tensor]:
    """The model's own, with the parts put together one weight at a time; only the main process keeps them."""
    state: dict[str, Tensor] = {}
    for name, tensor in held.unit.model.state_dict().items():
        whole = gather(held, name, tensor) if name in held.state.parts else tensor
        if held.world.main:
            state[name] = whole
    return state


def _team(held: Held) -> Team:
    team: Team = held.state.team
    return team
