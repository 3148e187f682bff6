"""What stays in memory from step to step: weights as they are stored, the adapter, the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from kitaeru.plan.types import Base, Layout
from kitaeru.recipe.types import LoraSection, Optimizer
from kitaeru.shape import Linear, ModelShape

NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256
# Of a mixture's packed experts, what a grouped product may have expanded at a time (kernels.experts).
EXPANDED_AT_ONCE_BYTES = 256 << 20
# Layers in memory at a time when they come from disk (model.stream).
LAYERS_FROM_DISK = 2
# Families whose stacked experts PEFT adapts with `all-linear`.
_PEFT_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Setting:
    """What of a recipe the bytes depend on, beside the layout and the shape.

    `accumulates`: several micro-batches make one step, so that gradients are there while activations are kept.
    `repeats_keys`: this torch's packed kernel wants keys and values once for every query head.
    """

    lora: LoraSection
    optimizer: Optimizer = "adamw"
    attention: str = "auto"
    accumulates: bool = True
    repeats_keys: bool = False


def compute_bytes(layout: Layout) -> int:
    """Bytes of one number in the layers' arithmetic: 2 in bf16 and fp16, 4 in fp32."""
    return 4 if layout.precision == "fp32" else 2


def trains_all(layout: Layout) -> bool:
    """Whether every weight is trained, so that weights are held in 32 bits and computed under autocast."""
    return layout.method in ("full", "pretrain")


def trains_from_ram(layout: Layout) -> bool:
    """Whether every weight is trained and lies in RAM with its gradient and moments, and layers come to the devices one
    at a time (parallel.offload).
    """
    return layout.variant == "offload" and layout.strategy in ("single", "fsdp") and trains_all(layout)


def residual_bytes(layout: Layout) -> int:
    """Bytes of one number in the stream between the layers: 32 bits under autocast, else the arithmetic's own."""
    return 4 if trains_all(layout) else compute_bytes(layout)


@lru_cache(maxsize=1024)
def adapted(shape: ModelShape, lora: LoraSection) -> tuple[Linear, ...]:
    """The linear layers that get an adapter."""
    if "all-linear" in lora.targets:
        return shape.linears()
    wanted = {target.rpartition(".")[2] for target in lora.targets}
    return tuple(linear for linear in shape.linears() if linear.name in wanted)


def adapts_experts(shape: ModelShape, lora: LoraSection) -> bool:
    """Whether PEFT puts adapters on the stacked experts too: it does for `all-linear` in the families it knows."""
    return "all-linear" in lora.targets and shape.experts > 0 and shape.family in _PEFT_EXPERTS


def merges_experts(layout: Layout, shape: ModelShape, lora: LoraSection) -> bool:
    """Whether an adapter is added to a copy of the stacked experts' weights for each pass."""
    if trains_all(layout):
        return False
    return adapts_experts(shape, lora) and not packs_experts(layout.base, shape)


def packs_experts(base: Base, shape: ModelShape) -> bool:
    """Whether a base in few bits has its stacked experts in few bits too: gated ones without biases, in whole blocks
    (model.experts).
    """
    if base == "none" or not shape.experts or not shape.gated_mlp or shape.expert_bias:
        return False
    return shape.hidden % NF4_BLOCK == 0 and shape.expert_intermediate % NF4_BLOCK == 0


def expert_stacks(shape: ModelShape) -> tuple[tuple[int, int], tuple[int, int]]:
    """One expert's weights (N, K): gate above up, and down.

    >>> expert_stacks(ModelShape("mixtral", 4096, 14336, 32, 32, 8, 128, 32000, experts=8, expert_intermediate=14336))
    ((28672, 4096), (4096, 14336))
    """
    h, f = shape.hidden, shape.expert_intermediate
    return (2 * f, h), (h, f)


def saved_whole(shape: ModelShape, lora: LoraSection) -> int:
    """Parameters of modules trained whole beside the adapter (`lora.modules_to_save`): the embedding and the head."""
    names = {name.rpartition(".")[2] for name in lora.modules_to_save}
    count = len(names & {"embed_tokens", "embed_in", "wte"}) + len(names & {"lm_head", "embed_out"})
    return count * shape.vocab * shape.hidden


