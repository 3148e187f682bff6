"""How many bytes each device of a layout takes: what one device would (`plan.memory`), shared out as the strategy does.

A pipeline stage is a model with fewer layers; a tensor-parallel rank one with fewer heads and a narrower MLP. FSDP and
ZeRO divide what is stored and gather the weights of the layers at work. Single-device counts are measured on a GPU
(tests); how they are shared out is derived from the strategies' own rules and not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from kitaeru.plan.deepspeed import BUCKET_NUMBERS
from kitaeru.plan.from_ram import device_moments
from kitaeru.plan.layouts import SHARDED, ZERO
from kitaeru.plan.memory import CPU_PROCESS_BYTES, ITEMS, moments, stored_items, validation_bytes
from kitaeru.plan.pipeline import in_flight
from kitaeru.plan.stored import (
    Setting,
    compute_bytes,
    residual_bytes,
    trained_parameters,
    trains_all,
    trains_from_ram,
    weight_bytes,
)
from kitaeru.plan.types import Layout
from kitaeru.shape import ModelShape

# Gradients are summed in buckets, five of them on the way at a time (parallel.reducer).
BUCKETS_BYTES = 5 * (32 << 20)
# A sharded strategy gathers the next layer's weights while one is at work.
LAYERS_GATHERED = 2
PHASES = ("loading", "first_step", "steady_step", "evaluation", "saving")

Items = dict[str, int]


@dataclass(frozen=True)
class Part:
    """What one rank holds: a model of its own, whether the head is in it, how many micro-batches it keeps at once."""

    shape: ModelShape
    head: bool = True
    sets: float = 1.0


def part_of(layout: Layout, shape: ModelShape, rank: int, micro_batches: int) -> Part:
    """What rank `rank` of a replica holds.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> cut = Layout("pipeline", "qlora", "nf4", "bf16", "keep", 2048, "cuda", 2, "1f1b", cuts=(17, 15))
    >>> first, last = (part_of(cut, llama, rank, 8) for rank in (0, 1))
    >>> (first.shape.layers, first.head, first.sets), (last.shape.layers, last.head, last.sets)
    ((17, False, 2.0), (15, True, 1.0))
    """
    ranks = layout.ranks_per_replica
    if layout.strategy == "tensor":
        return Part(_narrowed(shape, ranks))
    if layout.strategy not in ("pipeline", "model_parallel") or ranks == 1:
        return Part(shape)
    layers = sum(layout.cuts[rank::ranks])
    first, last = rank == 0, rank == ranks - 1
    sets = in_flight(layout.variant, rank, ranks, micro_batches, layout.chunks) / layout.chunks
    return Part(_shortened(shape, layers, first, last), last, sets)


@lru_cache(maxsize=64)
def _narrowed(shape: ModelShape, ranks: int) -> ModelShape:
    return replace(
        shape,
        heads=-(-shape.heads // ranks),
        kv_heads=-(-shape.kv_heads // ranks),
        intermediate=-(-shape.intermediate // ranks),
        expert_intermediate=-(-shape.expert_intermediate // ranks),
        shared_expert_intermediate=-(-shape.shared_expert_intermediate // ranks),
    )


@lru_cache(maxsize=1024)
def _shortened(shape: ModelShape, layers: int, first: bool, last: bool) -> ModelShape:
    """A stage as a model: its layers, and the input table on the first, the output table on the last."""
    return replace(
        shape,
        layers=layers,
        sliding_layers=min(layers, -(-shape.sliding_layers * layers // shape.layers)),
        dense_layers=min(layers, shape.dense_layers * layers // shape.layers),
        vocab=shape.vocab if first or last else 0,
        tied=shape.tied or not (first and last),
        learned_positions=shape.learned_positions if first else 0,
    )


def rank_moments(layout: Layout, shape: ModelShape, setting: Setting, rank: int, micro_batches: int) -> list[Items]:
    """Bytes by item on one rank of a replica at each moment of a step that may be its fullest."""
    part = part_of(layout, shape, rank, micro_batches)
    if trains_from_ram(layout):
        every = device_moments(layout, shape, setting)
    else:
        stored = stored_items(layout, part.shape, setting)
        passing = moments(layout, part.shape, setting, sets=part.sets, head=part.head)
        every = [{**stored, **moment} for moment in passing]
    if layout.devices > 1 and not trains_from_ram(layout):
        every = [_shared(layout, shape, setting, moment, last=i == len(every) - 1) for i, moment in enumerate(every)]
    if layout.device == "cpu":
        every = [{**moment, "process": CPU_PROCESS_BYTES} for moment in every]
    return every


def rank_items(layout: Layout, shape: ModelShape, setting: Setting, rank: int, micro_batches: int) -> Items:
    """Bytes by item on one rank when their sum is largest; they add up to the rank's predicted peak."""
    every = rank_moments(layout, shape, setting, rank, micro_batches)
    worst = max(every, key=lambda moment: sum(moment.values()))
    return {name: worst[name] for name in ITEMS if worst.get(name)}


