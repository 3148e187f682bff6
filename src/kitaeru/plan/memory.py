"""How many bytes a layout takes on its device, item by item.

The items follow what the engine really runs: transformers' eager layers, PEFT's adapters, kitaeru's packed attention
and its chunked loss head. Every count is derived from the operations' own rules of what autograd keeps; the tests
compare them with what torch keeps. Bytes are those of torch's allocator: the CUDA context and fragmentation are not
in them, `device_overhead_bytes` and the margin of `choose` stand for those.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from kitaeru.i18n import N_
from kitaeru.plan import fused, rounded
from kitaeru.plan.activations import (
    activation_bytes,
    cast_bytes,
    input_bytes,
    last_norm_bytes,
    one_layer_bytes,
    recomputed_layer_bytes,
)
from kitaeru.plan.stored import (
    EXPANDED_AT_ONCE_BYTES,
    Setting,
    adapted,
    adapter_parameters,
    adapts_experts,
    compute_bytes,
    expert_stacks,
    merges_experts,
    optimizer_bytes,
    packs_experts,
    residual_bytes,
    saved_whole,
    trained_parameters,
    trains_all,
    weight_bytes,
)
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection
from kitaeru.shape import ModelShape

GIB = 1 << 30
# Rows of logits the loss head holds at a time (kernels.linear_cross_entropy).
HEAD_CHUNK_ROWS = 512
# A process that has imported everything (0.5 GB), with what its allocator does not give back between steps.
CPU_PROCESS_BYTES = 10**9
GPU_PROCESS_HOST_BYTES = 3 * 10**9
# What cuBLAS works in, taken from torch's allocator at the first product and kept: on sm_90 32 MiB for the forward
# pass's thread and for the backward pass's (elsewhere 8, counted as on sm_90). Measured: 64 to 70 MiB.
CUBLAS_BYTES = 2 * (32 << 20)

ITEMS: dict[str, str] = {
    "weights": N_("the weights as they are stored"),
    "quantization": N_("scales of the quantised weights"),
    "weight_casts": N_("16-bit copies of trained weights, used in this step"),
    "adapter": N_("the adapter, in 32 bits"),
    "gradients": N_("gradients of what is trained, in 32 bits"),
    "optimizer": N_("the optimizer's moments"),
    "activations": N_("what the layers keep for the backward pass"),
    "head": N_("the output head and the loss, a chunk of rows at a time"),
    "workspace": N_("what one layer holds while its backward pass runs"),
    "graphs": N_("what validation works in, beside the memory that CUDA graphs keep"),
    "libraries": N_("what cuBLAS works in, as long as the process lives"),
    "gathered": N_("weights gathered from the other devices for the layers at work"),
    "communication": N_("buffers of what is sent between devices"),
    "process": N_("Python and its libraries"),
}


# --- what passes -----------------------------------------------------------------------------------------------------


def head_bytes(layout: Layout, shape: ModelShape) -> int:
    """The loss head at its peak: a chunk of logits, what the head reads, and its gradient.

    On a GPU in 16 bits the gradient takes the logits' place: 2 bytes a logit. Else logits are in 32 bits, and a chunk's
    gradient still stands while the next one's are made. A trained head adds its gradient in 32 bits, and under autocast
    its 16-bit copy and a product, beside the chunk's gradient.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda")
    >>> head_bytes(layout, llama) // 2**20
    197
    """
    tokens, h, vocab, c = layout.micro_batch_tokens, shape.hidden, shape.vocab, compute_bytes(layout)
    rows = min(HEAD_CHUNK_ROWS, tokens)
    copies, left = _bytes_a_logit(layout, shape, several=tokens > rows)
    total = 2 * tokens * h * residual_bytes(layout) + rows * h * 2 * c
    if not trains_all(layout):
        return total + rows * vocab * copies
    casts = c * (vocab + tokens) * h if c == 2 else 0
    return total + casts + 4 * vocab * h + max(rows * vocab * copies, rows * vocab * left + c * vocab * h)


def _bytes_a_logit(layout: Layout, shape: ModelShape, *, several: bool) -> tuple[int, int]:
    """Bytes of a chunk's logits at their fullest, and while the gradient of the head's weight is formed; `several`
    chunks follow each other.

    In 32 bits from 16: the product, its cast (the sum of the last chunk's exponentials takes no more), and before it
    the last chunk's softmax and rounded gradient: 4 + 2 and 2 + 4. A soft cap has the logits, what they are divided by
    the cap and its tanh, or that and its product with the cap: 12; and of the last chunk also the slope.
    """
    if head_in_place(layout, shape):
        return 2, 2
    c = compute_bytes(layout)
    rounded = c if c == 2 else 0
    left = 4 + rounded + (4 if shape.final_softcap else 0)
    making = 12 if shape.final_softcap else 4 + rounded
    summing = 8 + (left - 4 if several else 0)  # logits, and their exponentials
    return max(summing, making + (left if several else 0)), left


def head_in_place(layout: Layout, shape: ModelShape) -> bool:
    """Whether one kernel turns logits into their gradient where they lie (kernels.linear_cross_entropy)."""
    return layout.device == "cuda" and compute_bytes(layout) == 2 and not shape.final_softcap


@lru_cache(maxsize=1024)
def workspace_bytes(layout: Layout, shape: ModelShape, lora: LoraSection) -> tuple[int, int]:
    """What is held for a moment beside what is kept, at the peak: in the last norm's backward pass, and in a layer's.

    In units of the MLP's width f and the stream's width h, in bytes a token. The last norm's backward pass computes in
    32 bits: the gradient through the product, that of the mean, and of the power its base, that times two and their
    product, 20h; in fp32 16h was measured.
    """
    h, tokens = shape.hidden, layout.micro_batch_tokens
    norm = (16 if compute_bytes(layout) == 4 else 20) * h
    if fused.is_fused(layout):
        whole = tokens * norm
        if tokens > fused.MLP_TOKENS:  # in pieces; the gradients of all, in 16 bits, before they are put together
            whole = fused.MLP_TOKENS * norm + tokens * 6 * h
        return whole, fused.workspace_bytes(layout, shape, lora)
    if packs_experts(layout.base, shape):
        mixture = _experts_workspace(layout, shape, lora)
    else:
        mixture = _mixture_workspace(layout, shape, lora) if shape.experts else 0
    return tokens * norm, max(_layer_workspace(layout, shape, lora), mixture)


def _layer_workspace(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """What one of the models' own layers holds at its fullest, as the tests see it, in bytes a token.

    With adapters on weights in 16 bits that is where PEFT casts the MLP's product to 32 bits for the adapter of the way
    down: product and copy, 6f; the stream after attention, the norm's result, the way down and the adapter's two
    results; beside a layer that is kept its input and the embeddings, which the model's own loop holds, beside one that
    is computed again the gradient of its result, and that for the adapter: 14h or 10h. On a GPU a quantised base spares
    the cast. Then it is the product's backward pass, both gradients and what they came from less what is let go of:
    4f + 2h; or a weight while it is unpacked (8h). With all weights trained the same with the stream in 32 bits and a
    weight's gradient, or that gradient being cast. In 32 bits 8f + 4h was measured. DoRA forms the weight with the
    adapter in it.
    """
    c, h, tokens = compute_bytes(layout), shape.hidden, layout.micro_batch_tokens
    # Of a mixture what is a layer's own: attention, a shared expert.
    f = shape.intermediate if shape.dense_layers or not shape.experts else shape.shared_expert_intermediate
    wide = max(linear.weights for linear in shape.linears())
    # NF4 beside its 16-bit weight has the scale of each 64 in 32 bits; INT8 its 8-bit copy.
    unpacked = wide * {"none": 0, "nf4": c + 4 / 64, "int8": c + 1}[layout.base]
    whole, dora = trains_all(layout), 6 * wide if lora.dora and not trains_all(layout) else 0
    if c == 4:
        return int(tokens * (8 * f + 4 * h) + unpacked + (8 * wide if whole else dora))
    if whole:
        first = max(4 * wide, rounded.passing_bytes(layout, shape))
        return max(tokens * (4 * f + 4 * h) + first, tokens * (2 * f + 6 * h) + 6 * wide)
    held = tokens * (6 * f + (10 if layout.again(shape.layers) else 14) * h)
    if layout.base != "none" and layout.device == "cuda":
        held = tokens * (4 * f + 2 * h)
    return max(held, int(tokens * 8 * h + unpacked)) + dora


def _mixture_workspace(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """What the backward pass of transformers' experts holds, in one grouped product: beside the gradient of the result
    what adds up a token's pairs, three times in 32 bits, and in a layer that was kept also rounded; or the gradient of
    the activated product, and that of the weights of the way down where these are trained or an adapter is added to a
    copy of them; or both gradients of the product of gate and up, less the result of each pair, let go of by then.
    """
    c, pairs, h = compute_bytes(layout), layout.micro_batch_tokens * shape.experts_per_token, shape.hidden
    down = shape.experts * shape.expert_intermediate * h
    weights = (c + 4 if c == 2 else 4) * down if trains_all(layout) else c * down
    weights *= trains_all(layout) or merges_experts(layout, shape, lora)
    active = c * pairs * shape.expert_intermediate
    sums = (12 if layout.again(shape.layers) else 12 + c) * pairs * h
    result = residual_bytes(layout) * layout.micro_batch_tokens * h
    return result + max(sums, active + weights, 2 * active - c * pairs * h)


def _experts_workspace(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """What the backward pass of packed experts holds (kernels.experts), at the fuller of two moments. The gate's: of
    each pair of token and expert the gradients of its output and of gate and up, the activated product and its
    gradient. Or the way back through gate and up: their gradient, that of the input, two times the weights that are
    expanded at once, since the next are there before the last are let go of, and the gradients of the other stack's
    adapter. In both the gradient of the result. The reference that a CPU computes with expands through 32 bits.

    >>> mixtral = ModelShape("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, experts=8, expert_intermediate=14336,
    ...                      experts_per_token=2)
    >>> layout = Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda")
    >>> _experts_workspace(layout, mixtral, LoraSection(targets=("q_proj",))) // 2**20
    992
    """
    c, pairs, f = compute_bytes(layout), layout.micro_batch_tokens * shape.experts_per_token, shape.expert_intermediate
    size, other = (rows * columns for rows, columns in expert_stacks(shape))
    adapter = 4 * lora.r * shape.experts * sum(expert_stacks(shape)[1]) if adapts_experts(shape, lora) else 0
    result = c * layout.micro_batch_tokens * shape.hidden
    gate = c * pairs * (4 * f + shape.hidden) + result
    if layout.device == "cpu":
        return gate + 25 * max(size, other) + adapter
    at_once = max(1, min(shape.experts, EXPANDED_AT_ONCE_BYTES // (c * size)))
    expanded = c * size * min(2 * at_once, shape.experts)
    return max(gate, c * pairs * (2 * f + shape.hidden) + result + expanded + adapter)


# --- the whole --------------------------------------------------------------------------------------------------------


def memory_items(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """Bytes by item at the moment of a training step when their sum is largest; they add up to the predicted peak.

    The moments compared: the loss head of the last micro-batch, the last norm's and the last layer's backward pass, the
    end of it (every gradient there, one layer kept), and the optimizer's step; where weights change in the backward
    pass, that of the largest parameter, while everything is kept. With CUDA graphs, whose memory stays taken, it is the
    moment of a validation: what the fullest moment of the passes took, and what that works in.
    """
    stored = stored_items(layout, shape, setting)
    every = [{**stored, **moment} for moment in moments(layout, shape, setting)]
    worst = max(every, key=lambda moment: sum(moment.values()))
    if layout.device == "cpu":
        worst["process"] = CPU_PROCESS_BYTES
    return {name: worst[name] for name in ITEMS if worst.get(name)}


def stored_items(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """What stays from step to step: weights, adapter, optimizer, what libraries hold."""
    return dict(_stored_items(layout.of_one_device, shape, setting))


@lru_cache(maxsize=1024)
def _stored_items(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    weights, scales = weight_bytes(layout, shape)
    adapter = 0 if trains_all(layout) else 4 * adapter_parameters(shape, setting.lora)
    optimizer = optimizer_bytes(setting.optimizer, layout, shape, setting.lora)
    if fused.is_fused(layout):
        scales += fused.held_always(layout, shape, setting.lora)[0]
    stored = {"weights": weights, "quantization": scales, "adapter": adapter, "optimizer": optimizer}
    return stored | library_bytes(layout)


def library_bytes(layout: Layout) -> dict[str, int]:
    """What libraries hold in torch's allocator."""
    return {"libraries": CUBLAS_BYTES} if layout.device == "cuda" else {}


def moments(
    layout: Layout, shape: ModelShape, setting: Setting, *, sets: float = 1, head: bool = True
) -> list[dict[str, int]]:
    """What passes, at each moment of a step that may be its fullest; the last is the optimizer's step.

    `sets` micro-batches are kept at once (a pipeline's early stages keep several); a part of a model without the output
    `head` has no moment of its own for it.
    """
    layout = layout.of_one_device
    gradients = 4 * trained_parameters(layout, shape, setting.lora)
    held = gradients if setting.accumulates or layout.graphs else 0
    casts = cast_bytes(layout, shape, setting.lora)
    some, layers = layout.again(shape.layers), max(1, shape.layers)
    still_cast = casts
    if some and not fused.is_fused(layout):
        still_cast = min(casts, casts * (layers - some + 1) // layers)
    again = recomputed_layer_bytes(layout, shape, setting)
    kept = int(activation_bytes(layout, shape, setting) * sets)
    norm, layer = workspace_bytes(layout.of_kept, shape, setting.lora)
    # A trained head's gradient, beside what accumulates; where it is the input table too, that one's, and their sum.
    trained_head = 4 * shape.vocab * shape.hidden if head and trains_all(layout) else 0
    table = 2 * trained_head if shape.tied else 0
    last = one_layer_bytes(layout.of_again, shape, setting)
    lean = layout.step_in_backward
    at_head = still_cast if lean else casts  # autocast holds them until the forward pass is over
    waiting = trained_head if shape.tied or not lean else 0  # for the same table's gradient at the other end
    # Where weights change in the backward pass, what is there at its end, and at a parameter's step.
    ended, stepping = (waiting, _gradients_at_once(layout, shape, setting.lora)) if lean else (gradients, gradients)
    start = {"gradients": held, "weight_casts": still_cast, "head": waiting}
    with_head = [
        {"gradients": held, "weight_casts": at_head, "activations": kept, "head": head_bytes(layout, shape)},
        {**start, "activations": kept, "workspace": norm},
    ]
    later = []
    if 0 < some < layers:  # the first layers are computed again, when those that were kept are through
        computed = workspace_bytes(layout.of_again, shape, setting.lora)[1]
        there = held or (ended if lean else gradients * (layers - some) // layers)
        inputs = some * input_bytes(layout, shape)
        later = [{"gradients": there, "activations": inputs + again, "workspace": computed}]
        again = 0
    if compute_bytes(layout) == 2:  # by then what the last norm kept is gone, or it is not there yet
        again -= int(last_norm_bytes(layout, shape) * sets)
    passing = [
        *(with_head if head else ()),
        {**start, "activations": kept + again, "workspace": layer},
        *later,
        {"gradients": ended, "activations": last, "workspace": layer},
        {"gradients": max(ended, trained_head), "head": table},
        {"gradients": stepping, "workspace": _step_workspace(layout, shape, setting)},
    ]
    if lean:
        passing.insert(-1, passing[-1] | {"weight_casts": still_cast, "activations": kept})
    if not layout.graphs:
        return passing
    # Graphs are captured by one thread, on a stream of their own.
    beside = CUBLAS_BYTES // 2 + validation_bytes(layout, shape, setting, head=head)
    return [{**moment, "graphs": beside} for moment in passing]


def validation_bytes(layout: Layout, shape: ModelShape, setting: Setting, *, head: bool = True) -> int:
    """What a forward pass that keeps nothing works in: in a layer, or in the output `head`."""
    if fused.is_fused(layout):
        layer = fused.forward_bytes(layout, shape, setting.lora)
    else:
        layer = one_layer_bytes(layout, shape, setting) + workspace_bytes(layout, shape, setting.lora)[1]
    return max(layer, head_bytes(replace(layout, method="lora"), shape) if head else 0)


def _gradients_at_once(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Bytes of the largest gradient, or of the adapters' of one layer, which a fused one makes together."""
    table = shape.vocab * shape.hidden
    if not trains_all(layout):
        return 4 * max(table if saved_whole(shape, lora) else 0, -(-adapter_parameters(shape, lora) // shape.layers))
    experts = 2 * shape.experts * shape.expert_intermediate * shape.hidden
    return 4 * max(table, experts, max(linear.weights for linear in shape.linears()))


def _step_workspace(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What the optimizer's step needs beside its state: Adafactor squares and updates a whole tensor at a time."""
    if setting.optimizer != "adafactor":
        return 0
    if trains_all(layout):
        return 12 * max(shape.vocab * shape.hidden, max(linear.weights for linear in shape.linears()))
    return 12 * max(setting.lora.r * max(linear.inputs, linear.outputs) for linear in adapted(shape, setting.lora))


def device_overhead_bytes(layout: Layout) -> int:
    """What a CUDA process takes outside torch's allocator: context and loaded kernels, 806 to 810 MB on an H100 when
    one layout is trained (880 after fifty in one process). 0 on a CPU.

    Several devices have NCCL's channels beside it: 0.1 to 0.4 GB for a communicator, not measured here.
    """
    if layout.device == "cpu":
        return 0
    return 800 * 10**6 + (300 * 10**6 if layout.devices > 1 else 0)


def host_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """RAM of the process: on a CPU everything; beside a GPU the libraries, one file of weights, a paged optimizer's
    state.
    """
    if layout.device == "cpu":
        return sum(memory_items(layout, shape, setting).values())
    paged = 0
    if setting.optimizer == "paged_adamw_8bit":
        paged = optimizer_bytes("adamw_8bit", layout, shape, setting.lora)
    return GPU_PROCESS_HOST_BYTES + min(5 * 10**9, 2 * shape.parameters()) + paged
