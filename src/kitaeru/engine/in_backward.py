"""The optimizer's step of each parameter as soon as its gradient is there, in the middle of the backward pass; then the
gradient is let go of, so that gradients are never all there at once.

A parameter's gradient is there when all that reads the parameter has been gone back through, so nothing of the pass
still needs the old value. What cannot be done so: anything that looks at all gradients before weights change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kitaeru.parallel.types import Named

# What becomes of a gradient: it stays for others; it changes its parameter; it is set to 0 first, so that the step only
# takes its memory; it is let go of.
Doing = Literal["keep", "step", "rehearse", "drop"]


class InBackward:
    """Steps of `optimizer`, one parameter of `named` at a time, in backward passes inside `doing`; elsewhere gradients
    stay. `moved`: whether weights have changed since the last `doing` began.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named: Named) -> None:
        self.moved = False
        self._optimizer = optimizer
        self._doing: Doing = "keep"
        self._squares: dict[str, Tensor] = {}
        names = {parameter: name for name, parameter in named}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, names[parameter], group))

    @contextmanager
    def doing(self, what: Doing) -> Iterator[None]:
        """Do this with the gradients of the passes inside."""
        self._doing, self.moved = what, False
        self._squares.clear()
        try:
            yield
        finally:
            self._doing = "keep"

    def drop(self) -> None:
        """The rest of this `doing` changes nothing; outside of one, nothing is to be kept from changing."""
        if self._doing != "keep":
            self._doing = "drop"

    @property
    def half_done(self) -> bool:
        """Whether weights have changed in a pass that is not over."""
        return self.moved and self._doing != "keep"

    def norm(self) -> Tensor:
        """The norm of the last gradient, in 64 bits."""
        return torch.stack(list(self._squares.values())).sum().sqrt()

    def alive(self) -> set[str]:
        """Parameters whose last gradient was not all 0."""
        return {name for name, square in self._squares.items() if bool(square != 0)}

    def _arrived(self, name: str, group: dict[str, Any], parameter: nn.Parameter) -> None:
        if self._doing == "keep":
            return
        assert parameter.grad is not None
        # As in `single.squares`: of one tensor alone a norm in 64 bits would make a copy that wide.
        self._squares[name] = torch._foreach_norm([parameter.grad], dtype=torch.float64)[0].square()
        if self._doing == "rehearse":
            parameter.grad.zero_()
        if self._doing != "drop":
            self.moved = self._doing == "step"
            every = self._optimizer.param_groups
            self._optimizer.param_groups = [{**group, "params": [parameter]}]
            try:
                self._optimizer.step()
            finally:
                self._optimizer.param_groups = every
        parameter.grad = None
