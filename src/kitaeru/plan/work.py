"""What a micro-batch asks of a device: FLOP, bytes moved and operations launched, for one layer and for the head.

As for bytes (`plan.activations`), what is priced is what runs: transformers' eager layers, PEFT's adapters, the
unpacking of bitsandbytes, kitaeru's packed attention and chunked head. FLOP are counted two for a multiply and an add.
Bytes of eager operations are counted kernel by kernel: each reads its inputs and writes its result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kitaeru.plan import fused, rounded
from kitaeru.plan.memory import HEAD_CHUNK_ROWS, head_in_place
from kitaeru.plan.stored import (
    Setting,
    adapted,
    adapts_experts,
    compute_bytes,
    merges_experts,
    packs_experts,
    residual_bytes,
    trains_all,
)
from kitaeru.plan.types import Layout
from kitaeru.shape import ModelShape

# A 4-bit weight is read (half a byte) and written (2 bytes); an 8-bit one read and written.
UNPACKED_BYTES = {"none": 0.0, "nf4": 2.5, "int8": 3.0}
# Bytes moved for a trained number: weight, gradient, moments, read and written, and the clipping's norm.
ADAMW_BYTES = {"adamw": 40, "adamw_16bit": 32, "adamw_8bit": 22, "paged_adamw_8bit": 26, "lion": 28, "adafactor": 40}
CPU_ADAMW_BYTES = 28
# Kernels of the head for a chunk of rows in a CUDA graph: rows and targets, two products, losses, sums, rows put back.
GRAPH_HEAD_KERNELS = 8
# A layer that is computed again leaves its last product out, the MLP's way down, unless a norm follows on it.
FUSED_AGAIN = 0.75
# FlexAttention's time for soft-capped scores, of flash attention's for plain ones: an estimate. Its authors have 1.1 to
# 1.2 without a cap (pytorch.org/blog/flexattention).
CAPPED = 1.5


@dataclass(frozen=True)
class Work:
    """One pass (forward or backward) of one micro-batch through something: FLOP by kind (`eight`: products in 8 bits),
    bytes by kind, operations that the host launches, kernels that a CUDA graph launches.
    """

    gemm: float = 0.0
    eight: float = 0.0
    skinny: float = 0.0
    grouped: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    eager: float = 0.0
    stream: float = 0.0
    unpacked: float = 0.0
    operations: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in _NAMES))

    def flops(self) -> float:
        """All FLOP."""
        return self.gemm + self.eight + self.skinny + self.grouped + self.attention_forward + self.attention_backward


# Of the bytes that small kernels read and write, those that do not come from the cache of the kernel before; what a
# layer's operations cost the host when it is computed again, with a hook for each tensor kept, of what they cost
# at first. Both fitted to 50 points on an H100 (benchmarks/results/planner-grid-h100.csv), as are the operations.
UNCACHED, OPERATIONS_AGAIN = 0.8, 2.8
_NAMES = tuple(Work.__dataclass_fields__)


def seen_tokens(shape: ModelShape, typical: float) -> float:
    """Tokens that a query attends to on average, causal, over all layers: half an example, less where layers slide."""
    window = min(typical, shape.sliding_window) if shape.sliding_window else typical
    sliding = shape.sliding_layers / shape.layers
    return (1 - sliding) * typical / 2 + sliding * (window - window * window / (2 * typical))


def layer_forward(layout: Layout, shape: ModelShape, setting: Setting, typical: float) -> Work:
    """One layer's forward pass. `typical` is the length of the example that a token is in, on average.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> from kitaeru.recipe.types import LoraSection
    >>> layout = Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda")
    >>> work = layer_forward(layout, llama, Setting(LoraSection()), 2048)
    >>> round(work.gemm / 4096 / 1e9, 3), round(work.eager / 4096 / 1e6, 2)
    (0.436, 1.11)
    """
    if fused.is_fused(layout):
        return _fused_pass(layout, shape, setting, typical, forward=True)
    tokens, layers, eight = layout.micro_batch_tokens, shape.layers, rounded.is_rounded(layout)
    flops = 2 * shape.linear_parameters() / layers * tokens
    return Work(
        gemm=rounded.turning_flops(layout, shape, forward=True) if eight else flops,
        eight=flops if eight else 0.0,
        skinny=2 * tokens * _adapter_size(layout, shape, setting),
        grouped=2 * tokens * _active_expert_weights(shape),
        attention_forward=4 * shape.q_size * seen_tokens(shape, typical) * tokens,
        eager=tokens * UNCACHED * _eager_bytes(layout, shape, setting, forward=True),
        stream=_weight_traffic(layout, shape, setting, forward=True),
        unpacked=_unpacked_bytes(layout, shape),
        operations=_operations(layout, shape, setting),
    )


def layer_backward(layout: Layout, shape: ModelShape, setting: Setting, typical: float) -> Work:
    """One layer's backward pass, with its forward pass again where layers are computed again: of a layout in which only
    some are, `of_kept` and `of_again` are to be asked.
    """
    computed = layout.again(shape.layers) > 0
    if fused.is_fused(layout):
        work = _fused_pass(layout, shape, setting, typical, forward=False)
        again = layer_forward(layout, shape, setting, typical) if computed else Work()
        share = 1.0 if shape.sandwiched else FUSED_AGAIN
        return work + replace(again, **{kind: getattr(again, kind) * share for kind in ("gemm", "eight")})
    tokens, layers = layout.micro_batch_tokens, shape.layers
    flops, whole = 2 * shape.linear_parameters() / layers * tokens, trains_all(layout)
    eight = rounded.is_rounded(layout)
    turning = rounded.turning_flops(layout, shape, forward=False) if eight else 0.0
    # An adapter on whole experts is trained through the gradient of their weights.
    experts = 2 if whole or merges_experts(layout, shape, setting.lora) else 1
    adapters = _adapter_size(layout, shape, setting)
    work = Work(
        gemm=flops * (2 if whole and not eight else 1) + turning,
        eight=flops if eight else 0.0,
        skinny=4 * tokens * adapters,
        grouped=2 * experts * tokens * _active_expert_weights(shape),
        attention_backward=10 * shape.q_size * seen_tokens(shape, typical) * tokens,
        eager=tokens * UNCACHED * _eager_bytes(layout, shape, setting, forward=False),
        stream=_weight_traffic(layout, shape, setting, forward=False),
        unpacked=_unpacked_bytes(layout, shape),
        operations=1.8 * _operations(layout, shape, setting),
    )
    if not computed:
        return work
    again = layer_forward(layout, shape, setting, typical)
    return work + replace(again, operations=OPERATIONS_AGAIN * again.operations)


def head_forward(layout: Layout, shape: ModelShape) -> Work:
    """The output head and the loss, whose gradient is formed in the forward pass: chunks of rows.

    On a GPU in 16 bits a logit is read twice and written once: 6 bytes. Else logits are in 32 bits: written, cast,
    summed, subtracted, raised and cast back: 36 bytes. A trained head adds each chunk's
    product to its gradient in 32 bits. Every token counts as trained.
    """
    tokens, table = layout.micro_batch_tokens, shape.vocab * shape.hidden
    chunks = -(-tokens // HEAD_CHUNK_ROWS)
    gradient = 14.0 * table * chunks + 6 * table if trains_all(layout) else 0.0
    moved = 6.0 if head_in_place(layout, shape) else 56.0 if shape.final_softcap else 36.0
    return Work(
        gemm=(6 if trains_all(layout) else 4) * table * tokens,
        eager=tokens * shape.vocab * moved + 40.0 * tokens * shape.hidden,
        stream=gradient,
        operations=0.0 if layout.graphs else (6.0 if head_in_place(layout, shape) else 20.0) * chunks + 20,
        kernels=GRAPH_HEAD_KERNELS * chunks + 20.0 if layout.graphs else 0.0,
    )


def model_flops_per_token(layout: Layout, shape: ModelShape, typical: float) -> float:
    """FLOP that training cannot do without: weights forward and backward (and their gradients where all are trained),
    head, attention; nothing that is computed twice.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> round(model_flops_per_token(layout, llama, 2048) / 1e9, 1)
    31.9
    """
    passes = 6 if trains_all(layout) else 4
    attention = 14 * shape.q_size * seen_tokens(shape, typical) * shape.layers
    return passes * (shape.active_parameters() + shape.vocab * shape.hidden) + attention


def optimizer_bytes_moved(layout: Layout, trained: float, optimizer: str) -> float:
    """Bytes an optimizer's step moves, on the device or, offloaded, in the host's memory."""
    return trained * (CPU_ADAMW_BYTES if layout.variant.startswith("offload") else ADAMW_BYTES[optimizer])


def _fused_pass(layout: Layout, shape: ModelShape, setting: Setting, typical: float, *, forward: bool) -> Work:
    """One layer as one operation: its products in the layout's arithmetic, row kernels that move each byte once."""
    tokens = layout.micro_batch_tokens
    flops = 2 * shape.linear_parameters() / shape.layers * tokens
    attention = (4 if forward else 10) * shape.q_size * seen_tokens(shape, typical) * tokens
    attention *= CAPPED if shape.attention_softcap else 1
    moved = fused.streamed_bytes_per_token(layout, shape, setting.lora, forward=forward)
    return Work(
        gemm=flops if layout.arithmetic == "16bit" else fused.turning_flops(layout, shape, forward=forward),
        eight=0.0 if layout.arithmetic == "16bit" else flops,
        attention_forward=attention if forward else 0.0,
        attention_backward=0.0 if forward else attention,
        eager=tokens * moved,
        unpacked=fused.expanded_bytes(layout, shape),
        operations=0.0 if layout.graphs else fused.operations(layout, forward=forward),
        kernels=fused.kernels(layout, shape, setting.lora, forward=forward) if layout.graphs else 0.0,
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _adapter_size(layout: Layout, shape: ModelShape, setting: Setting) -> float:
    """Numbers of one layer's adapters that one token meets."""
    if trains_all(layout):
        return 0.0
    r = setting.lora.r
    size = sum(linear.count * r * (linear.inputs + linear.outputs) for linear in adapted(shape, setting.lora))
    if adapts_experts(shape, setting.lora):
        per_expert = r * (2 * shape.hidden + 6 * shape.expert_intermediate)
        size += (shape.layers - shape.dense_layers) * shape.experts_per_token * per_expert
    return size / shape.layers


def _active_expert_weights(shape: ModelShape) -> float:
    return shape.expert_parameters() * shape.experts_per_token / shape.experts / shape.layers if shape.experts else 0.0


def _unpacked_bytes(layout: Layout, shape: ModelShape) -> float:
    packed = shape.linear_parameters() + (shape.expert_parameters() if packs_experts(layout.base, shape) else 0)
    return packed / shape.layers * UNPACKED_BYTES[layout.base]


def _eager_bytes(layout: Layout, shape: ModelShape, setting: Setting, *, forward: bool) -> float:
    """Bytes of small kernels for one token in one layer.

    A norm computes in 32 bits with a kernel for each of cast, square, mean, scale, cast and weight; rotation copies
    queries and keys several times; the gated MLP has two kernels; two residual sums. PEFT's adapters cast their input,
    scale their result and add it.
    """
    c, h, r = compute_bytes(layout), shape.hidden, residual_bytes(layout)
    qk, kv, f = shape.q_size + shape.kv_size, shape.kv_size, shape.intermediate if not shape.experts else 0
    f += shape.experts_per_token * shape.expert_intermediate + shape.shared_expert_intermediate
    normed = shape.norms_per_layer * h + (qk if shape.qk_norm else 0)
    norm = (19 * c if forward else 45 * c) * normed
    rotation = (12 if forward else 14) * c * qk + (4 * c * shape.q_size if setting.repeats_keys and kv else 0)
    mlp = (5 if forward else 8) * c * f
    residual = (2 if forward else 4) * 3 * r * h
    routed = 12.0 * c * shape.experts_per_token * h if shape.experts else 0.0
    total = norm + rotation + mlp + residual + routed
    if trains_all(layout):
        if rounded.is_rounded(layout):
            return total + rounded.row_bytes(layout, shape, forward=forward)
        edges = sum(linear.count * linear.inputs for linear in shape.linears()) / shape.layers
        return total + (r + c if r != c else 0) * edges
    linears = adapted(shape, setting.lora)
    inputs = sum(linear.count * linear.inputs for linear in linears) / shape.layers
    outputs = sum(linear.count * linear.outputs for linear in linears) / shape.layers
    more = 2 if setting.lora.dora else 1
    if layout.base == "nf4":
        return total + more * c * ((inputs + 8 * outputs) if forward else (6 * inputs + 4 * outputs))
    casts = 6 if c == 2 else 3
    return total + more * ((c * 4 + casts) * inputs + 6 * c * outputs) * (1.0 if forward else 1.2)


def _weight_traffic(layout: Layout, shape: ModelShape, setting: Setting, *, forward: bool) -> float:
    """Bytes of whole weights for one layer, whatever the micro-batch: autocast's 16-bit copies of trained weights,
    their gradients added up in 32 bits, experts' weights read; where adapters are added to a copy of these, the product
    of the adapter, the sum and its parts, and on the way back the gradient, read for each of the adapter's own.
    """
    weights = (shape.linear_parameters() + shape.expert_parameters()) / shape.layers
    times = 5 if merges_experts(layout, shape, setting.lora) else 1
    experts = times * compute_bytes(layout) * shape.expert_parameters() / shape.layers
    if not trains_all(layout):
        return experts
    casts = 6 if compute_bytes(layout) == 2 else 0
    if rounded.is_rounded(layout):  # gradients alone are cast
        rounding = rounded.rounding_bytes(layout, shape, forward=forward)
        return rounding + (0.0 if forward else weights * (casts + 12))
    return experts + weights * (casts if forward else casts + 12)


def _operations(layout: Layout, shape: ModelShape, setting: Setting) -> float:
    """Operations the host launches for one layer's forward pass."""
    linears = len(shape.linears())
    norms = shape.norms_per_layer + (2 if shape.qk_norm else 0)
    count = 58.0 + 5.5 * norms + linears * (3 if trains_all(layout) else 1.6)
    count += 3 * linears if rounded.is_rounded(layout) else 0
    if not trains_all(layout):
        count += 13 * len(adapted(shape, setting.lora)) * (2 if setting.lora.dora else 1)
    if layout.base != "none":
        count += 6.4 * linears
    if packs_experts(layout.base, shape):  # one expert after the other: two expansions, two products, and the adapters'
        mixtures = (shape.layers - shape.dense_layers) / shape.layers
        return count + mixtures * (20 + shape.experts * (8 if adapts_experts(shape, setting.lora) else 4))
    return count + (30 if shape.experts else 0)
