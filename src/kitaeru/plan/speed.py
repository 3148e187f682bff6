"""How long a step takes: work (`plan.work`) at a device's rates (`plan.rates`), with what the strategy adds.

On a device, arithmetic, attention, memory traffic and unpacking follow one another; the host launches beside them, and
the slower of the two decides. Communication and offload traffic hide behind a layer's computation as far as it lasts.
Pipelines are simulated. Every step is priced at likely, low and high rates, and the answer is that range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from kitaeru.hardware import Device, Hardware
from kitaeru.i18n import N_
from kitaeru.plan import fused
from kitaeru.plan.activations import offloaded_bytes
from kitaeru.plan.calibrate import AttentionKind, Profile
from kitaeru.plan.from_ram import Traffic, layer_seconds, step_seconds
from kitaeru.plan.layouts import DISK, SHARDED, ZERO
from kitaeru.plan.pipeline import balanced_cuts, schedule_seconds
from kitaeru.plan.ranks import layer_weight_bytes, part_of
from kitaeru.plan.rates import LinkRates, Rates, cpu_rates, device_rates, link_rates
from kitaeru.plan.stored import Setting, compute_bytes, residual_bytes, trained_parameters, trains_all, trains_from_ram
from kitaeru.plan.types import Layout, Speed
from kitaeru.plan.work import (
    Work,
    head_forward,
    layer_backward,
    layer_forward,
    model_flops_per_token,
    optimizer_bytes_moved,
)
from kitaeru.shape import ModelShape

# Where launching and computing take equally long, neither hides all of the other: so much of either shows, and less the
# further they are apart.
UNHIDDEN = 0.15
# Seconds of the host to launch a CUDA graph, with its inputs copied; seconds between one kernel in it and the next.
GRAPH_LAUNCH, GRAPH_KERNEL = 50e-6, 1.5e-6
# A simulated step has at most this many micro-batches; more follow the same beat.
SIMULATED = 48
# What one NVMe disk gives in large pieces; a layer read a moment ago comes from RAM where there is room, and faster.
DISK_BYTES_S = 2e9
# Sums of what lies in RAM go through gloo on the host's processors, one process on one core: assumed, not measured.
GLOO_BYTES_S = 1e9

PARTS: dict[str, str] = {
    "matrix_products": N_("matrix products"),
    "attention": N_("attention"),
    "small_kernels": N_("norms, activations, casts and sums"),
    "unpacking": N_("unpacking of quantised weights"),
    "optimizer": N_("the optimizer"),
    "host": N_("waiting for the host to launch"),
    "communication": N_("waiting for other devices' data"),
    "offload": N_("waiting for the host's memory"),
    "bubble": N_("waiting for other stages"),
}


@dataclass(frozen=True)
class Pace:
    """The rates a layout runs at: of each of its devices, of the link between them, and of that `within` the devices
    that one copy is cut among.
    """

    devices: tuple[Rates, ...]
    link: LinkRates
    within: LinkRates
    hosts: int = 1

    @property
    def source(self) -> str:
        """`profile` when every device was measured, else `table`."""
        return "profile" if all(rates.measured for rates in self.devices) else "table"


def pace(
    layout: Layout, hardware: Hardware, devices: Sequence[Device], case: str = "likely", profile: Profile | None = None
) -> Pace:
    """The rates of the devices a layout uses, in one case (`likely`, `low`, `high`)."""
    if layout.device == "cpu":
        rates = (cpu_rates(hardware, layout.precision, case, layout.devices, profile),) * layout.devices
    else:
        kinds = {device: device_rates(device, layout.precision, case, profile) for device in dict.fromkeys(devices)}
        rates = tuple(kinds[devices[rank % len(devices)]] for rank in range(layout.devices))
    link = within = link_rates(hardware, layout.devices, case, profile)
    pieces = layout.ranks_per_replica if layout.strategy == "tensor" else layout.shards
    if pieces:
        together = replace(hardware, hosts=1) if pieces <= layout.devices // hardware.hosts else hardware
        within = link_rates(together, pieces, case, profile)
    return Pace(rates, link, within, hardware.hosts)


@dataclass(frozen=True)
class Load:
    """What is to be done in a step: tokens over all devices, the length of the example a token is in, whether all are
    of that length, the optimizer; the tokens by which a batch is `short`, since no further example fits.
    """

    global_tokens: int
    typical: float
    setting: Setting
    even: bool = False
    short: float = 0.0

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of a step on one replica."""
        return max(1, -(-self.global_tokens // (layout.replicas * layout.micro_batch_tokens)))

    def tokens_in(self, layout: Layout) -> int:
        """Tokens of a micro-batch on average. With CUDA graphs those are among them that pad the last of a step to one
        of the sizes there are (`fused.GRAPH_SIZES`): half a size, or what a full batch is short of where that is less.
        """
        count, largest = self.micro_batches(layout), layout.micro_batch_tokens
        tokens = max(1, self.global_tokens // (layout.replicas * count))
        if not layout.graphs:
            return tokens
        half = largest / fused.GRAPH_SIZES / 2
        full = -(-self.global_tokens // layout.replicas) % largest == 0
        return tokens + int((min(half, self.short) if full else half) / count)


# --- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Seconds of something: of the device by kind, and of the host beside it."""

    parts: dict[str, float]
    host: float

    @property
    def device(self) -> float:
        """Seconds of the device alone."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Seconds it takes, host and device together."""
        less, more = sorted((self.device, self.host))
        return more + UNHIDDEN * less * (less / more) ** 2 if more else 0.0

    def __add__(self, other: Took) -> Took:
        return Took(
            {k: self.parts.get(k, 0) + v for k, v in other.parts.items()}
            | {k: v for k, v in self.parts.items() if k not in other.parts},
            self.host + other.host,
        )

    def times(self, count: float) -> Took:
        """So many of them."""
        return Took({kind: seconds * count for kind, seconds in self.parts.items()}, self.host * count)


NOTHING = Took({}, 0.0)


def took(work: Work, rates: Rates) -> Took:
    """Seconds of work at a device's rates."""
    attention = work.attention_forward / rates.attention_forward + work.attention_backward / rates.attention_backward
    parts = {
        "matrix_products": work.gemm / rates.gemm
        + work.eight / rates.eight
        + work.skinny / rates.skinny
        + work.grouped / rates.grouped,
        "attention": attention,
        "small_kernels": work.eager / rates.eager + work.stream / rates.stream + work.kernels * GRAPH_KERNEL,
        "unpacking": work.unpacked / rates.dequantise,
    }
    return Took(parts, work.operations * rates.operation)


@dataclass(frozen=True)
class Layer:
    """One layer's passes and the head's, of one micro-batch, on one device."""

    forward: Took
    backward: Took
    head: Took

    @cached_property
    def both_seconds(self) -> float:
        """Seconds of the layer, forward and backward."""
        return (self.forward + self.backward).seconds


def layer_on(layout: Layout, shape: ModelShape, load: Load, rates: Rates, *, head: bool = True) -> Layer:
    """What one layer (and the head) takes; `layout.micro_batch_tokens` is what a micro-batch really holds."""
    return _layer_on(layout.of_one_device, shape, load, rates, head)


@lru_cache(maxsize=512)
def _layer_on(layout: Layout, shape: ModelShape, load: Load, rates: Rates, head: bool) -> Layer:
    tokens = layout.micro_batch_tokens
    inner = [(linear.count * linear.weights, linear.weights**0.5) for linear in shape.linears()]
    table = shape.vocab * shape.hidden
    kind: AttentionKind = "attention"
    if fused.is_fused(layout):
        kind = "even" if load.even and shape.head_dim in fused.EVEN_HEADS else "fused"
    inside = rates.sized(tokens, inner, load.typical, kind)
    outside = rates.sized(tokens, [(table, table**0.5)], load.typical) if head and table else rates
    return Layer(
        took(layer_forward(layout, shape, load.setting, load.typical), inside),
        took(layer_backward(layout, shape, load.setting, load.typical), inside),
        took(head_forward(layout, shape), outside) if head else NOTHING,
    )


def _average_layer(layout: Layout, shape: ModelShape, load: Load, rates: Rates) -> Layer:
    """A layer of a model in which some compute again what others keep."""
    kept = layer_on(layout.of_kept, shape, load, rates)
    if not layout.recomputed:
        return kept
    share = layout.again(shape.layers) / shape.layers
    again = layer_on(layout.of_again, shape, load, rates)
    return replace(kept, backward=kept.backward.times(1 - share) + again.backward.times(share))


def cuts_for(layout: Layout, shape: ModelShape, load: Load, at: Pace) -> tuple[int, ...]:
    """Layers of each stage so that none holds the others up: fewer on a slow card, and where the head is."""
    stages = layout.ranks_per_replica * layout.chunks
    layers, extra = [], []
    for stage in range(stages):
        layer = layer_on(layout, shape, load, at.devices[stage % layout.ranks_per_replica], head=stage == stages - 1)
        layers.append(layer.both_seconds)
        extra.append(layer.head.seconds)
    return balanced_cuts(shape.layers, layers, extra)


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step's seconds, its parts on the busiest device, and each device's share without work."""

    seconds: float
    parts: dict[str, float]
    idle: tuple[float, ...]


def step(layout: Layout, shape: ModelShape, load: Load, at: Pace) -> Step:
    """One optimizer step of a layout at given rates."""
    count = load.micro_batches(layout)
    full = replace(layout, micro_batch_tokens=load.tokens_in(layout))
    if layout.strategy in ("pipeline", "model_parallel"):
        return _staged(full, shape, load, at, count)
    return _whole(full, shape, load, at, count)


def _whole(layout: Layout, shape: ModelShape, load: Load, at: Pace, count: int) -> Step:
    """Every device goes through all layers; the slowest decides."""
    held = part_of(layout, shape, 0, count).shape
    steps = []
    for rates in dict.fromkeys(at.devices):
        layer = _average_layer(layout, held, load, rates)
        # Tensor-parallel devices have the whole head, each for a part of the tokens.
        head = layer.head.times(1 / layout.ranks_per_replica if layout.strategy == "tensor" else 1.0)
        micro = (layer.forward + layer.backward).times(shape.layers) + head
        micro = Took(micro.parts, micro.host + rates.micro_batch + layout.graphs * GRAPH_LAUNCH)
        computing = micro.seconds
        scale = computing / micro.device if micro.device else 1.0
        waiting = _layer_waits(layout, shape, load, at, layer, rates, scale)
        ending, moved = _end_of_step(layout, shape, load, at, computing, rates)
        parts = {**micro.times(count).parts, "host": count * (computing - micro.device) + rates.step}
        for kind, seconds in waiting.items():
            parts[kind] = parts.get(kind, 0.0) + count * seconds
        for kind, seconds in (ending | moved).items():
            parts[kind] = parts.get(kind, 0.0) + seconds
        steps.append((sum(parts.values()), parts, count * micro.device + parts.get("optimizer", 0.0), rates))
    seconds, parts, _, _ = max(steps, key=lambda found: found[0])
    working = {rates: busy for _, _, busy, rates in steps}
    return Step(seconds, parts, tuple(max(0.0, 1 - working[rates] / seconds) for rates in at.devices))


def _layer_waits(
    layout: Layout, shape: ModelShape, load: Load, at: Pace, layer: Layer, rates: Rates, scale: float
) -> dict[str, float]:
    """What one micro-batch waits for other devices and for the host's memory, beyond what computing hides."""
    forward, backward = layer.forward.device * scale, layer.backward.device * scale
    if layout.strategy == "tensor":
        sent = compute_bytes(layout) * layout.micro_batch_tokens * shape.hidden
        once = _sum_seconds(layout.ranks_per_replica, at.within, sent)
        # Two sums forward, two backward; what is computed again stops before its last one. One more is the head's.
        return {"communication": (shape.layers * (5 if layout.activations == "recompute" else 4) + 1) * once}
    found = _activation_waits(layout, shape, rates, forward, backward)
    if layout.variant == DISK:
        weights, _ = layer_weight_bytes(replace(layout, variant=""), shape)
        # The system reads ahead while a layer computes; the copy from its cache to the device is waited for.
        once, copied = weights / DISK_BYTES_S, weights / rates.host_copy
        found["offload"] = shape.layers * sum(copied + max(0.0, once - passes) for passes in (forward, backward))
    if trains_from_ram(layout):
        up, back = layer_seconds(layout, shape, _traffic(layout, at, rates))
        # The first layer's weights are waited for, and the last one's gradients.
        waits = (shape.layers - 1) * (max(0.0, up - forward) + max(0.0, back - backward)) + up + back
        return {**found, "offload": waits}
    if layout.strategy not in ("fsdp", *ZERO):
        return found
    weights, tables = layer_weight_bytes(layout, shape)
    trained = trained_parameters(layout, shape, load.setting.lora)
    share = (layout.shared_by - 1) / layout.shared_by
    gather = share * weights / at.within.bytes_s + at.within.latency
    reduce = share * 4 * trained / shape.layers / at.within.bytes_s if trains_all(layout) else 0.0
    in_ram = layout.variant == "offload-all" or (layout.strategy == "fsdp" and layout.variant == "offload")
    waits = 0.0
    if layout.strategy in SHARDED:
        fetched = gather
        if in_ram:
            fetched += weights / layout.shared_by / rates.host_copy
        again = 0.0 if layout.variant == "grad" else fetched
        waits += (shape.layers - 1) * (max(0.0, fetched - forward) + max(0.0, again + reduce - backward))
        waits += fetched + share * tables / at.within.bytes_s
    elif layout.strategy == "zero2":
        # DeepSpeed adds gradients up on all ranks, and each keeps its piece.
        waits += shape.layers * max(0.0, 2 * reduce - backward)
    found["communication"] = waits
    if layout.variant.startswith("offload") and trains_all(layout):
        # Each device's piece of the gradients goes to RAM after each micro-batch.
        down = 4 * trained / layout.shared_by / rates.host_copy
        found["offload"] = found.get("offload", 0.0) + max(0.1 * down, down - 0.5 * shape.layers * backward)
    return found


def _activation_waits(
    layout: Layout, shape: ModelShape, rates: Rates, forward: float, backward: float
) -> dict[str, float]:
    """What a micro-batch waits for its activations to go to RAM and to come back, a layer at a time behind its
    computation; all devices copy at once and share the host's memory.
    """
    if layout.activations != "offload":
        return {}
    copied = min(rates.host_copy, rates.host_memory / layout.devices)
    once = offloaded_bytes(layout, shape) / shape.layers / copied
    return {"offload": shape.layers * (max(0.0, once - forward) + max(0.0, once - backward))}


def _traffic(layout: Layout, at: Pace, rates: Rates) -> Traffic:
    """What copies run at: all devices' at once share the host's memory, as do several copies of the model in it."""
    models = max(1, layout.devices // layout.shared_by // at.hosts)
    each = rates.host_memory / -(-layout.devices // at.hosts)
    return Traffic(min(rates.host_copy, each), rates.host_memory / models, at.within.bytes_s)


def _end_of_step(
    layout: Layout, shape: ModelShape, load: Load, at: Pace, micro: float, rates: Rates
) -> tuple[dict[str, float], dict[str, float]]:
    """The optimizer, and what crosses between devices once a step."""
    trained = float(trained_parameters(layout, shape, load.setting.lora))
    if layout.strategy == "tensor":
        return _end_of_tensor_step(layout, shape, load, at, trained, rates)
    if trains_from_ram(layout):
        updating, tables = step_seconds(layout, shape, load.setting, _traffic(layout, at, rates))
        added = _over_copies(layout, at, trained, GLOO_BYTES_S) if layout.shards else 0.0
        return {"optimizer": updating, "offload": tables}, {"communication": _hidden(added, 0.5 * micro)}
    moved = optimizer_bytes_moved(layout, trained, load.setting.optimizer)
    if layout.variant.startswith("offload") and trains_all(layout):
        updated = 4 * trained / layout.devices / rates.host_copy
        return {"offload": moved / rates.host_memory + updated}, {}
    adapter_on_all = layout.strategy == "ddp" or (layout.strategy == "fsdp" and not trains_all(layout))
    shared = layout.shared_by if layout.strategy in ("fsdp", *ZERO) and not adapter_on_all else 1
    ending = {"optimizer": moved / shared / rates.stream}
    if adapter_on_all:
        behind = 0.0 if layout.graphs else 0.5 * micro  # a graph is waited for as a whole
        return ending, {"communication": _hidden(_all_reduce(layout, at, 4 * trained), behind)}
    if layout.strategy in ("zero1", "zero2"):
        gather = (layout.devices - 1) / layout.devices * 4 * trained / at.link.bytes_s
        reduced = _all_reduce(layout, at, 4 * trained) if layout.strategy == "zero1" else 0.0
        return ending, {"communication": gather + _hidden(reduced, 0.5 * micro)}
    if layout.shards:
        return ending, {"communication": _hidden(_over_copies(layout, at, trained), 0.5 * micro)}
    return ending, {}


def _over_copies(layout: Layout, at: Pace, trained: float, most: float = math.inf) -> float:
    """Seconds to add up each piece of the gradients over the copies, behind the last backward pass; `most` bytes/s."""
    at_once = layout.shards if at.hosts > 1 else 1  # all pieces go through a host's one network
    link = replace(at.link, bytes_s=min(at.link.bytes_s, most * at_once))
    return _sum_seconds(layout.devices // layout.shards, link, 4 * trained / layout.shards * at_once)


def _end_of_tensor_step(
    layout: Layout, shape: ModelShape, load: Load, at: Pace, trained: float, rates: Rates
) -> tuple[dict[str, float], dict[str, float]]:
    """Gradients of what every device has whole are added up over all, those of parts over the copies, and only then is
    the optimizer at work.
    """
    ranks, copies = layout.ranks_per_replica, layout.replicas
    here = float(trained_parameters(layout, part_of(layout, shape, 0, 1).shape, load.setting.lora))
    whole = max(0.0, (ranks * here - trained) / (ranks - 1))
    waiting = _sum_seconds(layout.devices, at.link, 4 * whole)
    if copies > 1:
        waiting += _sum_seconds(copies, at.link, 4 * (here - whole))
    moved = optimizer_bytes_moved(layout, here, load.setting.optimizer)
    return {"optimizer": moved / rates.stream}, {"communication": waiting}


def _hidden(seconds: float, behind: float) -> float:
    """What is left of communication that runs behind a computation; a tenth always shows."""
    return max(0.1 * seconds, seconds - behind)


def _all_reduce(layout: Layout, at: Pace, size: float) -> float:
    """Seconds to add up `size` bytes over all devices in a ring."""
    return _sum_seconds(layout.devices, at.link, size)


def _sum_seconds(devices: int, link: LinkRates, size: float) -> float:
    return 2 * (devices - 1) / devices * size / link.bytes_s + link.latency


class _Stage(NamedTuple):
    """What a stage takes for one micro-batch."""

    forward: float
    backward: float
    device: float
    host: float
    both: Took


def _stage(layer: Layer, layers: int, rates: Rates, stages: int) -> _Stage:
    ahead = layer.forward.times(layers) + layer.head
    ahead = Took(ahead.parts, ahead.host + rates.micro_batch / stages)
    back = layer.backward.times(layers)
    return _Stage(ahead.seconds, back.seconds, ahead.device + back.device, ahead.host + back.host, ahead + back)


def _staged(layout: Layout, shape: ModelShape, load: Load, at: Pace, count: int) -> Step:
    """A model cut into stages; replicas of a pipeline go side by side and add up their gradients at the end."""
    ranks = layout.ranks_per_replica
    slowest = [min(at.devices[rank::ranks], key=lambda rates: rates.gemm) for rank in range(ranks)]
    stages = len(layout.cuts)
    forward, backward, busy, found, launched = [], [], [0.0] * ranks, [NOTHING] * ranks, 0.0
    known: dict[tuple[Rates, int, bool], _Stage] = {}
    for stage, layers in enumerate(layout.cuts):
        rank = stage % ranks
        key = (slowest[rank], layers, stage == stages - 1)
        if key not in known:
            known[key] = _stage(layer_on(layout, shape, load, key[0], head=key[2]), layers, key[0], stages)
        one = known[key]
        forward.append(one.forward)
        backward.append(one.backward)
        busy[rank] += count * one.device
        found[rank] += one.both
        launched += one.host
    sent = residual_bytes(layout) * layout.micro_batch_tokens * shape.hidden / at.link.bytes_s + at.link.latency
    seconds = _stages_seconds(layout, forward, backward, sent, count)
    if layout.strategy == "model_parallel":  # one process launches for all devices
        seconds = max(seconds, count * launched)
    trained = trained_parameters(layout, shape, load.setting.lora) / ranks
    ending = optimizer_bytes_moved(layout, trained, load.setting.optimizer) / slowest[0].stream
    shared = _all_reduce(replace(layout, devices=layout.replicas), at, 4 * trained) if layout.replicas > 1 else 0.0
    total = seconds + ending + shared + slowest[0].step
    last = max(range(ranks), key=lambda rank: found[rank].seconds)
    computed = found[last].times(count)
    launching = max(0.0, count * sum((forward[s] + backward[s]) for s in range(last, stages, ranks)) - computed.device)
    parts = {
        **computed.parts,
        "host": launching + slowest[0].step,
        "optimizer": ending,
        "communication": shared,
        "bubble": max(0.0, seconds - computed.device - launching),
    }
    idle = tuple(max(0.0, 1 - (busy[rank % ranks] + ending) / total) for rank in range(layout.devices))
    return Step(total, parts, idle)


def _stages_seconds(
    layout: Layout, forward: Sequence[float], backward: Sequence[float], sent: float, count: int
) -> float:
    """From the first forward to the last backward pass of a step."""
    ranks = layout.ranks_per_replica
    simulated = min(count, SIMULATED // ranks * ranks)
    seconds = schedule_seconds(layout.variant, ranks, simulated, layout.chunks, forward, backward, sent)
    beat = max(sum(forward[r::ranks]) + sum(backward[r::ranks]) for r in range(ranks))
    return seconds + (count - simulated) * beat


# --- the answer -------------------------------------------------------------------------------------------------------


def _peak(layout: Layout, rates: Rates) -> float:
    """The sheet's rate of what most of the arithmetic is done in."""
    return rates.peak_eight if layout.in_8_bits else rates.peak_flops


def speed_of(layout: Layout, shape: ModelShape, load: Load, cases: tuple[Pace, Pace, Pace]) -> Speed:
    """Tokens a second and what is behind them; `cases` are the rates at likely, low and high."""
    likely, low, high = cases
    found = step(layout, shape, load, likely)
    bounds = [load.global_tokens / step(layout, shape, load, at).seconds for at in (low, high)]
    rate = load.global_tokens / found.seconds
    flops = model_flops_per_token(layout, shape, load.typical)
    return Speed(
        step_seconds=found.seconds,
        tokens_per_second=rate,
        low=min(rate, *bounds),
        high=max(rate, *bounds),
        micro_batches=load.micro_batches(layout),
        mfu=flops * rate / sum(_peak(layout, rates) for rates in likely.devices),
        idle=tuple(round(share, 4) for share in found.idle),
        parts={kind: found.parts[kind] for kind in PARTS if found.parts.get(kind)},
        source=likely.source,
    )
