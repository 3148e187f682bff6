"""AdamW for weights that lie in RAM, its moments in 16 bits: 8 bytes a weight beside its gradient instead of 12.

A bf16 number has 8 bits of precision, and with beta2 = 0.999 the second moment moves by a thousandth of itself a step:
rounded to the nearest, it would never move. So a moment is rounded up or down by chance, up the more likely the nearer
it is. Then its expected value is exact in every step, and since moments are linear in what they were before, so it is
after any number of steps. What is left is noise, another for every weight: measured, 3 to 6 % of the second moment with
beta2 = 0.999 (half as much of a weight's step), and 0.5 % of the first with beta1 = 0.9.

The arithmetic is torch's fused AdamW in 32 bits, on as much at a time as stays in the processor's caches; what crosses
to RAM are 20 bytes a weight: weight and moments there and back, the gradient there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

# Weights that a thread works on at a time: enough that starting an operation does not count.
CHUNK = 1 << 17
# Numbers by chance are drawn once, each of 16 bits as often as any other, and read from another place in each step.
# The second moment's are so far from the first's.
PERIOD, APART = 1 << 20, 500_009
_HIGH_HALF = -(1 << 16)


class AdamW16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with moments in bf16, rounded by chance. For contiguous fp32 CPU parameters.

    `places` gives for each parameter its name, and the number of its first weight in the whole parameter: rounding
    depends on these and on the count of steps alone, so that a resumed run, or one on another number of ranks, rounds
    alike.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        places: Mapping[nn.Parameter, tuple[str, int]],
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._places = places
        self._scale = 1.0

    def clip(self, most: float, norm: float) -> None:
        """Have the next step scale gradients of this norm down to `most`, without a pass over them for that alone."""
        self._scale = min(1.0, most / (norm + 1e-6))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in self.MOMENTS:
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                self._update(parameter, state, group)
        self._scale = 1.0

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One parameter, a part at a time."""
        assert parameter.grad is not None
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        moments = [state[kind].view(-1) for kind in self.MOMENTS]
        name, first = self._places[parameter]
        offset = zlib.crc32(f"{name} {int(state['step'])}".encode()) + first
        size = CHUNK * torch.get_num_threads()
        chances = _chances(size)
        most = min(size, len(weights))
        wide, scaled = torch.empty(len(moments), most), torch.empty(most)
        for start in range(0, len(weights), size):
            part = slice(start, min(start + size, len(weights)))
            length = part.stop - part.start
            here = wide[:, :length]
            for moment, now in zip(moments, here, strict=True):
                now.copy_(moment[part])
            torch._fused_adamw_(
                [weights[part]],
                [torch.mul(gradients[part], self._scale, out=scaled[:length]) if self._scale < 1 else gradients[part]],
                [here[0]],
                [here[1]],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            # A number by chance below the lowest bit that is kept carries into it as often as it should.
            by_chance = chances[(offset + start) % PERIOD :].as_strided(here.shape, (APART, 1))
            here.view(torch.int32).add_(by_chance).bitwise_and_(_HIGH_HALF)
            for moment, now in zip(moments, here, strict=True):
                moment[part].copy_(now)


@lru_cache(maxsize=1)
def _chances(size: int) -> Tensor:
    """int32 below 2**16: any `size` neighbours that begin in the first PERIOD, and as many APART from them."""
    drawn = (torch.randperm(PERIOD, generator=torch.Generator().manual_seed(0)) % (1 << 16)).to(torch.int32)
    return drawn.repeat(2 + -(-size // PERIOD))[: PERIOD + APART + size]
