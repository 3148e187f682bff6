"""A model cut into stages: which part of it a rank has, and running that part alone.

A stage is the model's own decoder with the layers of the other stages left out of its list, so that masks, rotary
positions and whatever else a family does between its layers stay its own code. The parts that other ranks have are on
the meta device: they have names and shapes here and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model.layers import decoder_of, layers_of
from kitaeru.plan.types import Layout


@dataclass(frozen=True)
class Share:
    """The stages that a process has. `cuts` are the layers of each stage of the whole model, `own` the stages' numbers.

    >>> share = Share((3, 2, 2, 1), (1, 3))
    >>> share.layers, share.first, share.last
    ((3, 4, 7), False, True)
    """

    cuts: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def first(self) -> bool:
        """Whether it has the embedding."""
        return 0 in self.own

    @property
    def last(self) -> bool:
        """Whether it has the output head."""
        return len(self.cuts) - 1 in self.own

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of its layers."""
        return tuple(layer for stage in self.own for layer in self.of(stage))

    def of(self, stage: int) -> range:
        """The numbers of a stage's layers."""
        ends = list(accumulate(self.cuts))
        return range(ends[stage] - self.cuts[stage], ends[stage])


def share_of(layout: Layout, rank: int) -> Share | None:
    """What a rank of a pipeline has; None where every rank has the whole model."""
    if layout.strategy != "pipeline":
        return None
    ranks = layout.ranks_per_replica
    return Share(layout.cuts, tuple(range(rank % ranks, len(layout.cuts), ranks)))


def stage_devices(layout: Layout) -> tuple[torch.device, ...]:
    """The device of each stage, where one process has them all."""
    if layout.strategy != "model_parallel":
        return ()
    if layout.device == "cpu":
        return (torch.device("cpu"),) * layout.devices
    return tuple(torch.device("cuda", number % torch.cuda.device_count()) for number in range(layout.devices))


@dataclass(frozen=True)
class Anatomy:
    """Names: of the list of layers, the embedding and what follows the layers in the decoder, and of the head."""

    layers: str
    embedding: str
    tail: tuple[str, ...]
    head: str


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Where a model's parts are.

    Raises:
        ModelError: it is not an embedding, a list of layers, something after them, and a head.
    """
    decoder, found = decoder_of(model), layers_of(model)
    embedding = _name_of(decoder, model.get_input_embeddings())
    head = _name_of(model, model.get_output_embeddings())
    if found is None or embedding is None or head is None or decoder is model:
        raise _no_stages(model)
    tail = tuple(
        name
        for name, child in decoder.named_children()
        if name not in (found[0], embedding) and next(child.parameters(), None) is not None
    )
    return Anatomy(found[0], embedding, tail, head)


def _name_of(parent: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, child in parent.named_children() if child is module), None)


def _no_stages(model: PreTrainedModel) -> ModelError:
    return ModelError(
        tr("{kind} cannot be cut into stages.", kind=type(model).__name__),
        remedy=tr("Train it with another strategy: --set strategy=ddp or --set strategy=fsdp."),
    )


# --- the parts that others have ---------------------------------------------------------------------------------------


def without(kind: type[PreTrainedModel], share: Share) -> type[PreTrainedModel]:
    """A model class whose models lack what `share` does not have when they are made, so that it is never loaded."""

    def init(self: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        kind.__init__(self, *arguments, **options)
        _leave_out(self, share)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})


def _leave_out(model: PreTrainedModel, share: Share) -> None:
    names, decoder = anatomy_of(model), decoder_of(model)
    layers = decoder.get_submodule(names.layers)
    for index in set(range(sum(share.cuts))) - set(share.layers):
        setattr(layers, str(index), nn.Module())
    tied = bool(model.config.tie_word_embeddings)
    if not share.first and not (tied and share.last):  # a tied head is the embedding's table
        setattr(decoder, names.embedding, nn.Module())
    if not share.last:
        for name in names.tail:
            setattr(decoder, name, nn.Module())
        setattr(model, names.head, nn.Module())
        model.all_tied_weights_keys = {}


def put_back(model: PreTrainedModel, outline: PreTrainedModel, share: Share) -> None:
    """Fill what was left out with the parts of `outline`, the same model on the meta device."""
    names = anatomy_of(outline)
    decoder, outlined = decoder_of(model), decoder_of(outline)
    layers, theirs = decoder.get_submodule(names.layers), outlined.get_submodule(names.layers)
    for index in set(range(sum(share.cuts))) - set(share.layers):
        setattr(layers, str(index), theirs.get_submodule(str(index)))
    if not share.first:
        setattr(decoder, names.embedding, outlined.get_submodule(names.embedding))
    if not share.last:
        for name in names.tail:
            setattr(decoder, name, outlined.get_submodule(name))
        setattr(model, names.head, outline.get_submodule(names.head))


def keep_only(model: PreTrainedModel, share: Share, device: torch.device) -> PreTrainedModel:
    """Give up the memory of what `share` does not have, and put the rest on a device."""
    names, decoder = anatomy_of(model), decoder_of(model)
    layers = decoder.get_submodule(names.layers)
    parts = [layers.get_submodule(str(i)) for i in range(sum(share.cuts)) if i not in share.layers]
    parts += [] if share.first else [decoder.get_submodule(names.embedding)]
    parts += [] if share.last else [decoder.get_submodule(name) for name in names.tail]
    parts += [] if share.last else [model.get_submodule(names.head)]
    for part in parts:
        part.to("meta")
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not own[0].is_meta:
            module.to(device)
    return model


# --- one process with several devices ---------------------------------------------------------------------------------


def places_of(model: PreTrainedModel, cuts: Sequence[int], devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of each part of a model, by name, when stage i is on `devices[i]`; {"": device} when all are one."""
    if len(set(devices)) == 1:
        return {"": devices[0]}
    names, decoder = anatomy_of(model), decoder_of(model)
    prefix = model.base_model_prefix
    places = {f"{prefix}.{name}": devices[0] for name, _ in decoder.named_children() if name != names.layers}
    places |= {f"{prefix}.{name}": devices[-1] for name in names.tail}
    places |= {name: devices[0] for name, _ in model.named_children() if name != prefix}
    # A tied head is loaded where the embedding is, and gets its copy in `inputs_follow`.
    places[names.head] = devices[0 if model.config.tie_word_embeddings else -1]
    share = Share(tuple(cuts), tuple(range(len(cuts))))
    for stage, device in enumerate(devices):
        places |= {f"{prefix}.{names.layers}.{index}": device for index in share.of(stage)}
    return places


