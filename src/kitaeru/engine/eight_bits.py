"""Before training: what products in 8 bits cost, in loss, on the examples that are to be trained on.

A few thousand tokens go forward with the layers' own code and with the products in 8 bits. Where the two losses lie too
far apart, the products that lose most are computed in 16 bits: first the MLP's last one, whose input has the largest
outliers, then queries, keys and values, then all. What each costs on real models: docs/notes/0017.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitaeru.data.batches import MicroBatches, eval_batches
from kitaeru.i18n import N_, tr

if TYPE_CHECKING:
    from kitaeru.engine.loop import Loop

TOKENS = 16384
# Of the loss. Training takes part of it back, since the adapter learns beside the products that it is added to.
MOST = 0.003
# What goes to 16 bits, in this order.
STEPS = (("down",), ("qkv",), ("both", "out"))
_NAMES = (
    "",
    N_("the MLP's last product in 16 bits"),
    N_("the MLP's last product and queries, keys and values in 16 bits"),
    N_("all products in 16 bits"),
)


def settle_eight_bits(loop: Loop) -> None:
    """Keep products in 8 bits as far as the loss stays within `MOST` of what it is without; say what it was.

    A recipe that names the arithmetic gets it, and is told the loss. All ranks see the same losses and do the same;
    neither weights nor random numbers change.
    """
    trainee, world = loop.trainee, loop.world
    plan = trainee.plan
    eight = [layer for layer in trainee.fused if layer.both.arithmetic != "16bit"]
    if not plan.layout.in_8_bits or not world.any(bool(eight)):
        return
    decided = any(decision.path == "train.arithmetic" for decision in plan.decisions)
    batches = _examples(loop)
    for layer in trainee.fused:
        layer.on = False
    own = loop.mean_loss(batches)
    for layer in trainee.fused:
        layer.on = True
    shifts: list[float] = []
    for sites in ((), *STEPS) if decided else ((),):
        for layer in eight:
            for site in sites:
                layer.widen(site)
        loss = loop.mean_loss(batches)
        if own is None or loss is None:
            return  # out of memory: the largest micro-batch, which is tried next, says so and what to do
        shifts.append(loss / own - 1)
        if abs(shifts[-1]) <= MOST:
            break
    found = tr(
        "Products in 8 bits change the loss by {share:+.2%} on {tokens} tokens of your examples.",
        share=shifts[0],
        tokens=f"{sum(batches.tokens):,}",
    )
    if len(shifts) > 1:
        name = tr(_NAMES[len(shifts) - 1])
        found += " " + tr("With {what} it is {share:+.2%}: so they are computed.", what=name, share=shifts[-1])
    elif abs(shifts[0]) > MOST:
        found += " " + tr("The recipe asks for them; train.arithmetic=auto takes 16 bits where they are needed.")
    trainee.say(found, "info" if abs(shifts[0]) <= MOST else "warning")


def _examples(loop: Loop) -> MicroBatches:
    """About `TOKENS` tokens of the training examples, evenly spread; of a longer one what ends where training does."""
    layout, train = loop.trainee.plan.layout, loop.train
    count = max(1, round(TOKENS * len(train) / max(1, int(train.lengths.clip(max=TOKENS).sum()))))
    return eval_batches(
        train.ends(TOKENS, count) if train.facts.longest > TOKENS else train,
        micro_batch_tokens=layout.micro_batch_tokens,
        packing=loop.trainee.plan.recipe.data.packing,
        max_examples=count,
    )