def _shared(layout: Layout, shape: ModelShape, setting: Setting, moment: Items, *, last: bool) -> Items:
    """A moment of one device as the strategy shares it out; `last` is the optimizer's step."""
    if layout.strategy == "ddp":
        return {**moment, "communication": min(BUCKETS_BYTES, moment.get("gradients", 0))}
    if layout.strategy in ("fsdp", *ZERO):
        return _divided(layout, shape, setting, moment, last=last)
    width = layout.micro_batch_tokens * shape.hidden
    if layout.strategy == "tensor":
        # The largest sum of gradients is that of a table, which is whole on every rank; afterwards there are no others.
        largest = max(BUCKETS_BYTES, 4 * shape.vocab * shape.hidden)
        sums = min(largest, moment.get("gradients", 0)) if last else 2 * compute_bytes(layout) * width
        return {**moment, "communication": sums}
    copies = min(BUCKETS_BYTES, moment.get("gradients", 0)) if layout.replicas > 1 else 0
    return {**moment, "communication": copies if last else copies + 4 * residual_bytes(layout) * width}


def _divided(layout: Layout, shape: ModelShape, setting: Setting, moment: Items, *, last: bool) -> Items:
    """FSDP and ZeRO: what is stored is divided by the devices as far as the strategy divides it.

    FSDP leaves an adapter and the constants of a base in 4 bits whole on every rank, and gathers weights as they are
    stored; with `offload` what it divides is in RAM.
    """
    shared = dict(moment)
    trained = trained_parameters(layout, shape, setting.lora)
    if layout.strategy in ZERO:
        _with_deepspeeds_own(shared, layout, trained, last=last)
    for name in _divided_items(layout) & shared.keys():
        shared[name] = -(-shared[name] // layout.shared_by)
    shared["communication"] = _reduction_bytes(layout, shape, trained)
    if layout.strategy in SHARDED and not last:
        shared["gathered"] = gathered_bytes(layout, shape)
    if layout.variant.startswith("offload"):
        if trains_all(layout):
            shared.pop("optimizer", None)
            shared.pop("gradients", None)
            shared["communication"] += 4 * shape.vocab * shape.hidden  # the largest gradient, on its way to RAM
        if layout.variant == "offload-all" or layout.strategy == "fsdp":
            shared["weights"] = 0
    return shared


def _divided_items(layout: Layout) -> set[str]:
    if layout.strategy == "fsdp" and not trains_all(layout):
        return {"weights"}
    divided = {"optimizer", "gradients"} - ({"gradients"} if layout.strategy == "zero1" else set())
    return divided | ({"weights"} if layout.strategy in SHARDED else set())


def _with_deepspeeds_own(shared: Items, layout: Layout, trained: int, *, last: bool) -> None:
    """DeepSpeed's optimizer works on a 32-bit copy of its own, in pieces like the moments. Pieces of gradients are
    there twice: as they were and as they add up (stage 2), or from the start and once more for the step.
    """
    shared["optimizer"] = shared.get("optimizer", 0) + 4 * trained
    if layout.strategy == "zero1":
        shared["gradients"] = shared.get("gradients", 0) + (4 * trained // layout.devices if last else 0)
    elif layout.strategy == "zero2":
        shared["gradients"] = 2 * shared.get("gradients", 0)
    else:
        shared["gradients"] = 4 * trained * (2 if last else 1)


def _reduction_bytes(layout: Layout, shape: ModelShape, trained: int) -> int:
    """Gradients on their way to the device that owns them: those of the layers at work, of adapters a few buckets."""
    if layout.strategy in ZERO:
        return 4 * min(BUCKET_NUMBERS, trained)
    if not trains_all(layout):
        return min(BUCKETS_BYTES, 4 * trained)
    return LAYERS_GATHERED * 4 * (trained // shape.layers)


def layer_weight_bytes(layout: Layout, shape: ModelShape) -> tuple[int, int]:
    """Weights of one layer and of the tables outside the layers as they are sent: as they are stored."""
    outside = shape.embedding_parameters() * (4 if trains_all(layout) else compute_bytes(layout))
    return -(-(sum(weight_bytes(layout, shape)) - outside) // shape.layers), outside


def gathered_bytes(layout: Layout, shape: ModelShape) -> int:
    """Weights a sharding strategy holds whole for a while: layers at work and the tables; with `grad` all of them."""
    layer, outside = layer_weight_bytes(layout, shape)
    if layout.strategy == "fsdp" and layout.base == "nf4":  # the constants are there already
        layer -= weight_bytes(layout, shape)[1] // shape.layers
    return outside + layer * (shape.layers if layout.variant == "grad" else min(LAYERS_GATHERED, shape.layers))


# --- the phases of a run ----------------------------------------------------------------------------------------------


def phase_peaks(layout: Layout, shape: ModelShape, setting: Setting, rank: int, micro_batches: int) -> dict[str, int]:
    """Peak of allocated bytes of one rank in each phase of a run (`PHASES`).

    Loading: what is stored, and one weight in 16 bits while it is packed; with fsdp, zero3 and tensor also the layer
    that is being cut and the next one, whole. First step: as a steady one, but the optimizer has no state before its
    step. Evaluation: a forward pass that keeps nothing. Saving: what is stored, and one layer gathered. What CUDA
    graphs take stays taken in both.
    """
    every = rank_moments(layout, shape, setting, rank, micro_batches)
    part = part_of(layout, shape, rank, micro_batches)
    lasting = ("weights", "quantization", "adapter", "optimizer", "libraries", "process")
    stored = {name: every[-1].get(name, 0) for name in lasting}
    resident = sum(stored.values()) - stored["optimizer"]
    packed = 2 * max(linear.weights for linear in shape.linears()) if layout.base != "none" else 0
    forward = validation_bytes(layout, part.shape, setting, head=part.head)
    gathered = max(moment.get("gathered", 0) for moment in every)
    if trains_from_ram(layout):  # a layer is read in 32 bits, and the next one
        packed += LAYERS_GATHERED * layer_weight_bytes(layout, shape)[0]
    elif layout.strategy in SHARDED:
        packed += gathered_bytes(replace(layout, variant=""), shape)
    elif layout.strategy == "tensor":
        packed += LAYERS_GATHERED * layer_weight_bytes(layout, shape)[0]
    beside = every[-1].get("graphs", 0)
    whole = [sum(moment.values()) - beside for moment in every]
    without = [size - moment.get("optimizer", 0) for size, moment in zip(whole[:-1], every[:-1], strict=True)]
    steady, lasts = max(whole), resident + stored["optimizer"]
    return {
        "loading": resident + packed,
        "first_step": max([*without, whole[-1]]),
        "steady_step": steady,
        "evaluation": steady + beside if layout.graphs else lasts + gathered + forward,
        "saving": steady if layout.graphs else lasts + (gathered if layout.strategy in SHARDED else 0),
    }
