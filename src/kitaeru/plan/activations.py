"""What the layers keep for the backward pass, derived from the operations' own rules of what autograd saves.

The layers are transformers' eager ones with PEFT's adapters, under autocast in 16 bits, and kitaeru's packed
attention. The tests compare every count with the tensors that torch really saves.
"""

from __future__ import annotations

from functools import lru_cache

from kitaeru.plan import fused, rounded
from kitaeru.plan.stored import (
    Setting,
    adapted,
    adapter_parameters,
    adapts_experts,
    compute_bytes,
    expert_adapter_parameters,
    merges_experts,
    packs_experts,
    residual_bytes,
    saved_whole,
    trains_all,
)
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection
from kitaeru.shape import Linear, ModelShape

# Inputs of layers that may still be on the device while they are copied to the host (model.offload).
LEAVING = 2
# Host memory is pinned in pieces of this size.
PIECE_BYTES = 16 << 20


@lru_cache(maxsize=1024)
def kept_per_token(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """Bytes that all layers keep for the backward pass for one token, by part; recomputation left aside.

    In a LoRA of 16 bits, each adapter keeps its own copy of the layer's input (on a quantised base they share it), each
    norm a 32-bit copy of what it reads, attention q, k, v, its output and a 32-bit number per head, the MLP gate, up
    and the activated gate. With every weight trained, linear layers keep their input, and norms their result.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> sum(kept_per_token(layout, llama, Setting(LoraSection(r=16))).values()) // 32 // 1024
    212
    """
    if fused.is_fused(layout):
        return fused.kept_per_token(layout, shape, setting.lora)
    return {
        "norms": shape.layers * _kept_norms(layout, shape),
        "linears": _kept_linears(layout, shape, setting.lora),
        "attention": shape.layers * _kept_attention(layout, shape, setting),
        "mlp": _kept_mlp(layout, shape, setting.lora),
    }


def _kept_norms(layout: Layout, shape: ModelShape) -> int:
    """One layer's norms, per token: input in 32 bits, 1/rms, and the result before the weight when that is trained."""
    h, trained = shape.hidden, trains_all(layout)
    if shape.norm == "layer":
        inputs = 1 if shape.parallel_residual else shape.norms_per_layer
        total = inputs * residual_bytes(layout) * h + 8 * shape.norms_per_layer
    else:
        total = shape.norms_per_layer * (4 * h + 4) + (shape.norms_per_layer * 4 * h if trained else 0)
    if shape.qk_norm:
        width, groups = shape.q_size + shape.kv_size, shape.heads + shape.kv_heads
        normed = (4 if shape.norm == "rms_offset" else compute_bytes(layout)) if trained else 0
        total += width * (4 + normed) + 4 * (groups if shape.qk_norm == "head" else 2)
    return total


def _kept_linears(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """All linear layers' inputs, per token, as far as they are not already kept by attention or the MLP."""
    c = compute_bytes(layout)
    if trains_all(layout):
        readers = _first_readers(shape.linears(), shared=c == 4 or rounded.is_rounded(layout))
        return sum(linear.count * c * linear.inputs for linear in readers if not _is_attention_output(linear, layout))
    linears = adapted(shape, lora)
    small = sum(linear.count * c * lora.r for linear in linears)
    if lora.dora:  # the layer's own result and the adapter's are both multiplied by trained magnitudes
        small += sum(linear.count * 2 * c * linear.outputs for linear in linears)
    # PEFT casts to 32 bits and autocast back: a copy for each adapter. Its 4-bit layers leave the casting to autocast.
    casts = c == 2 and layout.base != "nf4"
    if layout.base == "int8" and casts and layout.device == "cuda":  # LLM.int8 keeps its own fp16 copy of its input
        small += sum(linear.count * c * linear.inputs for linear in shape.linears())
    if lora.dropout:  # each adapter has its own dropped input, and its mask
        mask = 1 if layout.device == "cuda" else 4 if casts else c
        return small + sum(linear.count * (c + mask) * linear.inputs for linear in linears)
    readers = _first_readers(linears, shared=not casts)
    return small + sum(
        linear.count * c * linear.inputs for linear in readers if casts or not _is_attention_output(linear, layout)
    )


def _is_attention_output(linear: Linear, layout: Layout) -> bool:
    """Whether the tensor it reads is the one attention keeps anyway: only the CUDA kernel gives it out uncopied."""
    return linear.reads == "attention_out" and layout.device == "cuda" and layout.precision != "fp32"


def _first_readers(linears: tuple[Linear, ...], shared: bool) -> list[Linear]:
    """One linear layer for each tensor read, where readers share it; all of them where each casts its own copy."""
    return rounded.first_readers(linears) if shared else list(linears)


def _kept_attention(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """One layer's q, k, v, output, and log-sum-exp of each head, per token.

    Where the kernel knows no grouped heads, as none does in 32 bits on a GPU, k and v are kept repeated. A fused
    layer's v keeps its q and k alive. Soft-capped scores that no kernel takes are computed again from q, k and v alone.
    """
    packed = shape.packed_causal and setting.attention in ("auto", "packed")
    if packed and shape.attention_softcap and (layout.device != "cuda" or compute_bytes(layout) == 4):
        return compute_bytes(layout) * (shape.q_size + 2 * shape.kv_size)
    repeated = layout.device == "cuda" and (setting.repeats_keys or compute_bytes(layout) == 4)
    key = shape.q_size if repeated else shape.kv_size
    value = shape.q_size + 2 * shape.kv_size if shape.fused_qkv and not repeated else key
    return compute_bytes(layout) * (2 * shape.q_size + key + value) + 4 * shape.heads


def _kept_mlp(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """All layers' MLP results, per token: gate, up and activated gate; for experts, of those a token meets."""
    c, parts = compute_bytes(layout), 3 if shape.gated_mlp else 1
    mixtures = shape.layers - shape.dense_layers if shape.experts else 0
    dense = (shape.layers - mixtures) * parts * c * shape.intermediate
    if not mixtures:
        return dense
    if packs_experts(layout.base, shape):
        return dense + mixtures * (
            shape.experts_per_token * _kept_packed(layout, shape, lora) + _kept_beside(layout, shape)
        )
    # Of each expert a token meets: its gathered input, gate and up, activated gate, product, output, and two indices.
    per_slot = residual_bytes(layout) * ((parts + 1) * shape.expert_intermediate + 2 * shape.hidden) + 28
    return dense + mixtures * (shape.experts_per_token * per_slot + _kept_beside(layout, shape))


def _kept_packed(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Of each packed expert that a token meets: gate and up, the adapters' thin results, its place and its weight."""
    c = compute_bytes(layout)
    thin = 3 * lora.r if adapts_experts(shape, lora) else 0  # the fused gate and up have twice the rank
    return c * (2 * shape.expert_intermediate + thin) + 8 + 4


def _kept_beside(layout: Layout, shape: ModelShape) -> int:
    """One mixture's shared expert, router and input, per token."""
    c, shared = compute_bytes(layout), shape.shared_expert_intermediate
    parts = 3 if shape.gated_mlp else 1
    return (parts * c * shared + 2 * c * shape.hidden if shared else 0) + 12 * shape.experts + c * shape.hidden


def kept_always(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Bytes all layers keep whatever the micro-batch.

    DoRA sends an identity matrix through each adapter: the square of its inputs. An adapter on stacked experts is
    added to a copy of their weights, unless they are packed. Trained 32-bit weights have 16-bit copies, counted apart
    (`cast_bytes`).
    """
    if trains_all(layout):
        return 0
    c, total = compute_bytes(layout), 0
    if lora.dora:
        total += sum(linear.count * c * linear.inputs * (linear.inputs + lora.r) for linear in adapted(shape, lora))
    return total + (c * shape.expert_parameters() if merges_experts(layout, shape, lora) else 0)


@lru_cache(maxsize=1024)
def cast_bytes(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """16-bit copies of linear layers' trained 32-bit weights, which autocast makes and keeps in a forward pass; those
    of packed experts' adapters are made for each pass and let go, as those in 8 bits are.
    """
    if fused.is_fused(layout):
        return fused.held_always(layout, shape, lora)[1]
    if compute_bytes(layout) == 4 or rounded.is_rounded(layout):
        return 0
    if trains_all(layout):
        return 2 * shape.linear_parameters()
    passing = expert_adapter_parameters(shape, lora) if packs_experts(layout.base, shape) else 0
    return 2 * (adapter_parameters(shape, lora) - saved_whole(shape, lora) - passing)


def score_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> tuple[int, int]:
    """Bytes of scores that one layer keeps for a whole micro-batch, and of the mask all layers share.

    Packed attention has neither. SDPA with a block mask has a byte for each pair of tokens. Beside it soft-capped
    scores need eager attention: the capped scores, the softmax in 32 bits and its copy in the arithmetic's width, for
    every head and pair.
    """
    c, tokens = compute_bytes(layout), layout.micro_batch_tokens
    if fused.is_fused(layout):
        return 0, 0
    pairs = tokens * tokens
    if setting.attention == "flash_attention_2":
        return 0, 0
    if shape.packed_causal and setting.attention in ("auto", "packed"):
        return 0, 0
    if not (shape.attention_softcap or shape.sinks or setting.attention == "eager"):
        return 0, pairs
    per_head = 4 + (c if c != 4 else 0) + (c if shape.attention_softcap else 0)
    return shape.heads * per_head * pairs, c * pairs


@lru_cache(maxsize=1024)
def activation_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What is kept when the forward pass of one micro-batch ends: `micro_batch_tokens` in one row.

    Of a layer that is computed again only the input is kept; the layer whose backward pass runs is counted as
    workspace. With `offload` the last layer's input is on the device, and those that are on their way out.
    """
    tokens, again = layout.micro_batch_tokens, layout.again(shape.layers)
    scores, mask = score_bytes(layout, shape, setting)
    edges = _kept_outside_layers(layout, shape, setting.lora) + mask
    inputs = again if layout.activations != "offload" else min(again, 1 + LEAVING)
    edges += inputs * input_bytes(layout, shape)
    if again == shape.layers:
        return edges
    always = kept_always(layout, shape, setting.lora) + shape.layers * scores
    every = always + tokens * sum(kept_per_token(layout, shape, setting).values())
    return edges + -(-every * (shape.layers - again) // shape.layers)


def _kept_outside_layers(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Ids, positions and targets; rotary tables; the final norm, with its result when its weight is trained.

    A frozen embedding needs no gradient, so the very first norm keeps nothing unless recomputation asks for one.
    """
    h, r = shape.hidden, residual_bytes(layout)
    tables = 2 if shape.family == "gemma3_text" else 1
    rotary = 0 if shape.learned_positions else int(tables * 2 * r * shape.head_dim * shape.rotary_share)
    frozen = not trains_all(layout) and not saved_whole(shape, lora) and not layout.again(shape.layers)
    frozen = frozen and not fused.is_fused(layout)
    first = (r * h + 8 if shape.norm == "layer" else 4 * h + 4) if frozen else 0
    return last_norm_bytes(layout, shape) + layout.micro_batch_tokens * (3 * 8 + rotary - first)


def last_norm_bytes(layout: Layout, shape: ModelShape) -> int:
    """What the norm after all layers keeps. Beside fused layers it takes a piece of many tokens at a time, and keeps
    what goes in.
    """
    h, r, tokens = shape.hidden, residual_bytes(layout), layout.micro_batch_tokens
    if fused.is_fused(layout) and tokens > fused.MLP_TOKENS:
        return tokens * r * h
    if shape.norm == "layer":
        return tokens * (r * h + 8)
    return tokens * (4 * h + 4 + (4 * h if trains_all(layout) else 0))


def input_bytes(layout: Layout, shape: ModelShape) -> int:
    """What goes into a layer: the stream of a micro-batch."""
    return layout.micro_batch_tokens * residual_bytes(layout) * shape.hidden


def offloaded_bytes(layout: Layout, shape: ModelShape) -> int:
    """What a micro-batch's layers have in RAM, in whole pieces: the input of each but the last; 0 unless they do.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> offloaded_bytes(Layout("single", "qlora", "nf4", "bf16", "offload", 102400, "cuda"), llama) // 10**9
    26
    """
    if layout.activations != "offload":
        return 0
    return (shape.layers - 1) * -(-input_bytes(layout, shape) // PIECE_BYTES) * PIECE_BYTES


def recomputed_layer_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What one layer keeps, while it is computed a second time; 0 when all are kept."""
    return one_layer_bytes(layout.of_again, shape, setting) if layout.again(shape.layers) else 0


@lru_cache(maxsize=1024)
def one_layer_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What one layer keeps of a micro-batch; of a fused MLP that is computed again, one piece of the tokens."""
    parts = kept_per_token(layout, shape, setting)
    total = layout.micro_batch_tokens * -(-sum(parts.values()) // shape.layers)
    if fused.is_fused(layout) and layout.again(shape.layers):
        total -= max(0, layout.micro_batch_tokens - fused.MLP_TOKENS) * parts["mlp"] // shape.layers
    always = -(-kept_always(layout, shape, setting.lora) // shape.layers)
    return total + always + score_bytes(layout, shape, setting)[0]
