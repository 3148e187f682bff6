"""Tensors that wait for their backward pass in the host's memory: what goes into layers that are computed again.

Copies go over a stream of their own. On the way out a tensor stays on the device until its copy is done, and at most
`LEAVING` do so at a time; on the way back the one that is wanted next is fetched while a layer computes. Memory of the
device that a copy reads or writes is held by a reference until the computing stream has been told to wait for the copy,
so the allocator never gives it to somebody else too early. Host memory is pinned in pieces of one size, which are used
again: torch rounds what it pins to powers of two. On a CPU the same is done without streams.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kitaeru.plan.activations import LEAVING, PIECE_BYTES


class Held:
    """One tensor in the host's memory; `take` brings it back."""

    def __init__(self, host: Host, like: Tensor, before: Held | None) -> None:
        self.host, self.shape, self.dtype = host, like.shape, like.dtype
        self.pieces: list[Tensor] = []
        self.tensor: Tensor | None = None  # on the device: leaving, or fetched
        self.copied: torch.cuda.Event | None = None
        self.before = None if before is None else weakref.ref(before)

    def take(self) -> Tensor:
        """The tensor, on its device; the one that was put before it is sent for."""
        return self.host.take(self)

    def __del__(self) -> None:
        self.host.pieces += self.pieces  # a later copy into them waits its turn on the same stream


class Host:
    """Where the tensors of one device wait. `pieces` are those that are free."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pieces: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[Held] = deque()
        self._coming: Held | None = None
        self._last: weakref.ref[Held] | None = None

    def attach(self, decoder: nn.Module) -> None:
        """Begin anew whenever this decoder begins a forward pass."""
        decoder.register_forward_pre_hook(lambda *_: self.begin())

    def begin(self) -> None:
        """A forward pass begins: nothing that was put before belongs to it."""
        for held in (*self._leaving, *([self._coming] if self._coming else ())):
            self._let_go(held)
        self._leaving.clear()
        self._coming = self._last = None

    def put(self, tensor: Tensor) -> Held:
        """Send a tensor away; whoever gave it may forget it."""
        held = Held(self, tensor, None if self._last is None else self._last())
        held.tensor = tensor.detach().contiguous()
        wanted = -(-held.tensor.nbytes // PIECE_BYTES)
        held.pieces = [self._piece() for _ in range(wanted)]
        self._copy(held, out=True)
        self._leaving.append(held)
        while len(self._leaving) > LEAVING:
            self._let_go(self._leaving.popleft())
        self._last = weakref.ref(held)
        return held

    def take(self, held: Held) -> Tensor:
        """What `Held.take` gives."""
        if held.tensor is None:
            self._fetch(held)
        tensor = held.tensor
        assert tensor is not None
        self._let_go(held)
        if held in self._leaving:
            self._leaving.remove(held)
        if self._coming is not None and self._coming is not held:
            self._let_go(self._coming)
        self._coming = None
        before = None if held.before is None else held.before()
        if before is not None and before.tensor is None:
            self._fetch(before)
            self._coming = before
        return tensor

    def checkpointed(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A way to call `torch.utils.checkpoint` that keeps the first argument of what is called here."""

        def call(function: Callable[..., Any], hidden: Tensor, *arguments: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return checkpoint(function, hidden, *arguments, **options)
            place = hidden.data_ptr()

            def pack(tensor: Tensor) -> Tensor | Held:
                return self.put(tensor) if tensor.data_ptr() == place and tensor.shape == hidden.shape else tensor

            with saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, Held) else kept):
                return checkpoint(function, hidden, *arguments, **options)

        return call

    def _piece(self) -> Tensor:
        if self.pieces:
            return self.pieces.pop()
        return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)

    def _fetch(self, held: Held) -> None:
        held.tensor = torch.empty(held.shape, dtype=held.dtype, device=self.device)
        self._copy(held, out=False)

    def _copy(self, held: Held, *, out: bool) -> None:
        assert held.tensor is not None
        flat = held.tensor.view(-1).view(torch.uint8)
        if self._stream is not None:  # what was computed, or what lay in this memory before, is done with first
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for piece, part in zip(held.pieces, flat.split(PIECE_BYTES), strict=True):
                here = piece[: len(part)]
                (here if out else part).copy_(part if out else here, non_blocking=True)
            held.copied = None if self._stream is None else self._stream.record_event()

    def _let_go(self, held: Held) -> None:
        """From here on the computing stream may use the memory of the device as it likes."""
        if held.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(held.copied)
        held.tensor = None
