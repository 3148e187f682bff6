"""What the fused layer keeps, holds and does: the counterpart in numbers of `model.fused`.

`Layout.arithmetic` is "plain" where layers run as their authors wrote them. Else, under an adapter, the frozen products
are computed in 16 bits, FP8 or INT8 by one operation a layer, which keeps exactly what its backward pass needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kitaeru.plan.stored import adapted, trains_all
from kitaeru.plan.types import Arithmetic, Layout
from kitaeru.recipe.types import LoraSection, Recipe
from kitaeru.shape import Linear, ModelShape

# Tokens that the MLP of a layer takes at a time where it is computed again, and a final norm.
MLP_TOKENS = 16384
# Sizes of micro-batches that CUDA graphs are made for, a quarter, two, three and all of the largest: others are padded.
GRAPH_SIZES = 4
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
# What reads the same tensor is one product.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
)  # fmt: skip


def is_fused(layout: Layout) -> bool:
    """Whether layers run as one operation each: those with trained weights never do (`plan.rounded`)."""
    return layout.arithmetic != "plain" and not trains_all(layout)


@dataclass(frozen=True)
class Group:
    """Linear layers of one decoder layer that are one product: widths, and the sum of the adapters' ranks."""

    inputs: int
    outputs: int
    rank: int

    def extra(self, layout: Layout) -> int:
        """Further columns for the adapter."""
        return extra_columns(layout.arithmetic, self.rank)