@lru_cache(maxsize=1024)
def adapter_parameters(shape: ModelShape, lora: LoraSection) -> int:
    """Parameters of the adapter: r x (inputs + outputs) for each adapted layer, DoRA's magnitudes, whole modules.

    >>> adapter_parameters(ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256), LoraSection(r=16))
    41943040
    """
    total = 0
    for linear in adapted(shape, lora):
        total += linear.count * (lora.r * (linear.inputs + linear.outputs) + (linear.outputs if lora.dora else 0))
    if adapts_experts(shape, lora):  # the router has an adapter too
        routers = (shape.layers - shape.dense_layers) * lora.r * (shape.hidden + shape.experts)
        total += expert_adapter_parameters(shape, lora) + routers
    return total + saved_whole(shape, lora)


def expert_adapter_parameters(shape: ModelShape, lora: LoraSection) -> int:
    """Those of the adapters on stacked experts: the fused gate and up get twice the rank."""
    if not adapts_experts(shape, lora):
        return 0
    h, f = shape.hidden, shape.expert_intermediate
    return (shape.layers - shape.dense_layers) * shape.experts * lora.r * (2 * (h + 2 * f) + h + f)


def trained_parameters(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """Parameters the optimizer changes."""
    return shape.parameters() if trains_all(layout) else adapter_parameters(shape, lora)


def weight_bytes(layout: Layout, shape: ModelShape) -> tuple[int, int]:
    """The weights as stored, and the scales that come with quantised ones.

    Only linear layers inside the blocks and stacked experts are quantised: embeddings, head, norms and routers stay in
    the arithmetic's width. NF4 with double quantisation: half a byte a weight, one byte per block of 64, four bytes per
    256 such blocks, and two small tables per layer or stack. INT8: one byte a weight and four per row.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> weights, scales = weight_bytes(Layout("single", "qlora", "nf4", "bf16", "keep", 4096, "cuda"), llama)
    >>> round(weights / 2**30, 2), round(scales / 2**20)
    (5.21, 106)
    """
    width = 4 if trains_all(layout) else compute_bytes(layout)
    if layout.variant == "disk":
        return _from_disk(layout, shape, width)
    return _stored(layout.base, width, shape)


@lru_cache(maxsize=1024)
def _stored(base: Base, width: int, shape: ModelShape) -> tuple[int, int]:
    if base == "none":
        return shape.parameters() * width, 0
    experts = shape.expert_parameters() if packs_experts(base, shape) else 0
    rest = (shape.parameters() - shape.linear_parameters() - experts) * width
    stored, scales = experts // 2 if base == "nf4" else experts, _expert_scales(base, shape) if experts else 0
    for linear in shape.linears():
        if base == "nf4":
            blocks = -(-linear.weights // NF4_BLOCK)
            stored += linear.count * ((linear.weights + 1) // 2)
            scales += linear.count * (blocks + 4 * -(-blocks // NF4_SECOND_BLOCK) + 4 * (16 + 256 + 1))
        else:
            stored += linear.count * linear.weights
            scales += linear.count * 4 * linear.outputs
    return rest + stored, scales


def _expert_scales(base: Base, shape: ModelShape) -> int:
    """Bytes of what packed experts' values are multiplied by; each NF4 expert's scales begin a block of their own."""
    total = 0
    for rows, columns in expert_stacks(shape):
        seconds = -(-rows * columns // (NF4_BLOCK * NF4_SECOND_BLOCK))
        one = seconds * (NF4_SECOND_BLOCK + 4) if base == "nf4" else 4 * rows
        total += shape.experts * one + (4 * (16 + 256 + 1) if base == "nf4" else 0)
    return (shape.layers - shape.dense_layers) * total


def _from_disk(layout: Layout, shape: ModelShape, width: int) -> tuple[int, int]:
    """Weights and scales in memory when layers come from disk: the tables, and two layers while one takes the other's
    place.
    """
    weights, scales = weight_bytes(replace(layout, variant=""), shape)
    tables = shape.embedding_parameters() * width
    share = min(LAYERS_FROM_DISK, shape.layers) / shape.layers
    return tables + int((weights - tables) * share), int(scales * share)


def optimizer_bytes(optimizer: Optimizer, layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    """The optimizer's state on the device.

    AdamW keeps two 32-bit moments, or two in 16 bits; 8-bit AdamW two bytes a number and a 32-bit scale per 256; Lion
    one moment; Adafactor a row and a column of each matrix. A paged optimizer's state lies in memory the driver moves,
    not in the allocator's.

    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> optimizer_bytes("adamw", layout, llama, LoraSection(r=16))
    335544320
    """
    count = trained_parameters(layout, shape, lora)
    if optimizer in ("auto", "adamw"):
        return 8 * count
    if optimizer == "adamw_16bit":
        return 4 * count
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
