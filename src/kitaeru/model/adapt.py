"""Putting an adapter on a model, through PEFT."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model.experts import PackedExperts, adapt_packed
from kitaeru.plan.layouts import beyond_experts, experts_remedy, experts_take
from kitaeru.recipe.types import LoraSection


def add_adapter(model: PreTrainedModel, section: LoraSection, seed: int) -> PeftModel:
    """`model` with a fresh LoRA adapter; only the adapter (and `modules_to_save`) is trained, in fp32.

    Raises:
        ModelError: a target names no layer of this model, or PEFT cannot adapt it so.
    """
    targets = _targets(model, section.targets)
    torch.manual_seed(seed)
    init: Any = {"default": True}.get(section.init, section.init)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        modules_to_save=list(section.modules_to_save) or None,
        use_dora=section.dora,
        use_rslora=section.rslora,
        init_lora_weights=init,
    )
    try:
        adapted = get_peft_model(model, adapt_packed(config))
    except (ValueError, TypeError, AttributeError) as error:
        wishes = beyond_experts(section)
        if wishes and _has_stacks(model):
            raise ModelError(experts_take(wishes), remedy=experts_remedy()) from error
        if isinstance(error, AttributeError):
            raise
        raise ModelError(tr("The adapter does not fit this model: {said}", said=str(error).splitlines()[0])) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def read_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the adapter of a PEFT folder, for answers."""
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        config = adapt_packed(config)
    return PeftModel.from_pretrained(model, str(folder), config=config)


def _has_stacks(model: PreTrainedModel) -> bool:
    """Whether a module has weights of several experts in one tensor."""
    return any(
        isinstance(module, PackedExperts) or any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        for module in model.modules()
    )


def _targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> str | list[str]:
    if wanted == ("all-linear",):
        return "all-linear"
    names = {name for name, module in model.named_modules() if not list(module.children())}
    last = {name.rsplit(".", 1)[-1] for name in names}
    unknown = [name for name in wanted if name not in last and not any(full.endswith(name) for full in names)]
    if unknown:
        linear = sorted(
            {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
        )
        near = difflib.get_close_matches(unknown[0], linear, 1)
        hint = tr("Did you mean {name}?", name=near[0]) + " " if near else ""
        raise ModelError(
            tr("`lora.targets`: this model has no layer named {names}.", names=", ".join(unknown)),
            remedy=hint + tr("Its linear layers: {names}", names=", ".join(linear)),
        )
    return list(wanted)
