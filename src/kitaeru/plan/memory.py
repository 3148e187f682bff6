"""How many bytes a layout takes on its device, item by item.

The items follow what the engine really runs: transformers' eager layers, PEFT's adapters, kitaeru's packed attention and
its chunked loss head. Every count is derived from the operations' own rules of what autograd keeps; the tests compare
them with what torch keeps. Bytes are those of torch's allocator: the CUDA context and fragmentation are not in them,
`device_overhead_bytes` and the margin of `choose` stand for those.
"""

from __future__ import annotations

from dataclasses import dataclass

from kitaeru.i18n import N_
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection, Optimizer
from kitaeru.shape import Linear, ModelShape

GIB = 1 << 30
# Rows of logits the loss head holds at a time (kernels.linear_cross_entropy).
HEAD_CHUNK_ROWS = 512
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256
# A process that has imported torch and transformers, before it holds a model.
CPU_PROCESS_BYTES = 750 * 10**6
GPU_PROCESS_HOST_BYTES = 3 * 10**9

_PEFT_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")

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
    "process": N_("Python and its libraries"),
}


@dataclass(frozen=True)
class Setting:
    """What of a recipe the bytes depend on, beside the layout and the shape.

    `accumulates`: several micro-batches make one step, so that gradients are there while activations are kept.
    """

    lora: LoraSection
    optimizer: Optimizer = "adamw"
    attention: str = "auto"
    accumulates: bool = True


def compute_bytes(layout: Layout) -> int:
    """Bytes of one number in the layers' arithmetic: 2 in bf16 and fp16, 4 in fp32."""
    return 4 if layout.precision == "fp32" else 2


def trains_all(layout: Layout) -> bool:
    """Whether every weight is trained, so that weights are held in 32 bits and computed under autocast."""
    return layout.method in ("full", "pretrain")


def residual_bytes(layout: Layout) -> int:
    """Bytes of one number in the stream between the layers: 32 bits under autocast, else the arithmetic's own."""
    return 4 if trains_all(layout) else compute_bytes(layout)


# --- what is stored ---------------------------------------------------------------------------------------------------


def adapted(shape: ModelShape, lora: LoraSection) -> tuple[Linear, ...]:
    """The linear layers that get an adapter."""
    if "all-linear" in lora.targets:
        return shape.linears()
    wanted = {target.rpartition(".")[2] for target in lora.targets}
    return tuple(linear for linear in shape.linears() if linear.name in wanted)


def adapts_experts(shape: ModelShape, lora: LoraSection) -> bool:
    """Whether PEFT puts adapters on the stacked experts too: it does for `all-linear` in the families it knows."""
    return "all-linear" in lora.targets and shape.experts > 0 and shape.family in _PEFT_EXPERTS


def saved_whole(shape: ModelShape, lora: LoraSection) -> int:
    """Parameters of modules trained whole beside the adapter (`lora.modules_to_save`): the embedding and the head."""
    names = {name.rpartition(".")[2] for name in lora.modules_to_save}
    count = len(names & {"embed_tokens", "embed_in", "wte"}) + len(names & {"lm_head", "embed_out"})
    return count * shape.vocab * shape.hidden


def adapter_parameters(shape: ModelShape, lora: LoraSection) -> int:
    """Parameters of the adapter: r x (inputs + outputs) for each adapted layer, DoRA's magnitudes, whole modules.

    >>> adapter_parameters(ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256), LoraSection(r=16))
    41943040
    """
    total = 0
    for linear in adapted(shape, lora):
        total += linear.count * (lora.r * (linear.inputs + linear.outputs) + (linear.outputs if lora.dora else 0))
    if adapts_experts(shape, lora):  # the fused gate and up get twice the rank; the router has an adapter too
        mixtures, h, f = shape.layers - shape.dense_layers, shape.hidden, shape.expert_intermediate
        total += mixtures * (shape.experts * lora.r * (2 * (h + 2 * f) + h + f) + lora.r * (h + shape.experts))
    return total + saved_whole(shape, lora)