def extra_columns(arithmetic: Arithmetic, rank: int) -> int:
    """Columns beside a product's own for adapters whose ranks sum to `rank` (kernels.rows): a multiple of 128 bytes,
    since products read aligned rows.

    >>> extra_columns("fp8", 48), extra_columns("16bit", 8), extra_columns("int8", 48)
    (128, 64, 0)
    """
    if not rank or arithmetic == "int8":
        return 0
    return -(-2 * rank // 128) * 128 if arithmetic == "fp8" else -(-rank // 64) * 64


@lru_cache(maxsize=64)
def groups(shape: ModelShape, lora: LoraSection) -> tuple[Group, ...]:
    """qkv, o, gate and up, down."""
    linears: dict[str, Linear] = {linear.name: linear for linear in shape.linears()}
    wanted = {linear.name for linear in adapted(shape, lora)}
    found = []
    for names in GROUPS:
        members = [linears[name] for name in names]
        rank = lora.r * sum(name in wanted for name in names)
        found.append(Group(members[0].inputs, sum(linear.outputs for linear in members), rank))
    return tuple(found)


def why_not(shape: ModelShape, lora: LoraSection) -> str | None:
    """What a layer of this model has that the fused one does not know; None where it fits. For `plan.layouts`."""
    if shape.family not in FAMILIES or shape.experts:
        return "family"
    if not shape.packed_causal:
        return "attention"
    if lora.dora or lora.dropout or lora.modules_to_save:
        return "adapter"
    names = {linear.name for linear in shape.linears()}
    if not {name for group in GROUPS for name in group} <= names or shape.hidden % 64 or shape.intermediate % 64:
        return "family"
    return None


def no_graphs(layout: Layout, recipe: Recipe) -> str | None:
    """What keeps a micro-batch's passes from being one CUDA graph; None where they can. For `plan.layouts`.

    A graph repeats the same kernels on the same addresses: nothing in it may be drawn, copied to the host, or wait for
    other devices; its micro-batches are padded to a few sizes.
    """
    if layout.device != "cuda":
        return "device"
    if not is_fused(layout) or layout.precision != "bf16":
        return "layers"
    if layout.strategy not in ("single", "ddp") or layout.variant:
        return "way"
    if layout.activations == "offload":
        return "activations"
    if layout.step_in_backward:
        return "gradients"
    if recipe.train.neftune_alpha is not None:
        return "noise"
    return None if recipe.data.packing else "packing"


def replays(layout: Layout, recipe: Recipe) -> bool:
    """Whether a micro-batch's passes can be one CUDA graph (`Layout.graphs`)."""
    return no_graphs(layout, recipe) is None


def _number(layout: Layout) -> int:
    """Bytes of a number that a product reads."""
    return 1 if layout.in_8_bits else _width(layout)


def _turns(layout: Layout) -> bool:
    """Whether rows and weights are turned before they are rounded (kernels.turned)."""
    return layout.arithmetic == "int8"


def _width(layout: Layout) -> int:
    return 4 if layout.precision == "fp32" else 2


def kept_per_token(layout: Layout, shape: ModelShape, lora: LoraSection) -> dict[str, int]:
    """Bytes that all layers keep for the backward pass for one token, by part.

    The two norms' results as the products read them, with 1/rms and their scale, and those of the two norms of what is
    added, where there are such; q, k, v, the output of attention and a number per head; gate and up, in 8 bits with
    `keep8`; each adapter's thin result.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "qlora", "nf4", "bf16", "keep8", 8192, "cuda", arithmetic="fp8")
    >>> sum(kept_per_token(layout, llama, LoraSection(r=16)).values()) // 32
    57976
    """
    n, w, qkv, out, both, down = _number(layout), _width(layout), *groups(shape, lora)
    scale = 4 if n == 1 else 0
    per_head = 4 * (shape.heads + shape.kv_heads) if shape.qk_norm else 0
    count = 4 if shape.sandwiched else 2
    norms = n * (count * shape.hidden + qkv.extra(layout) + both.extra(layout)) + count * (scale + 4)
    attention = w * (2 * shape.q_size + 2 * shape.kv_size) + 4 * shape.heads + per_head
    eight = layout.activations == "keep8"
    mlp = 2 * shape.intermediate * (1 if eight else w) + (8 if eight else 0)
    thin = w * (qkv.rank + out.rank + both.rank + down.rank)
    parts = {"norms": norms, "linears": thin, "attention": attention, "mlp": mlp}
    return {name: shape.layers * size for name, size in parts.items()}


def workspace_bytes(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """What the layer holds at its fullest beside what is kept: in the middle of its forward pass (gate and up still
    there, the activated product being written), or of its backward pass (the gradients of both, or the product that
    takes them back, with its expanded weight). Where the MLP is computed again, it is so a piece of the tokens at a
    time, and attention's backward pass may be the fullest: it adds dq up in 32 bits and has dk and dv for every head.
    """
    n, w, _, _, both, down = _number(layout), _width(layout), *groups(shape, lora)
    h, f, tokens = shape.hidden, shape.intermediate, layout.micro_batch_tokens
    again = layout.again(shape.layers) == shape.layers
    piece = min(tokens, MLP_TOKENS) if again else tokens
    of_both = 2 * f * w if layout.activations == "keep8" else 0
    gradient = n * (2 * f + both.extra(layout))
    forward = tokens * 3 * h * w + piece * (of_both + n * (f + down.extra(layout)))
    middle = tokens * w * h + piece * (n * (h + down.extra(layout)) + w * f + gradient + n * f)
    back = tokens * 2 * w * h + piece * gradient + n * h * (2 * f + both.extra(layout))
    if not again:
        return max(forward, middle, back)
    whole = tokens * w * h if piece < tokens else 0  # the gradient of what the MLP reads
    key = 2 * w * shape.kv_size + (2 * w * shape.q_size if shape.kv_size != shape.q_size else 0)
    attention = tokens * (2 * w * h + (4 + 2 * w) * shape.q_size + key)
    gone = tokens * n * (h + both.extra(layout)) + piece * 2 * f * w  # of what the layer keeps
    return max(forward, middle + whole, back, attention - gone)


def forward_bytes(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """What a layer holds at its fullest in a pass without gradients (`FusedLayer.through`), its input and result
    counted: attention's part, which is let go of as a whole; the MLP, a piece of the tokens at a time, when its gate
    is computed, or the product before it with its expanded weight.
    """
    n, w, qkv, out, both, down = _number(layout), _width(layout), *groups(shape, lora)
    h, f, tokens = shape.hidden, shape.intermediate, layout.micro_batch_tokens
    piece, through = min(tokens, MLP_TOKENS), n * (h + both.extra(layout))
    normed = n * h if shape.sandwiched else 0
    rows = n * (h + qkv.extra(layout)) + max(n * (shape.q_size + out.extra(layout)), through + normed)
    attention = tokens * (3 * w * h + rows + 2 * w * (shape.q_size + shape.kv_size) + 4 * shape.heads)
    stream = tokens * (2 * w * h + through)
    gate = stream + piece * (2 * w * f + n * (f + down.extra(layout)) + w * h)
    return max(attention, gate, stream + piece * 2 * w * f + n * h * (2 * f + both.extra(layout)))


def held_always(layout: Layout, shape: ModelShape, lora: LoraSection) -> tuple[int, int]:
    """Bytes of scales of the rows and columns of the frozen weights, and of the adapters' copies in the layers' width,
    each B with room for the others of its group, and as two numbers in 8 bits.
    """
    every = groups(shape, lora)
    scales = sum(4 * (g.inputs + g.outputs) for g in every) if _number(layout) == 1 else 0
    thin = sum(_width(layout) * g.rank * (g.inputs + g.outputs) for g in every)
    return shape.layers * scales, shape.layers * thin + digit_bytes(layout, shape, lora)


def digit_bytes(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Bytes of the adapters' copies as two numbers in 8 bits and a scale a row, which rows in 8 bits are multiplied by
    on a GPU (kernels.copies).
    """
    if not layout.in_8_bits or layout.device != "cuda":
        return 0
    return shape.layers * sum(2 * g.rank * (g.inputs + g.outputs + 4) for g in groups(shape, lora))


def streamed_bytes_per_token(layout: Layout, shape: ModelShape, lora: LoraSection, *, forward: bool) -> float:
    """Bytes that the row kernels and the thin products of one layer move for one token, read and written once."""
    n, w, h, f = _number(layout), _width(layout), shape.hidden, shape.intermediate
    q, kv, size = shape.q_size, shape.kv_size, sum(g.rank for g in groups(shape, lora))
    if forward:
        norms = w * h + n * h + 3 * w * h + n * h
        kept = 4 * f if layout.activations == "keep8" else 0  # rounding costs more than the bytes it writes
        rows = 2 * w * (q + kv) + (w + n) * q + norms + (2 * w + n) * f + kept + 3 * w * h
        thin = n * (h + q + h + f) if size else 0
        return float(rows + thin + (2 * n * h if shape.sandwiched else 0))
    gates = 2 * f if layout.activations == "keep8" else 2 * w * f
    rows = (w + n) * h + w * f + gates + 3 * n * f + (3 * w + 2 * n) * h + (w + n) * (q + 2 * kv) + (3 * w + n) * h
    outputs = q + 2 * kv + h + 2 * f + h
    thin = 2 * n * outputs + n * (2 * h + f) + w * q if size else 0
    return float(rows + thin + ((w + 2 * n) * h if shape.sandwiched else 0))


def expanded_bytes(layout: Layout, shape: ModelShape) -> float:
    """Bytes moved to expand one layer's frozen weights for one pass: those of an MLP in pieces for each piece."""
    stored = {"none": 2.0, "nf4": 0.52, "int8": 1.0}[layout.base]
    pieces = -(-layout.micro_batch_tokens // MLP_TOKENS) if layout.again(shape.layers) else 1
    mlp = 3 * shape.hidden * shape.intermediate
    return (shape.linear_parameters() / shape.layers + (pieces - 1) * mlp) * (stored + _number(layout))


# Widths of heads that cuDNN's kernel for examples of one length takes (`kernels.packed_attention`).
EVEN_HEADS = (64, 128)


def turning_flops(layout: Layout, shape: ModelShape, *, forward: bool) -> float:
    """FLOP in 16 bits that turn one layer's rows and weights for one pass: two products with 16 x 16 a number, each 16
    products and additions. The kernels of the gate read a row twice, once for its scale, and turn it twice.
    """
    if not _turns(layout):
        return 0.0
    h, f, q, kv = shape.hidden, shape.intermediate, shape.q_size, shape.kv_size
    rows = 2 * h + q + 2 * f if forward else 4 * h + 4 * f + q + 2 * kv
    return 64.0 * (layout.micro_batch_tokens * rows + shape.linear_parameters() / shape.layers)


def operations(layout: Layout, *, forward: bool) -> float:
    """Kernels and calls of one layer's pass: the two took an H100's host 5.1 ms, at 20 microseconds each (Qwen3-0.6B,
    docs/notes/0022). Before some were merged, 138 and 230 were fitted to many points (docs/notes/0012).
    """
    return 94.0 if forward else 156.0


# Kernels of a layer's pass besides the copies of its adapters: counted in the code that launches them.
KERNELS_FORWARD, KERNELS_BACKWARD = 19, 45


def kernels(layout: Layout, shape: ModelShape, lora: LoraSection, *, forward: bool) -> int:
    """Kernels of one layer's pass, each of which costs a gap on the device even where a graph launches them all at
    once. The forward pass copies each group's adapters.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda", arithmetic="fp8", graphs=True)
    >>> [kernels(layout, llama, LoraSection(), forward=forward) for forward in (True, False)]
    [23, 45]
    """
    if forward:
        return KERNELS_FORWARD + sum(g.rank > 0 for g in groups(shape, lora))
    return KERNELS_BACKWARD + shape.sandwiched
