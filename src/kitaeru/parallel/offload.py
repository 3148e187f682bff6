"""Weights, gradients and the optimizer's state in RAM; the layers come to the devices one at a time (full training).

A layer's weights are on a device while it computes: in the forward pass, and again in the backward pass, which computes
the layer a second time. They travel in 32 bits and get the arithmetic's width on the device; the next layer comes while
one is at work. A layer's gradients go down as soon as they are all there, and a thread of the host adds them up in 32
bits behind the next layer's backward pass. What lies outside of the layers (tables, the last norm) stays on the device;
its gradients go down once a step. The optimizer works in RAM, on all cores.

Several ranks hold the rows of every weight between them, as in `fsdp`: each brings its rows to its device, and the
devices put them together; gradients are added up and cut before they go down. With `layout.shards` there are several
copies, each held by so many ranks that follow each other: their sums in RAM are added up once a step.
"""

from __future__ import annotations

import contextlib
import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model.layers import layers_of
from kitaeru.model.load import DTYPES
from kitaeru.parallel import single
from kitaeru.parallel.fsdp import arriving, mesh_of, together
from kitaeru.parallel.fsdp import deal as deal
from kitaeru.parallel.start import same_start
from kitaeru.parallel.types import Held, Named, Rows, Unit, Work
from kitaeru.parallel.world import World
from kitaeru.plan.from_ram import CAST_AT_ONCE
from kitaeru.plan.layouts import LAYERS_AT_ONCE
from kitaeru.plan.types import Layout

T = TypeVar("T")

# Numbers that are added up in RAM at a time: what the caches hold.
ADD_AT_ONCE = 1 << 17
# A weight begins in a slot where every kernel may read it.
ALIGNED = 256


# ---- what lies in RAM ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The `size` ranks that hold a copy between them, of which this is number `place`; `group` is theirs (None: all),
    and `copies` that of the ranks that hold the same rows in each of the `count` copies.
    """

    size: int
    place: int
    group: Any = None
    count: int = 1
    copies: Any = None


@dataclass
class Weight:
    """One weight: this rank's rows of it lie in its shelf from number `start` on, `rows` of them; every rank has room
    for `each` numbers, the last ones for more than they have. `dtype` is what its layer computes from, `place` its
    first byte in a slot. `arrived`: whether its gradient is there.
    """

    name: str
    module: nn.Module
    own: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    each: int
    rows: Rows
    count: int
    place: int
    arrived: bool = False

    def of(self, numbers: Tensor) -> Tensor:
        """This rank's rows of it, in the shelf's masters or gradients."""
        return numbers[self.start : self.start + self.count].view(-1, *self.shape[1:])


class Shelf:
    """This rank's rows of a layer's weights, fp32 [n], and the sums of their gradients, fp32 [n]. A slot on the device
    takes `slot_bytes`.
    """

    def __init__(self, owners: Iterable[tuple[str, nn.Module, str]], ranks: Ranks, dtype: torch.dtype) -> None:
        self.weights: list[Weight] = []
        start = place = 0
        for name, module, own in owners:
            parameter = module._parameters[own]
            assert parameter is not None
            shape, most = parameter.shape, -(-parameter.shape[0] // ranks.size)
            width = parameter.numel() // shape[0]
            first = most * ranks.place
            count = max(0, min(shape[0] - first, most)) * width
            # What autocast would cast at each use, and nothing else, is cast on arrival.
            kind = dtype if isinstance(module, nn.Linear) and parameter.dim() > 1 else torch.float32
            rows = Rows(tuple(shape), first)
            self.weights.append(Weight(name, module, own, shape, kind, start, most * width, rows, count, place))
            start += most * width
            place += -(-most * width * ranks.size * kind.itemsize // ALIGNED) * ALIGNED
        self.slot_bytes = place
        self.masters, self.gradients = torch.zeros(start), torch.empty(start)


def _pin(owner: object, memory: Tensor) -> bool:
    """Lock memory as long as its owner lives, so that copies run beside everything else; whether that is allowed.

    torch's own pinned memory comes in powers of two: of 172 MB a third would be lost.
    """
    runtime = torch.cuda.cudart()
    if memory.numel() and int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) != 0:
        with contextlib.suppress(RuntimeError):  # takes the error off, which the next kernel would report
            torch.ones(1, device="cuda")
        return False
    weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
    return True


@dataclass
class Slot:
    """Room on the device for one layer's weights: `ready` when they are there, `done` when nothing needs them."""

    memory: Tensor
    ready: torch.cuda.Event | None = None
    done: torch.cuda.Event | None = None