def trained_parameters(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Parameters the optimizer changes."""
    return shape.parameters() if trains_all(layout) else adapter_parameters(shape, lora)


def weight_bytes(layout: Layout, shape: ModelShape) -> tuple[int, int]:
    """The weights as stored, and the scales that come with quantised ones.

    Only linear layers inside the blocks are quantised: embeddings, head, norms and stacked experts stay in the
    arithmetic's width. NF4 with double quantisation: half a byte a weight, one byte per block of 64, four bytes per 256
    such blocks, and two small tables per layer. INT8: one byte a weight and four per row.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> weights, scales = weight_bytes(Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda"), llama)
    >>> round(weights / 2**30, 2), round(scales / 2**20)
    (5.21, 106)
    """
    width = 4 if trains_all(layout) else compute_bytes(layout)
    if layout.base == "none":
        return shape.parameters() * width, 0
    rest = (shape.parameters() - shape.linear_parameters()) * width
    stored = scales = 0
    for linear in shape.linears():
        if layout.base == "nf4":
            blocks = -(-linear.weights // NF4_BLOCK)
            stored += linear.count * ((linear.weights + 1) // 2)
            scales += linear.count * (blocks + 4 * -(-blocks // NF4_SECOND_BLOCK) + 4 * (16 + 256 + 1))
        else:
            stored += linear.count * linear.weights
            scales += linear.count * 4 * linear.outputs
    return rest + stored, scales


def optimizer_bytes(optimizer: Optimizer, layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """The optimizer's state on the device.

    AdamW keeps two 32-bit moments; 8-bit AdamW two bytes a number and a 32-bit scale per 256; Lion one moment; Adafactor
    a row and a column of each matrix. A paged optimizer's state lies in memory the driver moves, not in the allocator's.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> optimizer_bytes("adamw", layout, llama, LoraSection(r=16))
    335544320
    """
    count = trained_parameters(layout, shape, lora)
    if optimizer == "adamw":
        return 8 * count
    if optimizer == "lion":
        return 4 * count
    if optimizer == "adamw_8bit":
        return 2 * count + 2 * 4 * count // 256
    if optimizer == "paged_adamw_8bit":
        return 0
    return 4 * _adafactor_numbers(layout, shape, lora)


def _adafactor_numbers(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    if trains_all(layout):
        edges = sum(linear.count * (linear.inputs + linear.outputs) for linear in shape.linears())
        tables = (1 if shape.tied else 2) * (shape.vocab + shape.hidden)
        stacks = (shape.layers - shape.dense_layers) * shape.experts
        experts = stacks * (3 * shape.expert_intermediate + 2 * shape.hidden)
        return edges + tables + experts + shape.small_parameters()
    return sum(linear.count * (linear.inputs + linear.outputs + 2 * lora.r) for linear in adapted(shape, lora))


# --- what the layers keep ---------------------------------------------------------------------------------------------


def kept_per_token(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """Bytes that all layers keep for the backward pass for one token, by part; recomputation left aside.

    In a LoRA of 16 bits, each adapter keeps its own copy of the layer's input (on a quantised base they share it), each
    norm a 32-bit copy of what it reads, attention q, k, v, its output and a 32-bit number per head, the MLP gate, up and
    the activated gate. With every weight trained, linear layers keep their input, and norms their result.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> sum(kept_per_token(layout, llama, Setting(LoraSection(r=16))).values()) // 32 // 1024
    212
    """
    return {
        "norms": shape.layers * _kept_norms(layout, shape),
        "linears": _kept_linears(layout, shape, setting.lora),
        "attention": shape.layers * _kept_attention(layout, shape),
        "mlp": _kept_mlp(layout, shape),
    }


def _kept_norms(layout: Layout, shape: ModelShape) -> int:
    """One layer's norms, per token: input in 32 bits and 1/rms; the result before its weight too when that is trained."""
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
        readers = _first_readers(shape.linears(), shared=c == 4)
        return sum(linear.count * c * linear.inputs for linear in readers if not _is_attention_output(linear, layout))
    linears = adapted(shape, lora)
    small = sum(linear.count * c * lora.r for linear in linears)
    if lora.dora:  # the layer's own result and the adapter's are both multiplied by trained magnitudes
        small += sum(linear.count * 2 * c * linear.outputs for linear in linears)
    casts = c == 2 and layout.base == "none"  # PEFT casts to 32 bits and autocast back: a copy for each adapter
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
    if not shared:
        return list(linears)
    first: dict[tuple[str, int], Linear] = {}
    for linear in linears:
        first.setdefault((linear.reads, linear.inputs), linear)
    return list(first.values())


def _kept_attention(layout: Layout, shape: ModelShape) -> int:
    """One layer's q, k, v, output, and log-sum-exp of each head, per token. A fused layer's v keeps its q and k alive."""
    value = shape.q_size + 2 * shape.kv_size if shape.fused_qkv else shape.kv_size
    return compute_bytes(layout) * (2 * shape.q_size + shape.kv_size + value) + 4 * shape.heads


def _kept_mlp(layout: Layout, shape: ModelShape) -> int:
    """All layers' MLP results, per token: gate, up and activated gate; for experts, of those a token meets."""
    c, parts = compute_bytes(layout), 3 if shape.gated_mlp else 1
    mixtures = shape.layers - shape.dense_layers if shape.experts else 0
    dense = (shape.layers - mixtures) * parts * c * shape.intermediate
    if not mixtures:
        return dense
    # Of each expert a token meets: its gathered input, gate and up, activated gate, product, output, and two indices.
    per_slot = residual_bytes(layout) * ((parts + 1) * shape.expert_intermediate + 2 * shape.hidden) + 28
    shared = shape.shared_expert_intermediate
    beside = (parts * c * shared + 2 * c * shape.hidden if shared else 0) + 12 * shape.experts + c * shape.hidden
    return dense + mixtures * (shape.experts_per_token * per_slot + beside)


def kept_always(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Bytes all layers keep whatever the micro-batch.

    DoRA sends an identity matrix through each adapter: the square of its inputs. An adapter on stacked experts is added to
    a copy of their weights. Trained 32-bit weights have 16-bit copies, counted apart (`cast_bytes`).
    """
    if trains_all(layout):
        return 0
    c, total = compute_bytes(layout), 0
    if lora.dora:
        total += sum(linear.count * c * linear.inputs * (linear.inputs + lora.r) for linear in adapted(shape, lora))
    return total + (c * shape.expert_parameters() if adapts_experts(shape, lora) else 0)


def cast_bytes(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """16-bit copies of the trained 32-bit weights of linear layers, which autocast makes and keeps in a forward pass."""
    if compute_bytes(layout) == 4:
        return 0
    return 2 * (
        shape.linear_parameters() if trains_all(layout) else adapter_parameters(shape, lora) - saved_whole(shape, lora)
    )


def score_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """Bytes per pair of tokens (T x T) in one layer and for all layers: scores of eager attention, and the mask.

    Packed attention has none. SDPA with a block mask has one mask of a byte a pair. Soft-capped scores need eager
    attention: the capped scores, the softmax in 32 bits and its copy in the arithmetic's width, for every head.
    """
    if shape.plain_causal and setting.attention in ("auto", "packed", "flash_attention_2"):
        return 0
    if setting.attention == "flash_attention_2":
        return 0
    c = compute_bytes(layout)
    if not (shape.attention_softcap or shape.sinks or setting.attention == "eager"):
        return 1
    per_head = 4 + (c if c != 4 else 0) + (c if shape.attention_softcap else 0)
    return shape.layers * shape.heads * per_head + c


def activation_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What is kept when the forward pass of one micro-batch ends: `micro_batch_tokens` in one row.

    With `recompute` only each layer's input is kept; the layer whose backward pass runs is counted as workspace.
    """
    tokens = layout.micro_batch_tokens
    edges = _kept_outside_layers(layout, shape, setting.lora) * tokens
    pairs = score_bytes(layout, shape, setting) * tokens * tokens
    if layout.activations == "recompute":
        mask = pairs if pairs == tokens * tokens else compute_bytes(layout) * tokens * tokens if pairs else 0
        return edges + mask + tokens * shape.layers * residual_bytes(layout) * shape.hidden
    always = kept_always(layout, shape, setting.lora)
    return edges + pairs + always + tokens * sum(kept_per_token(layout, shape, setting).values())


def _kept_outside_layers(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Per token: ids, positions and targets; rotary tables; the final norm, with its result when its weight is trained.

    A frozen embedding needs no gradient, so the very first norm keeps nothing unless recomputation asks for one.
    """
    h, r = shape.hidden, residual_bytes(layout)
    final = r * h + 8 if shape.norm == "layer" else 4 * h + 4 + (4 * h if trains_all(layout) else 0)
    tables = 2 if shape.family == "gemma3_text" else 1
    rotary = 0 if shape.learned_positions else int(tables * 2 * r * shape.head_dim * shape.rotary_share)
    frozen = not trains_all(layout) and not saved_whole(shape, lora) and layout.activations == "keep"
    first = (r * h + 8 if shape.norm == "layer" else 4 * h + 4) if frozen else 0
    return 3 * 8 + rotary + final - first


def recomputed_layer_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What one layer keeps, while it is computed a second time; 0 when nothing is recomputed."""
    if layout.activations == "keep":
        return 0
    tokens = layout.micro_batch_tokens
    per_token = -(-sum(kept_per_token(layout, shape, setting).values()) // shape.layers)
    pairs = score_bytes(layout, shape, setting)
    scores = pairs // shape.layers if pairs > 1 else 0
    always = kept_always(layout, shape, setting.lora) // shape.layers
    return always + tokens * per_token + tokens * tokens * scores


# --- what passes -----------------------------------------------------------------------------------------------------


def head_bytes(layout: Layout, shape: ModelShape) -> int:
    """The loss head at its peak: 32-bit chunks of logits, what the head reads, and its gradient.

    In 16 bits a chunk's logits and gradient still stand while the next one's are made: 12 bytes a logit; in 32 bits 8. A
    soft cap doubles that. A trained head adds its gradient in 32 bits, and under autocast its 16-bit copy and a product.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda")
    >>> head_bytes(layout, llama) // 2**20
    823
    """
    tokens, h, vocab, c = layout.micro_batch_tokens, shape.hidden, shape.vocab, compute_bytes(layout)
    rows = min(HEAD_CHUNK_ROWS, tokens)
    copies = (3 if tokens > rows and c == 2 else 2) * (2 if shape.final_softcap else 1)
    total = 2 * tokens * h * residual_bytes(layout) + rows * h * 2 * c
    if not trains_all(layout):
        return total + rows * vocab * 4 * copies
    casts = c * (vocab + tokens) * h if c == 2 else 0
    return total + casts + 4 * vocab * h + max(rows * vocab * 4 * copies, rows * vocab * (4 + c) + c * vocab * h)


def workspace_bytes(layout: Layout, shape: ModelShape) -> int:
    """What one layer holds for a moment beside what is kept, at its peak, forward or backward.

    Measured in units of the MLP's width f and the stream's width h, with every kind of training: in 32 bits the gradients
    of two MLP tensors, 8f + 4h bytes a token; in 16 bits 6f + 7h, or the last norm's backward pass in 32 bits, 22h. A
    quantised layer is unpacked whole; a trained one has its gradient beside the old one.
    """
    c, h = compute_bytes(layout), shape.hidden
    f = (
        shape.intermediate
        if shape.dense_layers or not shape.experts
        else shape.experts_per_token * shape.expert_intermediate
    )
    per_token = 8 * f + 4 * h if c == 4 else max(6 * f + 7 * h, 22 * h)
    wide = max(linear.weights for linear in shape.linears())
    unpacked = {"none": 0, "nf4": c * wide, "int8": (c + 1) * wide}[layout.base]
    trained = (4 + c) * wide if trains_all(layout) else 0
    return layout.micro_batch_tokens * per_token + unpacked + trained


def _dora_workspace(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """DoRA forms a layer's whole weight with the adapter in it: the weight, the adapter's product and their sum, 32 bits."""
    if trains_all(layout) or not lora.dora:
        return 0
    return 12 * max(linear.weights for linear in adapted(shape, lora))


# --- the whole --------------------------------------------------------------------------------------------------------


def memory_items(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """Bytes by item at the moment of a training step when their sum is largest; they add up to the predicted peak.

    The moments compared: the loss head of the last micro-batch, the start of its backward pass (everything kept), the
    end of it (every gradient there, one layer kept), and the optimizer's step.
    """
    stored = stored_items(layout, shape, setting)
    moments = [{**stored, **moment} for moment in _moments(layout, shape, setting)]
    worst = max(moments, key=lambda moment: sum(moment.values()))
    if layout.device == "cpu":
        worst["process"] = CPU_PROCESS_BYTES
    return {name: worst[name] for name in ITEMS if worst.get(name)}


def stored_items(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """What stays from step to step: weights, adapter, optimizer."""
    weights, scales = weight_bytes(layout, shape)
    adapter = 0 if trains_all(layout) else 4 * adapter_parameters(shape, setting.lora)
    optimizer = optimizer_bytes(setting.optimizer, layout, shape, setting.lora)
    return {"weights": weights, "quantization": scales, "adapter": adapter, "optimizer": optimizer}


def _moments(layout: Layout, shape: ModelShape, setting: Setting) -> list[dict[str, int]]:
    gradients = 4 * trained_parameters(layout, shape, setting.lora)
    held = gradients if setting.accumulates else 0
    casts = cast_bytes(layout, shape, setting.lora)
    one_layer = casts // shape.layers if layout.activations == "recompute" else casts
    kept, again = activation_bytes(layout, shape, setting), recomputed_layer_bytes(layout, shape, setting)
    work = workspace_bytes(layout, shape) + _dora_workspace(layout, shape, setting.lora)
    # A trained head's gradient: the saved one and its product with the upstream gradient, beside what accumulates.
    head_gradient = 8 * shape.vocab * shape.hidden if trains_all(layout) else 0
    per_layer = sum(kept_per_token(layout, shape, setting).values()) * layout.micro_batch_tokens // shape.layers
    return [
        {"gradients": held, "weight_casts": casts, "activations": kept, "head": head_bytes(layout, shape)},
        {
            "gradients": held,
            "weight_casts": one_layer,
            "activations": kept + again,
            "head": head_gradient,
            "workspace": work,
        },
        {"gradients": gradients, "activations": max(again, per_layer), "workspace": work},
        {"gradients": gradients, "workspace": _step_workspace(layout, shape, setting)},
    ]


def _step_workspace(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """What the optimizer's step needs beside its state: Adafactor squares and updates a whole tensor at a time."""
    if setting.optimizer != "adafactor":
        return 0
    if trains_all(layout):
        return 12 * max(shape.vocab * shape.hidden, max(linear.weights for linear in shape.linears()))
    return 12 * max(setting.lora.r * max(linear.inputs, linear.outputs) for linear in adapted(shape, setting.lora))


def device_overhead_bytes(layout: Layout, shape: ModelShape) -> int:
    """What a CUDA process takes outside torch's allocator: context, loaded kernels, cuBLAS workspaces. 0 on a CPU."""
    return 700 * 10**6 if layout.device == "cuda" else 0


def host_bytes(layout: Layout, shape: ModelShape, setting: Setting) -> int:
    """RAM of the process: on a CPU everything; beside a GPU the libraries, one file of weights, a paged optimizer's state."""
    if layout.device == "cpu":
        return sum(memory_items(layout, shape, setting).values())
    paged = 0
    if setting.optimizer == "paged_adamw_8bit":
        paged = optimizer_bytes("adamw_8bit", layout, shape, setting.lora)
    return GPU_PROCESS_HOST_BYTES + min(5 * 10**9, 2 * shape.parameters()) + paged
