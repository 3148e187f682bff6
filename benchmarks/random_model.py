"""Models of real shapes with random weights, made on the device: nothing is written, nothing is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def on_device(
    config: Any,
    device: torch.device,
    *,
    dtype: torch.dtype,
    base: str = "none",
    compute: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    experts: bool = False,
) -> Any:
    """A causal model of a transformers config in `dtype`.

    With a `base` of "nf4" or "int8" the linear layers inside its blocks are packed as bitsandbytes packs a model that
    is loaded, for products in `compute`; with `experts` a mixture's stacks too, as kitaeru packs them.
    """
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.to(device)  # what a model's own code has put elsewhere
    if base != "none":
        if experts:
            _pack_experts(model, base)
        _pack(model, base, compute)
    return model


def _pack(model: Any, base: str, compute: torch.dtype) -> None:
    import bitsandbytes as bnb

    from kitaeru.model.load import keep_trainable_packing

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear or linear is head:
                continue
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            weight = linear.weight.data
            if base == "nf4":
                how: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
                packed = bnb.nn.Linear4bit(*sizes, compute_dtype=compute, device="meta", **how)
                packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=packed, **how).to(weight.device)
            else:
                packed = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
                packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
            packed.bias = linear.bias
            setattr(parent, name, packed)
            del weight, linear
    if base == "nf4":
        model.is_loaded_in_4bit = True
        if model.device.type == "cpu":
            keep_trainable_packing(model)
    else:
        model.is_loaded_in_8bit = True


def _pack_experts(model: Any, bits: Any) -> None:
    from kitaeru.model import experts

    stacks = {
        path: {name: getattr(module, name).data for name in experts.STACKS}
        for path, module in model.named_modules()
        if experts.recognised(module)
    }
    experts.make_room(model, bits)
    for path in list(stacks):
        whole = stacks.pop(path)
        for name in list(whole):
            experts.fill(model.get_submodule(path), name, whole.pop(name))