def move(model: PreTrainedModel, cuts: Sequence[int], devices: Sequence[torch.device]) -> PreTrainedModel:
    """Put each part of a model on its device."""
    for name, device in places_of(model, cuts, devices).items():
        model.get_submodule(name).to(device)
    return model


def inputs_follow(model: PreTrainedModel, cuts: Sequence[int], devices: Sequence[torch.device]) -> None:
    """Let what goes into a part come to its device. A frozen head that is tied to the embedding gets a copy there."""
    if len(set(devices)) == 1:
        return
    head: Any = model.get_output_embeddings()
    if head.weight.device != devices[-1]:
        head.weight = nn.Parameter(head.weight.detach().to(devices[-1]), requires_grad=False)
    names = anatomy_of(model)
    for name, device in {**places_of(model, cuts, devices), names.head: devices[-1]}.items():
        part = model.get_submodule(name)
        if next(part.parameters(), None) is not None:  # what has none works where its input is
            part.register_forward_pre_hook(partial(_to_device, device), with_kwargs=True, prepend=True)


def _to_device(device: torch.device, _: nn.Module, arguments: Any, options: Any) -> Any:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if type(value) in (tuple, list):
            return type(value)(moved(part) for part in value)
        return value

    return moved(arguments), {name: moved(value) for name, value in options.items()}


# --- running a part ---------------------------------------------------------------------------------------------------


class Exchange(Protocol):
    """How the ranks of a pipeline pass on what they have computed when all of them call the model together."""

    def take(self, stage: int, like: Tensor) -> Tensor:
        """The hidden states that `stage` goes on with."""
        ...

    def give(self, stage: int, hidden: Tensor) -> None:
        """The hidden states that `stage` ends with."""
        ...

    def logits(self, own: Tensor | None, device: torch.device) -> Tensor:
        """The last stage's logits, on every rank."""
        ...


