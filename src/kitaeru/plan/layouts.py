"""Which layouts are legal: one table of rules, each with the reason when it says no.

A layout is a point (`plan.types.Layout`); a new way to train is a new value of one of its fields and a row here that
says when it may be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kitaeru.hardware import Device
from kitaeru.i18n import tr
from kitaeru.plan import fused, rounded
from kitaeru.plan.stored import adapts_experts, packs_experts, trains_all, trains_from_ram
from kitaeru.plan.types import Activations, Arithmetic, Base, Layout, MethodKind, Precision
from kitaeru.recipe.checks import ZERO as ZERO
from kitaeru.recipe.types import LoraSection, Recipe
from kitaeru.shape import ModelShape

# The variant of `single` whose frozen layers come from `limits.offload_folder`, one at a time.
DISK = "disk"
# Layers that are on a device at a time when their weights lie in RAM, and whose gradients are on their way down.
LAYERS_AT_ONCE = 2
# Variants of a strategy that the engine can run; the planner shows the others and never chooses them.
VARIANTS_BUILT: dict[str, tuple[str, ...]] = {
    "single": ("", DISK, "offload"),
    "pipeline": ("1f1b", "interleaved", "gpipe"),
    "fsdp": ("", "grad", "offload"),
    "zero2": ("", "offload"),
    "zero3": ("", "offload", "offload-all"),
}
# Bases with which a built strategy is known to train exactly; a strategy that is not named takes all.
BASES_BUILT: dict[str, tuple[Base, ...]] = {"fsdp": ("none", "nf4"), "tensor": ("none",), "zero3": ("none",)}
SHARDED = ("fsdp", "zero3")
# Strategies whose devices go through all layers, so that what is done with activations may differ from layer to layer.
BY_LAYER = ("single", "ddp", "fsdp")
# What families call the input table.
EMBEDDINGS = ("embed_tokens", "embed_in", "wte")
# Strategies that are known to train exactly with a mixture's experts in few bits.
EXPERTS_PACKED = ("single", "ddp", "pipeline", "model_parallel", "fsdp")
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class Case:
    """What a rule looks at: the layout, the wish, the device (None on a CPU), and where they are known the model and
    the micro-batches of one step on one replica.
    """

    layout: Layout
    recipe: Recipe
    device: Device | None
    shape: ModelShape | None = None
    micro_batches: int = 0


Rule = Callable[[Case], str | None]


def is_built(layout: Layout) -> bool:
    """Whether the engine can run this way today."""
    variants = VARIANTS_BUILT.get(layout.strategy, ("",))
    return layout.variant in variants and layout.base in BASES_BUILT.get(layout.strategy, (layout.base,))


def waits_to_be_asked(strategy: str, recipe: Recipe) -> bool:
    """Whether a strategy is only taken when a recipe names it: DeepSpeed is an extra."""
    return strategy in ZERO and recipe.strategy != strategy


def comes_in_parts(layout: Layout, lora: LoraSection) -> bool:
    """Whether a model is read a layer at a time, each by one process, which deals its pieces out.

    Random weights are drawn all at once; some adapters start from whole weights, and a module that is trained beside an
    adapter is a copy of one.
    """
    if layout.method == "pretrain" or not (layout.strategy in ("fsdp", "tensor", "zero3") or trains_from_ram(layout)):
        return False
    return layout.method == "full" or _starts_alone(lora)


def _starts_alone(lora: LoraSection) -> bool:
    return lora.init not in ("pissa", "olora") and not lora.dora and not lora.modules_to_save


def _cuda_needs_a_gpu(case: Case) -> str | None:
    if case.layout.device == "cpu" or case.device is not None:
        return None
    return tr("There is no GPU that kitaeru can use on this machine.")


def _whole_weights_are_not_quantised(case: Case) -> str | None:
    if case.layout.method in ("lora", "qlora") or case.layout.base == "none":
        return None
    return tr("Weights that are all trained cannot be stored in 4 or 8 bits.")


def _qlora_is_nf4(case: Case) -> str | None:
    if case.layout.method != "qlora" or case.layout.base == "nf4":
        return None
    return tr("QLoRA is an adapter on a 4-bit base.")


def _bf16_needs_ampere(case: Case) -> str | None:
    device = case.device
    if case.layout.precision != "bf16" or case.layout.device == "cpu" or device is None or device.has_bf16:
        return None
    return tr("{device} has no bf16 arithmetic (it needs compute capability 8.0 or later).", device=device.name)


def _fp16_needs_a_gpu(case: Case) -> str | None:
    if case.layout.precision != "fp16" or case.layout.device == "cuda":
        return None
    return tr("fp16 needs a GPU.")


def _int8_needs_turing(case: Case) -> str | None:
    device = case.device
    if case.layout.base != "int8" or case.layout.device == "cpu" or device is None or device.sm >= 7.5:
        return None
    return tr("{device} has no INT8 matrix units (they come with compute capability 7.5).", device=device.name)


def _quantised_needs_pascal(case: Case) -> str | None:
    device = case.device
    if case.layout.base == "none" or case.layout.device == "cpu" or device is None or device.sm >= 6.0 or not device.sm:
        return None
    return tr("{device} is too old for bitsandbytes (compute capability 6.0).", device=device.name)


def _paged_needs_a_gpu(case: Case) -> str | None:
    if case.recipe.train.optimizer != "paged_adamw_8bit" or case.layout.device == "cuda":
        return None
    return tr("A paged optimizer moves its state between GPU and RAM: it needs a GPU.")


def _pissa_needs_a_whole_base(case: Case) -> str | None:
    if case.layout.base == "none" or case.layout.method not in ("lora", "qlora") or case.recipe.lora.init != "pissa":
        return None
    return tr("PiSSA starts from the singular values of weights that are not quantised.")


def _several_devices(case: Case) -> str | None:
    if case.layout.strategy == "single" or case.layout.devices > 1:
        return None
    return tr("{strategy} shares work between devices, and there is one.", strategy=case.layout.strategy)


def _int8_is_not_sharded(case: Case) -> str | None:
    if case.layout.base != "int8" or case.layout.strategy not in (*SHARDED, "tensor"):
        return None
    return tr("LLM.int8 keeps its weights where {strategy} cannot cut them.", strategy=case.layout.strategy)


def _packed_experts_are_known(case: Case) -> str | None:
    if case.layout.strategy in EXPERTS_PACKED or case.shape is None or not packs_experts(case.layout.base, case.shape):
        return None
    return tr("Experts in few bits are trained by these strategies: {names}.", names=", ".join(EXPERTS_PACKED))


def _experts_take_plain_lora(case: Case) -> str | None:
    layout, shape, lora = case.layout, case.shape, case.recipe.lora
    if layout.method not in ("lora", "qlora") or shape is None or not adapts_experts(shape, lora):
        return None
    wishes = beyond_experts(lora)
    return experts_take(wishes) + " " + experts_remedy() if wishes else None


def beyond_experts(lora: LoraSection) -> list[str]:
    """What a recipe wants of adapters that PEFT does not know for experts, whose weights are stacked in one tensor."""
    init = [f"lora.init={lora.init}"] if lora.init in ("pissa", "olora") else []
    return init + ["lora.dora=true"] * lora.dora + ["lora.dropout"] * bool(lora.dropout)


def experts_take(wishes: list[str]) -> str:
    """Says so."""
    return tr(
        "A mixture's experts lie stacked, and PEFT's adapters for these know no {wishes}.", wishes=", ".join(wishes)
    )


def experts_remedy() -> str:
    """What can be done about it."""
    return tr("Leave that out, or adapt the attention alone: --set lora.targets=[q_proj,k_proj,v_proj,o_proj]")


def _tensor_needs_whole_weights(case: Case) -> str | None:
    if case.layout.strategy != "tensor" or case.layout.base == "none":
        return None
    return tr("bitsandbytes packs a 4-bit weight in one piece; tensor parallelism would have to cut it.")


def _tensor_divides_heads(case: Case) -> str | None:
    shape, count = case.shape, case.layout.ranks_per_replica
    if case.layout.strategy != "tensor" or shape is None or count < 2:
        return None
    widths = (shape.heads, shape.kv_heads, shape.expert_intermediate or shape.intermediate)
    if all(width % count == 0 for width in widths):
        return None
    return tr(
        "Tensor parallelism over {count} devices needs {heads} query heads, {keys} key heads and an MLP of {width} to "
        "divide by {count}.",
        count=count,
        heads=widths[0],
        keys=widths[1],
        width=widths[2],
    )


def _tensor_knows_the_layers(case: Case) -> str | None:
    shape, layout = case.shape, case.layout
    if layout.strategy != "tensor":
        return None
    if layout.method in ("lora", "qlora") and case.recipe.lora.dora:
        return tr("DoRA looks at whole rows of weights, of which each device has a part.")
    if shape is None:
        return None
    if shape.experts:
        return tr("Tensor parallelism cuts no experts; a pipeline keeps them whole.")
    fused_qkv = shape.fused_qkv and shape.family != "gpt_neox"  # whose rows are in the order of heads
    if fused_qkv or shape.fused_gate_up or shape.qk_norm == "full":
        return tr("Tensor parallelism cuts a layer by its heads, and in this model one weight or norm spans them all.")
    if shape.attention_dropout:
        return tr("Dropout of attention would be drawn for each device's own heads, otherwise than on one device.")
    return None


def _stages_have_layers(case: Case) -> str | None:
    layout, shape = case.layout, case.shape
    if layout.strategy not in ("pipeline", "model_parallel") or shape is None:
        return None
    stages = layout.ranks_per_replica * layout.chunks
    if shape.layers >= stages:
        return None
    return tr(
        "{stages} stages need at least as many layers; the model has {layers}.", stages=stages, layers=shape.layers
    )


def _trained_tables_are_on_one_device(case: Case) -> str | None:
    layout, shape = case.layout, case.shape
    staged = layout.strategy in ("pipeline", "model_parallel")
    if not staged or shape is None or not shape.tied or layout.method in ("lora", "qlora"):
        return None
    return tr(
        "Input and output share one table; a pipeline would train two copies of it, on its first and last device."
    )


def _stages_start_alone(case: Case) -> str | None:
    lora = case.recipe.lora
    if case.layout.strategy != "pipeline" or case.layout.method not in ("lora", "qlora"):
        return None
    if lora.init not in ("pissa", "olora") and not lora.dora:
        return None
    return tr("PiSSA, OLoRA and DoRA start from the weights of every layer, and each process has only its own.")


def _pieces_start_alone(case: Case) -> str | None:
    if case.layout.strategy != "fsdp" or case.layout.base == "none" or _starts_alone(case.recipe.lora):
        return None
    return tr(
        "PiSSA, OLoRA, DoRA and `modules_to_save` start from whole weights, and fsdp loads pieces of packed ones."
    )


def _optimizer_sees_whole_weights(case: Case) -> str | None:
    optimizer, strategy = case.recipe.train.optimizer, case.layout.strategy
    if strategy == "fsdp" and case.layout.method in ("lora", "qlora"):  # every device has the whole adapter
        return None
    # Blocks of 8-bit moments would be cut elsewhere on another number of devices.
    if strategy not in ("fsdp", "tensor", *ZERO) or optimizer not in ("adafactor", *BITSANDBYTES_OPTIMIZERS):
        return None
    return tr(
        "{optimizer} needs whole weights; {strategy} gives each device a piece.",
        optimizer=optimizer,
        strategy=case.layout.strategy,
    )


def _pieces_have_no_loss_scale(case: Case) -> str | None:
    layout = case.layout
    pieces = (
        layout.strategy in ("pipeline", "tensor", *ZERO)
        or trains_from_ram(layout)
        or (layout.strategy == "fsdp" and layout.method not in ("lora", "qlora"))
    )
    if not pieces or layout.precision != "fp16":
        return None
    return tr(
        "fp16 scales the loss by what overflows, and with {strategy} each device sees only its piece.",
        strategy=layout.strategy,
    )


def _offloaded_optimizer_is_adamw(case: Case) -> str | None:
    optimizer = case.recipe.train.optimizer
    if optimizer == "adamw_16bit" and not trains_from_ram(case.layout):
        return tr("Moments in 16 bits are for weights that are all trained and lie in RAM.")
    if not case.layout.variant.startswith("offload") or optimizer in ("auto", "adamw", "adamw_16bit"):
        return None
    if case.layout.strategy == "fsdp" and case.layout.method in ("lora", "qlora"):  # its optimizer stays
        return None
    return tr("An optimizer that runs on the CPU is AdamW.")


def _adapters_need_no_offload(case: Case) -> str | None:
    if not case.layout.variant.startswith("offload") or case.layout.method in ("full", "pretrain"):
        return None
    if case.layout.strategy == "fsdp":  # the base goes to RAM
        return None
    return tr("An adapter's optimizer is too small for offloading it to give room.")


def _activations_go_somewhere(case: Case) -> str | None:
    layout = case.layout
    if layout.activations != "offload":
        return None
    if layout.device == "cpu":
        return tr("On a CPU activations are in RAM already.")
    if layout.strategy not in BY_LAYER:
        return tr("Activations are offloaded only where a device goes through all layers.")
    if layout.variant.startswith("offload"):
        return tr("Weights come from RAM already; activations would have to wait for the same link.")
    return None


def _some_layers_are_recomputed(case: Case) -> str | None:
    layout, shape = case.layout, case.shape
    if not layout.recomputed:
        return None
    if layout.strategy not in BY_LAYER:
        return tr("Only some layers are computed again where a device goes through all of them.")
    if shape is not None and layout.recomputed >= shape.layers:
        return tr(
            "The model has {count} layers; all are computed again with --set limits.checkpointing=true",
            count=shape.layers,
        )
    return None


def _layers_from_ram_are_computed_twice(case: Case) -> str | None:
    if not trains_from_ram(case.layout) or case.layout.activations == "recompute":
        return None
    return tr("Layers whose weights come from RAM are computed twice: they are not kept in between.")


def _disk_keeps_frozen_layers(case: Case) -> str | None:
    layout = case.layout
    if layout.variant != DISK:
        return None
    if layout.method not in ("lora", "qlora") or layout.base == "int8":
        return tr("From disk come frozen layers in 16 or 4 bits: it takes `method: lora` or `qlora`.")
    if layout.activations != "recompute":
        return tr("Layers that come from disk are computed twice: they are not kept in between.")
    return None


FUSED_STRATEGIES = ("single", "ddp", "pipeline")


def _fused_layers_are_known(case: Case) -> str | None:
    layout, shape = case.layout, case.shape
    if not fused.is_fused(layout):
        return tr("`keep8` belongs to fused layers.") if layout.activations == "keep8" else None
    if layout.strategy not in FUSED_STRATEGIES or layout.variant == DISK:
        return tr("Fused layers need their weights whole, which {way} does not give them.", way=layout.way)
    if layout.precision == "fp16" or (layout.precision == "fp32" and layout.device == "cuda"):
        return tr("Fused layers work in bf16.")
    reason = None if shape is None else fused.why_not(shape, case.recipe.lora)
    if reason == "adapter":
        return tr("Fused layers know plain LoRA: no dropout, no DoRA, no `modules_to_save`.")
    if reason is not None:
        return tr("This model's layers are none that kitaeru can fuse (Llama, Mistral, Qwen2, Qwen3 and Gemma are).")
    return None


def _trained_products_are_known(case: Case) -> str | None:
    layout, shape = case.layout, case.shape
    if layout.arithmetic == "plain" or not trains_all(layout):
        return None
    if layout.arithmetic == "16bit":
        return tr("Fused layers have frozen weights: where all are trained, 16 bits are `train.arithmetic: plain`.")
    if layout.strategy not in rounded.STRATEGIES:
        return tr("Trained weights are not multiplied in 8 bits with {way}.", way=layout.way)
    if layout.precision == "fp16" or (layout.precision == "fp32" and layout.device == "cuda"):
        return tr("Beside products in 8 bits everything else is computed in bf16.")
    if shape is not None and shape.experts:
        return tr("A mixture's experts are trained in 16 bits, and they are most of its work.")
    return None


def _graphs_hold_fused_layers(case: Case) -> str | None:
    layout = case.layout
    reason = fused.no_graphs(layout, case.recipe) if layout.graphs else None
    if reason == "device":
        return tr("CUDA graphs need a GPU.")
    if reason == "layers":
        return tr("A CUDA graph holds fused layers in bf16, and these layers run as the model's own code.")
    if reason == "way":
        return tr("CUDA graphs are for single and ddp: with {way} a device waits for others in a pass.", way=layout.way)
    if reason == "activations":
        return tr("Activations that go to RAM are no part of a CUDA graph.")
    if reason == "gradients":
        return tr("A CUDA graph adds to gradients that stay in their places.")
    if reason == "noise":
        return tr("NEFTune draws noise for each micro-batch, and a CUDA graph draws nothing.")
    if reason == "packing":
        return tr("A CUDA graph is for micro-batches of a few sizes: it takes `data.packing: true`.")
    return None


def _gradients_may_go(case: Case) -> str | None:
    """Where weights change in the backward pass, nothing may want all gradients."""
    layout, recipe = case.layout, case.recipe
    if not layout.step_in_backward:
        return None
    if layout.strategy != "single" or layout.variant:
        return tr("Weights change in the backward pass only on one device that holds all of them.")
    if layout.precision == "fp16":
        return tr("fp16 looks at all gradients, whether one overflows, before weights change.")
    if recipe.train.max_grad_norm:
        return tr(
            "Gradients are clipped to a norm of {limit}, which is known when all are there (`train.max_grad_norm`).",
            limit=recipe.train.max_grad_norm,
        )
    if recipe.train.on_nan == "skip":
        return tr("A gradient that is not finite could not be skipped: other weights have changed by then.")
    if case.micro_batches > 1 or not (recipe.data.packing or recipe.train.global_batch_examples == 1):
        return tr("A step has several micro-batches, whose gradients are added up.")
    return None


def _eight_bits_need_units(case: Case) -> str | None:
    device, arithmetic = case.device, case.layout.arithmetic
    if case.layout.device == "cpu" or device is None or arithmetic == "plain":
        return None
    least = {"16bit": 8.0, "int8": 8.0, "fp8": 8.9}[arithmetic]
    if device.sm >= least:
        return None
    return tr("{device} cannot compute so (it needs compute capability {least}).", device=device.name, least=least)


def _zero3_cuts_numbers(case: Case) -> str | None:
    layout = case.layout
    if layout.strategy != "zero3" or layout.method not in ("lora", "qlora"):
        return None
    if layout.base != "none":
        return tr("DeepSpeed's ZeRO-3 cuts weights up as numbers, and packed ones are bytes; ZeRO-2 leaves them whole.")
    if {name.rpartition(".")[2] for name in case.recipe.lora.targets} & set(EMBEDDINGS):
        return tr("PEFT's adapter of an embedding is read outside of its layer, where ZeRO-3 has not put it together.")
    return None


def _zero_changes_every_weight(case: Case) -> str | None:
    if case.layout.strategy not in ZERO or case.shape is None or not case.shape.experts:
        return None
    return tr(
        "DeepSpeed updates an expert that has seen no token as if its gradient were nought; others leave it alone."
    )


def _zero_offloads_from_a_gpu(case: Case) -> str | None:
    layout = case.layout
    if layout.strategy not in ZERO or not layout.variant or layout.device == "cuda":
        return None
    return tr("On a CPU everything is in RAM already.")


RULES: tuple[Rule, ...] = (
    _cuda_needs_a_gpu,
    _several_devices,
    _whole_weights_are_not_quantised,
    _qlora_is_nf4,
    _bf16_needs_ampere,
    _fp16_needs_a_gpu,
    _int8_needs_turing,
    _quantised_needs_pascal,
    _paged_needs_a_gpu,
    _pissa_needs_a_whole_base,
    _int8_is_not_sharded,
    _packed_experts_are_known,
    _experts_take_plain_lora,
    _tensor_needs_whole_weights,
    _tensor_divides_heads,
    _tensor_knows_the_layers,
    _stages_have_layers,
    _trained_tables_are_on_one_device,
    _stages_start_alone,
    _pieces_start_alone,
    _optimizer_sees_whole_weights,
    _pieces_have_no_loss_scale,
    _offloaded_optimizer_is_adamw,
    _adapters_need_no_offload,
    _activations_go_somewhere,
    _some_layers_are_recomputed,
    _layers_from_ram_are_computed_twice,
    _disk_keeps_frozen_layers,
    _fused_layers_are_known,
    _trained_products_are_known,
    _graphs_hold_fused_layers,
    _gradients_may_go,
    _eight_bits_need_units,
    _zero3_cuts_numbers,
    _zero_changes_every_weight,
    _zero_offloads_from_a_gpu,
)


def illegal(
    layout: Layout, recipe: Recipe, device: Device | None, shape: ModelShape | None = None, micro_batches: int = 0
) -> str | None:
    """Why this layout cannot be used; None when it can."""
    case = Case(layout, recipe, device, shape, micro_batches)
    return next((reason for rule in RULES if (reason := rule(case))), None)


@dataclass(frozen=True)
class Arrangement:
    """How devices share the work: the part of a layout that does not depend on method or micro-batch."""

    strategy: str
    variant: str = ""
    devices: int = 1
    replicas: int = 1
    chunks: int = 1
    shards: int = 0

    @property
    def split_over(self) -> int:
        """Devices that one copy of the model is split over."""
        return self.shards or (self.devices if self.strategy == "fsdp" else self.devices // self.replicas)

    @property
    def ranks_go_through_all(self) -> bool:
        """Whether a device goes through all layers of what it computes."""
        return self.strategy not in ("pipeline", "model_parallel", "tensor")


_OFFLOADS = {"zero1": ("",), "zero2": ("", "offload"), "zero3": ("", "offload", "offload-all")}


def arrangements(wish: str, count: int, group: int | None = None) -> Iterator[Arrangement]:
    """Ways to use `count` devices, simplest first; `wish` is the recipe's strategy, `group` the devices that fsdp may
    cut a copy among (those of one host) where there are more.
    """
    for arrangement in _all_arrangements(count, group):
        if wish in ("auto", arrangement.strategy):
            yield arrangement


def _all_arrangements(count: int, group: int | None) -> Iterator[Arrangement]:
    yield Arrangement("single")
    yield Arrangement("single", DISK)
    yield Arrangement("single", "offload")
    if count < 2:  # shown as illegal, with the reason
        yield from (Arrangement(name) for name in ("ddp", "fsdp", "pipeline", "model_parallel", "tensor", *ZERO))
        return
    yield Arrangement("ddp", "", count, count)
    if group is not None and 1 < group < count and count % group == 0:
        yield from (Arrangement("fsdp", variant, count, count, shards=group) for variant in ("", "grad", "offload"))
    yield from (Arrangement("fsdp", variant, count, count) for variant in ("", "grad", "offload"))
    for stages in (s for s in range(2, count + 1) if count % s == 0):
        yield Arrangement("pipeline", "1f1b", count, count // stages)
        yield Arrangement("pipeline", "interleaved", count, count // stages, 2)
        yield Arrangement("pipeline", "gpipe", count, count // stages)
    yield Arrangement("model_parallel", "", count)
    yield from (Arrangement("tensor", "", count, count // ranks) for ranks in range(2, count + 1) if count % ranks == 0)
    yield from (Arrangement(name, variant, count, count) for name in ZERO for variant in _OFFLOADS[name])


def ways(recipe: Recipe) -> Iterator[tuple[MethodKind, Base]]:
    """The methods a recipe leaves open, each with how the base is stored, in the order they are preferred."""
    base = recipe.model.quantize
    if recipe.method in ("full", "pretrain"):
        yield recipe.method, "none"
    elif recipe.method == "qlora" or base == "nf4":
        yield ("lora" if recipe.method == "lora" else "qlora"), "nf4"
    else:
        yield "lora", "int8" if base == "int8" else "none"
        if recipe.method == "auto" and base == "auto":
            yield "qlora", "nf4"


def activation_policies(recipe: Recipe, *, eight: bool = False) -> tuple[Activations, ...]:
    """What may be done with activations, by fused layers in `eight` bits or others: what the recipe pins, else all, the
    faster one first.
    """
    limits = recipe.limits
    kept: tuple[Activations, ...] = ("keep", "keep8") if eight else ("keep",)
    if limits.offload_activations:
        return ("offload",)
    if limits.checkpointing is False or limits.recomputed_layers is not None:
        return kept
    again: tuple[Activations, ...] = ("recompute",) if limits.offload_activations is False else ("recompute", "offload")
    return again if limits.checkpointing else (*kept, *again)


def arithmetic_for(recipe: Recipe, layout: Layout, device: Device | None, shape: ModelShape) -> Arithmetic:
    """How the products of a layout are computed: what the recipe pins, else in the device's 8 bits where layers can be
    fused, else plainly: trained weights are multiplied in 8 bits only if a recipe says so.
    """
    wish = recipe.train.arithmetic
    if wish != "auto":
        return wish
    if device is None or layout.device == "cpu" or device.sm < 8.0 or trains_all(layout):
        return "plain"
    eight: Arithmetic = "fp8" if 9.0 <= device.sm < 12.0 else "int8"
    return "plain" if illegal(replace(layout, arithmetic=eight), recipe, device, shape) else eight


def precision_for(recipe: Recipe, device: Device | None) -> Precision:
    """The arithmetic: what the recipe pins, else bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if device is None:
        return "fp32"
    return "bf16" if device.has_bf16 else "fp16"
