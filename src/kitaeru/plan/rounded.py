"""What products of trained weights in 8 bits cost (`model.rounded`): full training whose arithmetic is `fp8` or `int8`.

Of a linear layer's three products two are in 8 bits; apart from that layers run as their authors wrote them.
"""

from __future__ import annotations

from kitaeru.plan.stored import compute_bytes, residual_bytes, trains_all, trains_from_ram
from kitaeru.plan.types import Layout
from kitaeru.shape import Linear, ModelShape

# Strategies that are known to train so: when a layer computes, its weights are there, whole.
STRATEGIES = ("single", "ddp", "fsdp", "pipeline", "model_parallel")


def is_rounded(layout: Layout) -> bool:
    """Whether products of trained weights are computed in 8 bits."""
    return layout.in_8_bits and trains_all(layout)


def passing_bytes(layout: Layout, shape: ModelShape) -> int:
    """What a layer's backward pass holds while it rounds, before the gradient of a weight is there: a gradient in 8
    bits, and a weight turned over, in the arithmetic's width and in 8 bits.
    """
    if not is_rounded(layout):
        return 0
    widest = max(linear.weights for linear in shape.linears())
    return layout.micro_batch_tokens * shape.intermediate + (compute_bytes(layout) + 1) * widest


def rounding_bytes(layout: Layout, shape: ModelShape, *, forward: bool) -> float:
    """Bytes moved to round one layer's weights for a pass of a micro-batch: read and written; for the backward pass
    turned over in the arithmetic's width before.
    """
    here = compute_bytes(layout) if trains_from_ram(layout) else 4
    a_weight = here + 1 if forward else here + 2 * compute_bytes(layout) + 1
    return a_weight * shape.linear_parameters() / shape.layers


def row_bytes(layout: Layout, shape: ModelShape, *, forward: bool) -> float:
    """Bytes moved for one token in one layer to cast and round what its linear layers read, once for all that read it;
    and on the way back to round each one's gradient, to add up those of what they read, and to cast the sum.
    """
    c, r, linears = compute_bytes(layout), residual_bytes(layout), shape.linears()
    cast = r + c if r != c else 0
    readers = first_readers(linears)
    inputs = sum(linear.count * linear.inputs for linear in readers) / shape.layers
    if forward:
        return (cast + c + 1) * inputs
    outputs = sum(linear.count * linear.outputs for linear in linears) / shape.layers
    every = sum(linear.count * linear.inputs for linear in linears) / shape.layers
    return (c + 1) * outputs + cast * inputs + 3 * c * (every - inputs)


def turning_flops(layout: Layout, shape: ModelShape, *, forward: bool) -> float:
    """FLOP in 16 bits that turn one layer's rows for INT8 (`fused.turning_flops`), what is read or each gradient, and
    its weights.
    """
    if layout.arithmetic != "int8":
        return 0.0
    linears = shape.linears()
    found = [linear.count * linear.inputs for linear in first_readers(linears)]
    rows = found if forward else [linear.count * linear.outputs for linear in linears]
    return 64.0 * (layout.micro_batch_tokens * sum(rows) + shape.linear_parameters()) / shape.layers


def first_readers(linears: tuple[Linear, ...]) -> list[Linear]:
    """One linear layer for each tensor read."""
    first: dict[tuple[str, int], Linear] = {}
    for linear in linears:
        first.setdefault((linear.reads, linear.inputs), linear)
    return list(first.values())
