"""Before training: what products in 8 bits cost, in loss and in gradient, on the examples that are to be trained on.

A few thousand tokens go forward with the layers' own code and with the products in 8 bits, and half as many backward.
Where the losses or the gradients lie too far apart, the products that lose most are computed in 16 bits: first the
MLP's last one, whose input has the largest outliers, then queries, keys and values, then all. What each costs on real
models: docs/notes/0017 and 0019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kitaeru.data.batches import MicroBatches, eval_batches
from kitaeru.engine.preflight import undrawn
from kitaeru.i18n import N_, tr
from kitaeru.plan.fused import is_fused
from kitaeru.plan.stored import trains_all, trains_from_ram

if TYPE_CHECKING:
    from kitaeru.engine.loop import Loop
    from kitaeru.model.fused import FusedLayer
    from kitaeru.model.rounded import RoundedLayer

TOKENS = 16384
# Of the loss. Training takes part of it back, since the adapter learns beside the products that it is added to.
MOST = 0.003
# Tokens that go backward too, and of one micro-batch of them at most: half of what training has at a time or less,
# since the layers' own code needs more room for a token than fused layers do.
GRADIENT_TOKENS, AT_ONCE = 8192, 4096
# The least cosine of the adapters' gradient with that of the layers' own code, and how much longer or shorter it may
# be. Where these come from: docs/notes/0019.
LEAST, LONGER = 0.95, 1.2
# What goes to 16 bits, in this order.
STEPS = (("down",), ("qkv",), ("both", "out"))
_NAMES = (
    "",
    N_("the MLP's last product in 16 bits"),
    N_("the MLP's last product and queries, keys and values in 16 bits"),
    N_("all products in 16 bits"),
)


@dataclass(frozen=True)
class Compared:
    """8 bits beside the layers' own code: by what share the loss differs, the cosine of the gradients, and how many
    times as long theirs is; None where there was no gradient to compare, or no memory for it.
    """

    shift: float
    cosine: float | None = None
    length: float | None = None

    @property
    def near(self) -> bool:
        """Near enough to train with; nan is not."""
        gradient = (
            self.cosine is None or self.length is None or (self.cosine >= LEAST and 1 / LONGER <= self.length <= LONGER)
        )
        return abs(self.shift) <= MOST and gradient

    def __str__(self) -> str:
        if self.cosine is None:
            return f"{self.shift:+.2%}"
        return tr(
            "{share:+.2%} (cosine of the gradients {cosine:.3f}, size {length:.2f})",
            share=self.shift,
            cosine=self.cosine,
            length=self.length,
        )


def settle_eight_bits(loop: Loop) -> None:
    """Keep products in 8 bits as far as loss and gradient stay near what they are without; say what they were.

    Under an adapter a recipe that names the arithmetic gets it, and is told. All ranks see the same numbers and do the
    same; weights, random numbers and the optimizer stay as they are, and no gradient is left.
    """
    trainee, world = loop.trainee, loop.world
    plan = trainee.plan
    layers: tuple[FusedLayer | RoundedLayer, ...] = trainee.fused or trainee.rounded
    eight = [layer for layer in layers if layer.in_8_bits]
    if not plan.layout.in_8_bits or not world.any(bool(eight)):
        return
    # Full training has 8 bits only where a recipe names them, and then as far as they are good enough.
    decided = trains_all(plan.layout) or any(decision.path == "train.arithmetic" for decision in plan.decisions)
    at_once = min(AT_ONCE, max(2, plan.layout.micro_batch_tokens // 2))
    batches = _examples(loop, TOKENS, TOKENS, plan.layout.micro_batch_tokens)
    gradients = _Gradients(loop, _examples(loop, GRADIENT_TOKENS, at_once, at_once))
    for layer in layers:
        layer.on = False
    own = loop.mean_loss(batches)
    gradients.keep_own()
    for layer in layers:
        layer.on = True
    found: list[Compared] = []
    for sites in ((), *STEPS) if decided else ((),):
        for layer in eight:
            for site in sites:
                layer.widen(site)
        loss = loop.mean_loss(batches)
        if own is None or loss is None:
            return  # out of memory: the largest micro-batch, which is tried next, says so and what to do
        found.append(world.said(Compared(loss / own - 1, *gradients.compare())))
        if found[-1].near:
            break
    if trainee.device.type == "cuda":
        torch.cuda.empty_cache()  # the layers' own code has left blocks of other sizes than training uses
    text = tr(
        "Products in 8 bits change the loss by {found} on {tokens} tokens of your examples.",
        found=found[0],
        tokens=f"{sum(batches.tokens):,}",
    )
    if not found[0].near:
        text += " " + tr(
            "At most {share:.1%} is allowed, a cosine of {cosine:.2f} or more, and a size within {length:.1f} times.",
            share=MOST,
            cosine=LEAST,
            length=LONGER,
        )
    if len(found) > 1:
        name = tr(_NAMES[len(found) - 1])
        text += " " + tr("With {what} it is {found}: so they are computed.", what=name, found=found[-1])
    elif not found[0].near:
        text += " " + tr("The recipe asks for them; train.arithmetic=auto takes 16 bits where they are needed.")
    trainee.say(text, "info" if found[0].near else "warning")


class _Gradients:
    """The gradient of some examples with the layers' own code, and others beside it.

    Before training B is nought, unless the adapter starts otherwise, and so is the gradient of A, however the products
    are computed: what is compared then is that of B, scaling dy^T (x A^T). It sees all that is wrong with the incoming
    dy, and with x along the random directions of A, so nothing that would also show in the gradient of A is hidden.

    In full training it is that of all weights. Where they lie in RAM there is no room for a second one, where they
    change in the backward pass none for a first, and so no comparison.
    """

    def __init__(self, loop: Loop, batches: MicroBatches) -> None:
        self._loop, self._batches = loop, batches
        self._own: list[torch.Tensor | None] = []
        self._length: float | None = None

    def keep_own(self) -> None:
        """Take the gradient with the layers' own code, fused layers computed again on the way back; keep it in RAM."""
        trainee = self._loop.trainee
        model, layout = trainee.causal_lm, trainee.plan.layout
        if trains_from_ram(layout) or (trains_all(layout) and layout.step_in_backward):
            return
        if is_fused(layout):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            self._length = self._take()
            self._own = [None if p.grad is None else p.grad.cpu() for _, p in trainee.named]
        finally:
            if is_fused(layout):
                model.gradient_checkpointing_disable()
            self._forget()

    def compare(self) -> tuple[float | None, float | None]:
        """The cosine of the gradient with the own one, and how many times as long it is."""
        if not self._length or not math.isfinite(self._length):
            return None, None
        trainee = self._loop.trainee
        try:
            length = self._take()
            if length is None:
                return None, None
            for (_, parameter), own in zip(trainee.named, self._own, strict=True):
                if own is not None:
                    here = own.to(parameter.device)
                    parameter.grad = -here if parameter.grad is None else parameter.grad.sub_(here)
            # The strategy measures what lies on several ranks; the angle follows from the three sides.
            apart = float(trainee.strategy.norm(trainee.held))
        finally:
            self._forget()
        between = length**2 + self._length**2 - apart**2
        return between / (2 * length * self._length) if length else 0.0, length / self._length

    def _take(self) -> float | None:
        """Compute the gradient; its length, None when memory ran out."""
        loop = self._loop
        with undrawn(loop.trainee):
            shares = loop._gradients(self._batches, self._batches.trained_tokens, 0)
        return None if shares is None else float(loop.trainee.strategy.norm(loop.trainee.held))

    def _forget(self) -> None:
        self._loop.trainee.optimizer.zero_grad(set_to_none=True)


def _examples(loop: Loop, tokens: int, longest: int, at_once: int) -> MicroBatches:
    """About so many tokens of the training examples, evenly spread, in micro-batches of `at_once` at most; of an
    example with more than `longest` what ends where training does.
    """
    train = loop.train
    count = max(1, round(tokens * len(train) / max(1, int(train.lengths.clip(max=longest).sum()))))
    return eval_batches(
        train.ends(longest, count) if train.facts.longest > longest else train,
        micro_batch_tokens=at_once,
        packing=loop.trainee.plan.recipe.data.packing,
        max_examples=count,
    )