class _Elsewhere(nn.Module):
    """In the place of a layer that is not computed here: hidden states pass through, or come from another rank.

    A cache learns the number of tokens, since masks are made from its first layer.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.index = index
        self.arriving: tuple[Exchange, int] | None = None
        self.leaving: tuple[Exchange, int] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some decoders ask a layer for its kind of attention
            return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> Tensor:
        if past_key_values is not None:
            nothing = hidden_states.new_zeros(1, 1, hidden_states.shape[1], 1)
            past_key_values.update(nothing, nothing, self.index)
        if self.leaving is not None:
            exchange, stage = self.leaving
            exchange.give(stage, hidden_states)
        if self.arriving is not None:
            exchange, stage = self.arriving
            hidden_states = exchange.take(stage, hidden_states)
        return hidden_states


class Stages:
    """A model's decoder that can be run a stage at a time (`at`); called otherwise, all ranks run their parts in turn.

    The model's own forward then works as on one device, caches and generation too, as long as every rank calls it.

    Raises:
        ModelError: its decoder does something else between the stages.
    """

    def __init__(self, model: PreTrainedModel, share: Share, device: torch.device, exchange: Exchange | None) -> None:
        self.share, self._device, self._exchange = share, device, exchange
        self._names = anatomy_of(model)
        self.decoder = decoder_of(model)
        layers = self.decoder.get_submodule(self._names.layers)
        assert isinstance(layers, nn.ModuleList)
        self._layers = list(layers)
        self._width = self._embedding.weight.shape[1]
        self._now: tuple[int, Tensor | None] | None = None
        self._whole = self.decoder.forward
        self._lists = {stage: self._list(share.of(stage)) for stage in share.own}
        self._all = self._connected()
        self._check(model)
        self.decoder.forward = self._forward
        if exchange is not None:
            head = model.get_output_embeddings()
            self._head = head.forward
            head.forward = self._logits

    @property
    def _embedding(self) -> Any:
        return self.decoder.get_submodule(self._names.embedding)

    @contextmanager
    def at(self, stage: int, hidden: Tensor | None) -> Iterator[None]:
        """Calls of the decoder run one stage, on `hidden` [1, T, h] of the one before it (None: on token ids)."""
        self._now = (stage, hidden)
        try:
            yield
        finally:
            self._now = None

    def _list(self, own: range) -> nn.ModuleList:
        layers = (layer if i in own else _Elsewhere(layer, i) for i, layer in enumerate(self._layers))
        return nn.ModuleList(layers)

    def _connected(self) -> nn.ModuleList:
        """The layers of this rank with, between its stages, what receives from and sends to the other ranks."""
        mine = set(self.share.layers)
        found: list[Any] = [layer if i in mine else _Elsewhere(layer, i) for i, layer in enumerate(self._layers)]
        for stage in self.share.own if self._exchange is not None else ():
            layers = self.share.of(stage)
            if stage:
                found[layers.start - 1].arriving = (self._exchange, stage)
            if stage < len(self.share.cuts) - 1:
                found[layers.stop].leaving = (self._exchange, stage)
        return nn.ModuleList(found)

    def _forward(self, input_ids: Tensor | None = None, **arguments: Any) -> Any:
        if self._now is not None:
            stage, hidden = self._now
            return self._run(self._lists[stage], stage == len(self.share.cuts) - 1, input_ids, hidden, arguments)
        hidden = None
        if not self.share.first:
            assert input_ids is not None
            hidden = self._embedding.weight.new_zeros(
                *input_ids.shape, self._width, device=self._device
            )  # a place for what arrives
        return self._run(self._all, self.share.last, input_ids, hidden, arguments)

    def _run(
        self,
        layers: nn.ModuleList,
        tail: bool,
        input_ids: Tensor | None,
        hidden: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> Any:
        modules = self.decoder._modules
        changed: dict[str, nn.Module] = {self._names.layers: layers}
        changed |= {} if tail else {name: nn.Identity() for name in self._names.tail}
        before = {name: modules[name] for name in changed}
        given = {"input_ids": input_ids} if hidden is None else {"input_ids": None, "inputs_embeds": hidden}
        modules.update(changed)
        try:
            return self._whole(**{**arguments, **given})
        finally:
            modules.update(before)

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self._exchange is not None
        if self._now is not None:
            return self._head(hidden)  # type: ignore[no-any-return]
        return self._exchange.logits(self._head(hidden) if self.share.last else None, self._device)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        """Hidden states must go through a decoder without layers unchanged: nothing else is done between stages."""
        hidden = torch.linspace(-1, 1, 6 * self._width, device=self._device).view(1, 6, -1)
        hidden = hidden.to(self._embedding.weight.dtype)
        bounds = torch.tensor([0, 6], dtype=torch.int32, device=self._device)
        arguments = {
            "position_ids": torch.arange(6, device=self._device)[None],
            "use_cache": False,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": 6,
            "max_length_k": 6,
        }
        try:
            out = self._run(self._list(range(0)), False, None, hidden, arguments).last_hidden_state
        except Exception as error:
            raise _no_stages(model) from error
        if not torch.equal(out, hidden):
            raise _no_stages(model)
