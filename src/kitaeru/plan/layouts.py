"""Which layouts are legal: one table of rules, each with the reason when it says no.

A layout is a point (`plan.types.Layout`); a new way to train is a new value of one of its fields and a row here that
says when it may be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kitaeru.hardware import Device
from kitaeru.i18n import tr
from kitaeru.plan.types import Activations, Base, Layout, MethodKind, Precision
from kitaeru.recipe.types import Recipe

# What the engine can run today; the planner never chooses anything else.
BUILT_STRATEGIES = ("single",)


@dataclass(frozen=True)
class Case:
    """What a rule looks at: the layout, the wish, the device (None on a CPU)."""

    layout: Layout
    recipe: Recipe
    device: Device | None


Rule = Callable[[Case], str | None]


def _strategy_is_built(case: Case) -> str | None:
    if case.layout.strategy in BUILT_STRATEGIES:
        return None
    return tr("The strategy {strategy} is not built yet: one device trains.", strategy=case.layout.strategy)


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


RULES: tuple[Rule, ...] = (
    _strategy_is_built,
    _cuda_needs_a_gpu,
    _whole_weights_are_not_quantised,
    _qlora_is_nf4,
    _bf16_needs_ampere,
    _fp16_needs_a_gpu,
    _int8_needs_turing,
    _quantised_needs_pascal,
    _paged_needs_a_gpu,
    _pissa_needs_a_whole_base,
)


def illegal(layout: Layout, recipe: Recipe, device: Device | None) -> str | None:
    """Why this layout cannot be used; None when it can."""
    case = Case(layout, recipe, device)
    return next((reason for rule in RULES if (reason := rule(case))), None)


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


def activation_policies(recipe: Recipe) -> tuple[Activations, ...]:
    """What may be done with activations: what the recipe pins, else both, the faster one first."""
    pinned = recipe.limits.checkpointing
    return ("keep", "recompute") if pinned is None else ("recompute",) if pinned else ("keep",)


def precision_for(recipe: Recipe, device: Device | None) -> Precision:
    """The arithmetic: what the recipe pins, else bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if device is None:
        return "fp32"
    return "bf16" if device.has_bf16 else "fp16"
