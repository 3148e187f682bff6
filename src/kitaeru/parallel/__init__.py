"""How devices share the work: one module per strategy, each with the functions of `Strategy`, and one table of them."""

from __future__ import annotations

from kitaeru.parallel import ddp, fsdp, model_parallel, offload, pipeline, single, tensor, zero
from kitaeru.parallel.types import Strategy
from kitaeru.plan.stored import trains_from_ram
from kitaeru.plan.types import Layout

STRATEGIES: dict[str, Strategy] = {
    "single": single,
    "ddp": ddp,
    "fsdp": fsdp,
    "pipeline": pipeline,
    "model_parallel": model_parallel,
    "tensor": tensor,
    "zero1": zero,
    "zero2": zero,
    "zero3": zero,
}
# Ranks of these do not meet inside a pass: one that runs out of memory can give its passes up and still take part in
# what follows.
APART = ("single", "ddp")


def strategy_of(layout: Layout) -> Strategy:
    """What carries a layout out: its strategy's module, or one for weights that lie in RAM."""
    return offload if trains_from_ram(layout) else STRATEGIES[layout.strategy]