# ---- what moves ------------------------------------------------------------------------------------------------------


class Host:
    """What a rank has in RAM, and how it comes to the device and goes back."""

    def __init__(
        self, ranks: Ranks, shelves: Sequence[Shelf], outside: Shelf, layers: Sequence[nn.Module], device: torch.device
    ) -> None:
        self.ranks, self.shelves, self.outside, self.device = ranks, shelves, outside, device
        self.cuda = device.type == "cuda"
        self.backwards = self.last = False
        self.stale = True  # the device's copies of what lies outside of the layers
        self.squares = 0.0
        self.rows_of: Mapping[str, Rows] = {}
        self.token = torch.zeros((), device=device, requires_grad=True)
        self.up, self.down = (torch.cuda.Stream(device) if self.cuda else None for _ in range(2))
        most = max(shelf.slot_bytes for shelf in shelves)
        self.slots = [Slot(torch.empty(most, dtype=torch.uint8, device=device)) for _ in range(LAYERS_AT_ONCE)]
        self.free, self.loaded = deque(self.slots), dict[int, Slot]()
        widest = max(weight.each for shelf in shelves for weight in shelf.weights)
        own = 4 * widest if ranks.size > 1 else 0  # this rank's rows, before they are put together
        self.rows = torch.empty(own, dtype=torch.uint8, device=device)
        self.uncast = torch.empty(min(widest, CAST_AT_ONCE) if self.cuda else 0, device=device)
        self.pool, self.jobs = ThreadPoolExecutor(1), list[Future[None]]()
        self.scratch = torch.empty(ADD_AT_ONCE * torch.get_num_threads())
        self.staging: queue.Queue[Tensor] = queue.Queue()
        self.pinned = True
        if self.up is not None:
            self.up.wait_stream(torch.cuda.current_stream())  # what had the slots' memory before
            size = max(sum(_sent_bytes(weight, ranks.size) for weight in shelf.weights) for shelf in shelves)
            buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(LAYERS_AT_ONCE)]
            for memory in (*buffers, outside.masters, outside.gradients, *(shelf.masters for shelf in shelves)):
                self.pinned = self.pinned and _pin(self, memory)
            for buffer in buffers:
                self.staging.put(buffer)
        for number, layer in enumerate(layers):
            layer.forward = partial(self.through, number, layer.forward)

    # -- a layer at work --

    def through(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass with its weights there; where gradients will be wanted, again in the backward
        pass.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.there(number):
                return forward(*args, **kwargs)

        if torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    @contextlib.contextmanager
    def there(self, number: int) -> Iterator[None]:
        """The layer's weights in their modules."""
        weights = self.shelves[number].weights
        training = torch.is_grad_enabled()
        tensors = _Fetch.apply(self.token, self, number) if training else self.fetch(number)  # type: ignore[no-untyped-call]
        outlines = [weight.module._parameters[weight.own] for weight in weights]
        for weight, tensor in zip(weights, tensors, strict=True):
            weight.module._parameters[weight.own] = tensor
        try:
            yield
        finally:
            for weight, outline in zip(weights, outlines, strict=True):
                weight.module._parameters[weight.own] = outline
            # The backward pass begins with the last layer, and lets go of a layer when its gradients are there.
            if not self.backwards and not (training and number == len(self.shelves) - 1):
                self.release(number)

    def fetch(self, number: int) -> tuple[Tensor, ...]:
        """The layer's weights on the device, and the next one's on their way."""
        following = number - 1 if self.backwards else number + 1
        for wanted in (number, following) if self.cuda else (number,):
            if wanted not in self.loaded and 0 <= wanted < len(self.shelves):
                self._load(wanted)
        slot = self.loaded[number]
        if slot.ready is not None:
            torch.cuda.current_stream().wait_event(slot.ready)
        return tuple(
            self._in_slot(weight, slot)[: weight.shape.numel()].view(weight.shape)
            for weight in self.shelves[number].weights
        )

    def release(self, number: int) -> None:
        """Nothing that is still to be started needs the layer's weights."""
        slot = self.loaded.pop(number)
        if self.cuda:
            slot.done = torch.cuda.Event()
            slot.done.record()
        self.free.append(slot)

    def _in_slot(self, weight: Weight, slot: Slot) -> Tensor:
        size = weight.each * self.ranks.size * weight.dtype.itemsize
        return slot.memory[weight.place : weight.place + size].view(weight.dtype)

    @torch.no_grad()
    def _load(self, number: int) -> None:
        slot, shelf = self.free.popleft(), self.shelves[number]
        with torch.cuda.stream(self.up):
            if self.up is not None and slot.done is not None:
                self.up.wait_event(slot.done)
            for weight in shelf.weights:
                whole = self._in_slot(weight, slot)
                self._bring(shelf.masters[weight.start : weight.start + weight.each], whole)
            if self.cuda:
                slot.ready = torch.cuda.Event()
                slot.ready.record()
        self.loaded[number] = slot

    def _bring(self, mine: Tensor, whole: Tensor) -> None:
        """This rank's numbers in RAM to the device, cast there, and all ranks' numbers together in `whole`."""
        alone = self.ranks.size == 1
        here = whole if alone else self.rows[: len(mine) * whole.dtype.itemsize].view(whole.dtype)
        if not self.cuda or here.dtype == mine.dtype:
            here.copy_(mine, non_blocking=True)
        else:
            for numbers, place in zip(mine.split(len(self.uncast)), here.split(len(self.uncast)), strict=True):
                place.copy_(self.uncast[: len(numbers)].copy_(numbers, non_blocking=True))
        if not alone:
            dist.all_gather_into_tensor(whole.view(torch.uint8), here.view(torch.uint8), group=self.ranks.group)

    # -- gradients --

    @torch.no_grad()
    def arrived(self, number: int, gradients: Sequence[Tensor | None]) -> None:
        """A layer's gradients are all there: they go down, and its weights are done with."""
        self.release(number)
        if self.down is None:
            pairs = list(self._down(number, gradients, None))
            self.jobs.append(self.pool.submit(self._add, number, pairs, None, None, gradients, last=self.last))
            return
        buffer = self.staging.get()
        try:
            self.down.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.down):
                pairs = list(self._down(number, gradients, buffer))
                event = torch.cuda.Event(blocking=True)
                event.record()
        except BaseException:
            self.staging.put(buffer)
            raise
        self.jobs.append(self.pool.submit(self._add, number, pairs, event, buffer, gradients, last=self.last))

    def _down(
        self, number: int, gradients: Sequence[Tensor | None], buffer: Tensor | None
    ) -> Iterator[tuple[Weight, Tensor]]:
        """Each weight's gradient, of this rank's rows, on its way into the buffer; without one where it is."""
        place = 0
        for weight, gradient in zip(self.shelves[number].weights, gradients, strict=True):
            piece = self._own_sum(weight, gradient)
            if piece is not None and buffer is not None:
                here = buffer[place : place + piece.nbytes].view(piece.dtype)
                yield weight, here.copy_(piece, non_blocking=True)
                place += _sent_bytes(weight, self.ranks.size)
            elif piece is not None:
                yield weight, piece

    def _own_sum(self, weight: Weight, gradient: Tensor | None) -> Tensor | None:
        """This rank's rows of the sum of its copy's gradients of a weight, as numbers in a row; None without any."""
        if self.ranks.size == 1:
            return None if gradient is None else gradient.reshape(-1)
        whole = torch.zeros(weight.each * self.ranks.size, device=self.device)
        if gradient is not None:
            whole[: gradient.numel()].copy_(gradient.reshape(-1))
        mine = torch.empty(weight.each, device=self.device)
        dist.reduce_scatter_tensor(mine, whole, group=self.ranks.group)
        return mine

    def _add(
        self,
        number: int,
        pairs: Sequence[tuple[Weight, Tensor]],
        event: torch.cuda.Event | None,
        buffer: Tensor | None,
        gradients: Sequence[Tensor | None],
        *,
        last: bool,
    ) -> None:
        """In the host's thread: add to the sums in RAM what has come. `gradients` are only held on to until then."""
        if event is not None:
            event.synchronize()
        del gradients
        try:
            for weight, numbers in pairs:
                self._add_one(self.shelves[number], weight, numbers, last=last and self.ranks.count == 1)
        finally:
            if buffer is not None:
                self.staging.put(buffer)
        if last and self.ranks.count > 1:
            self._over_copies(self.shelves[number].gradients)

    @torch.no_grad()
    def _over_copies(self, sums: Tensor) -> None:
        """Add up what the copies have, in their RAM, and take it into the norm."""
        dist.all_reduce(sums, group=self.ranks.copies)
        self.squares += sum(float(part.square().sum()) for part in sums.split(len(self.scratch)))

    @torch.no_grad()
    def _add_one(self, shelf: Shelf, weight: Weight, numbers: Tensor, *, last: bool) -> None:
        sums = shelf.gradients[weight.start : weight.start + weight.each]
        size = len(self.scratch)
        for total, new in zip(sums.split(size), numbers.split(size), strict=True):
            if not weight.arrived:
                total.copy_(new)
            elif new.dtype == total.dtype:
                total.add_(new)
            else:  # torch adds numbers of two kinds one at a time
                total.add_(self.scratch[: len(new)].copy_(new))
            if last:
                self.squares += float(total.square().sum())
        weight.arrived = True

    # -- a step --

    @torch.no_grad()
    def ready(self) -> None:
        """Before weights are used: the device has what the optimizer, or a checkpoint, has left in RAM."""
        self.free, self.loaded = deque(self.slots), {}
        if self.cuda:  # a pass that had no backward pass has left the last layer in its slot
            for slot in self.slots:
                slot.done = torch.cuda.Event()
                slot.done.record()
        if not self.stale:
            return
        for weight in self.outside.weights:
            parameter = weight.module._parameters[weight.own]
            assert parameter is not None
            mine = self.outside.masters[weight.start : weight.start + weight.each]
            if self.ranks.size == 1:
                parameter.data.view(-1).copy_(mine, non_blocking=True)
            else:
                whole = torch.empty(weight.each * self.ranks.size, device=self.device)
                dist.all_gather_into_tensor(whole, mine.to(self.device), group=self.ranks.group)
                parameter.data.view(-1).copy_(whole[: parameter.numel()])
        self.stale = False

    def begin(self) -> None:
        """A step's gradients begin, whatever became of the last one's."""
        for job in self.jobs:
            job.exception()
        self.jobs, self.squares = [], 0.0
        for shelf in (*self.shelves, self.outside):
            if shelf.gradients.shape != shelf.masters.shape:
                shelf.gradients = torch.empty_like(shelf.masters)
            for weight in shelf.weights:
                weight.arrived = False

    @torch.no_grad()
    def end(self) -> None:
        """All of a step's gradients are in RAM, with those of what lies outside of the layers."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job.result()
        for weight in self.outside.weights:
            parameter = weight.module._parameters[weight.own]
            assert parameter is not None
            piece = self._own_sum(weight, parameter.grad)
            if piece is not None:
                sums = self.outside.gradients[weight.start : weight.start + weight.each]
                sums.copy_(piece, non_blocking=True)
                weight.arrived = True
                if self.cuda:
                    torch.cuda.current_stream().synchronize()
                if self.ranks.count == 1:
                    self.squares += sum(float(part.square().sum()) for part in sums.split(len(self.scratch)))
            parameter.grad = None
        if self.ranks.count > 1:
            self._over_copies(self.outside.gradients)
        self.stale = True


def _sent_bytes(weight: Weight, ranks: int) -> int:
    """Of a weight's gradient as it goes down: in the width it is computed in, or as a sum of several in 32 bits."""
    size = weight.each * (weight.dtype.itemsize if ranks == 1 else 4)
    return -(-size // ALIGNED) * ALIGNED


class _Fetch(torch.autograd.Function):
    """A layer's weights as results of an operation, so that its backward pass is given all their gradients at once, and
    no graph holds the weights themselves.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, host: Host, number: int) -> tuple[Tensor, ...]:
        ctx.host, ctx.number = host, number
        ctx.set_materialize_grads(False)
        return host.fetch(number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        ctx.host.arrived(ctx.number, gradients)
        return None, None, None


# ---- the strategy ----------------------------------------------------------------------------------------------------


def hold(unit: Unit, named: Named, world: World, layout: Layout) -> Held:
    """Put the weights into RAM, a layer at a time as they arrive where they are not here yet.

    Raises:
        ModelError: the model has no list of layers that could come one at a time.
    """
    model: Any = unit.model
    found = layers_of(model)
    if found is None:
        raise ModelError(
            tr("The layers of this model are not known to stand alone, so they cannot come from RAM one at a time."),
            remedy=tr("Train it with another strategy, or with `method: lora`."),
        )
    device, dtype, layers = single.own_device(layout), DTYPES[layout.precision], list(found[1])
    ranks = _ranks(world, layout)
    if unit.parts is None and world.size > 1:
        same_start(model, named, world)
    names = {id(parameter): name for name, parameter in named}
    inside_them = {id(module) for layer in layers for module in layer.modules()}
    shelves = [Shelf(_owners(layer.modules(), names), ranks, dtype) for layer in layers]
    others = (module for module in model.modules() if id(module) not in inside_them)
    outside = Shelf(_owners(others, names), ranks, torch.float32)
    places = {weight.name: (shelf, weight) for shelf in (*shelves, outside) for weight in shelf.weights}
    if unit.parts is None:
        _take(model, places, outside, device)
    else:
        for _, tensors in arriving(unit.parts, world, device):
            for name, (shelf, weight) in places.items():
                if name in tensors:
                    _keep(shelf, weight, tensors[name] if shelf is outside else tensors.pop(name))
            unit.parts.put(tensors)
        unit.parts = None
    host = Host(ranks, shelves, outside, layers, device)
    host.ready()
    own = [(name, nn.Parameter(weight.of(shelf.masters))) for name, (shelf, weight) in _in_order(named, places)]
    host.rows_of = {name: weight.rows for name, (_, weight) in places.items()} if ranks.size > 1 else {}
    slow = tr("This system does not let memory be locked: copies between RAM and the device are slower than planned.")
    return Held(
        world,
        unit,
        own,
        host,
        at=device,
        rows=host.rows_of if world.rank < ranks.size else {},  # one copy is enough for a checkpoint
        first_rows={name: rows.first for name, rows in host.rows_of.items()},
        notices=() if host.pinned else (slow,),
    )


def _ranks(world: World, layout: Layout) -> Ranks:
    if not layout.shards:
        return Ranks(world.size, world.rank)
    mesh = mesh_of(world, layout)
    pieces, copies = mesh.get_group("pieces"), mesh.get_group("copies")
    return Ranks(layout.shards, world.rank % layout.shards, pieces, world.size // layout.shards, copies)


def _owners(modules: Iterable[nn.Module], names: Mapping[int, str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Each trained parameter once: its name, a module that has it, its name there."""
    seen: set[int] = set()
    for module in modules:
        for own, parameter in module._parameters.items():
            if id(parameter) in names and id(parameter) not in seen:
                seen.add(id(parameter))
                yield names[id(parameter)], module, own


def _in_order(named: Named, places: Mapping[str, tuple[Shelf, Weight]]) -> Iterator[tuple[str, tuple[Shelf, Weight]]]:
    return ((name, places[name]) for name, _ in named)


def _keep(shelf: Shelf, weight: Weight, whole: Tensor) -> None:
    """This rank's rows of a whole weight."""
    rows = weight.of(shelf.masters)
    rows.copy_(whole[weight.rows.first :][: len(rows)])


def _take(model: nn.Module, places: Mapping[str, tuple[Shelf, Weight]], outside: Shelf, device: torch.device) -> None:
    """The same of a model that is here, whole, in RAM; what it has in its layers is let go."""
    for shelf, weight in places.values():
        parameter = weight.module._parameters[weight.own]
        assert parameter is not None
        _keep(shelf, weight, parameter.data)
        if shelf is outside:
            parameter.data = parameter.data.to(device)
        else:
            parameter.data = torch.zeros(()).expand(weight.shape)
    for module in model.modules():
        for own, buffer in module._buffers.items():
            module._buffers[own] = None if buffer is None else buffer.to(device)


def inside(held: Held, function: Callable[[], T]) -> T:
    """Call it; the layers bring their weights themselves."""
    held.state.ready()
    return function()


def gradients(held: Held, work: Work) -> dict[int, Tensor]:
    """One micro-batch after the other."""
    host: Host = held.state
    host.ready()
    host.begin()
    return single.in_turn(held, work, _backward)


def _backward(held: Held, loss: Tensor, last: bool) -> None:
    host: Host = held.state
    host.last, host.backwards = last, True
    try:
        loss.backward()
    finally:
        host.backwards = False


def losses(held: Held, work: Work) -> dict[int, Tensor]:
    """One micro-batch after the other."""
    held.state.ready()
    return single.losses(held, work)


def reduce(held: Held) -> None:
    """Hand the sums over to the pieces of the weights."""
    host: Host = held.state
    host.end()
    found = {w.name: (shelf, w) for shelf in (*host.shelves, host.outside) for w in shelf.weights}
    for name, piece in held.named:
        shelf, weight = found[name]
        piece.grad = weight.of(shelf.gradients) if weight.arrived else None


def norm(held: Held) -> Tensor:
    """The norm of all pieces of a copy, summed up as they came."""
    host: Host = held.state
    total = held.world.sum(torch.tensor(host.squares, dtype=torch.float64))
    return (total / host.ranks.count).sqrt()


def gather(held: Held, name: str, tensor: Tensor) -> Tensor:
    """Put the pieces together."""
    host: Host = held.state
    rows = host.rows_of.get(name)
    if rows is None or tensor.dim() != len(rows.shape):
        return tensor.detach().cpu()
    return together(tensor.detach(), rows.shape[0], host.ranks.size, host.ranks.group)


def scatter(held: Held, name: str, tensor: Tensor) -> Tensor:
    """This rank's rows."""
    host: Host = held.state
    host.stale = True
    rows = host.rows_of.get(name)
    if rows is None or tensor.shape != rows.shape:
        return tensor
    most = -(-rows.shape[0] // host.ranks.size)
    return tensor[rows.first : rows.first + most].clone()


def model_state(held: Held) -> dict[str, Tensor]:
    """The model's own, with the pieces put together one weight at a time; only the main process keeps them. The room of
    the gradients is given back for it.
    """
    for shelf in held.state.shelves:
        shelf.gradients = torch.empty(0)
    pieces, state = dict(held.named), {}
    first = {id(p): name for name, p in held.unit.model.named_parameters()}
    aliases = {name: first[id(p)] for name, p in held.unit.model.named_parameters(remove_duplicate=False)}
    for name, tensor in held.unit.model.state_dict().items():
        own = aliases.get(name)
        found = tensor if own is None else gather(held, own, pieces[own])
        if held.world.main:
            state[name] = found
    return state
