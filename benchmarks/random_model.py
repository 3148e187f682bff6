"""Models of real shapes with random weights, made on the device: nothing is written, nothing is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def on_device(
    config: Any,
    device: torch.device,
    *,
    dtype: torch.dtype,
    base: str = "none",
    compute: torch.dtype = torch.bfloat16,
    attention: str | None = "sdpa",
    experts: bool = False,
) -> Any:
    """A causal model of a transformers config in `dtype`.

    With a `base` of "nf4" or "int8" the linear layers inside its blocks are packed as bitsandbytes packs a model that
    is loaded, for products in `compute`; with `experts` a mixture's stacks too, as kitaeru packs them. One weight after
    the other is drawn and packed, so that no model need fit whole.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from kitaeru.model import experts as packing
    from kitaeru.model.load import keep_trainable_packing

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    bits: Any = base
    if base != "none" and experts:
        packing.make_room(model, bits)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if base != "none" and type(module) is nn.Linear and module is not head:
                setattr(parent, name, _packed(module, base, device, dtype, compute))
    for module in model.modules():
        if isinstance(module, packing.PackedExperts):
            for name, shape in module.shapes.items():
                packing.fill(module, name, _drawn(shape, device, dtype))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = _drawn(parameter.shape, device, dtype)
                setattr(module, name, nn.Parameter(drawn, parameter.requires_grad))
    model.tie_weights()
    model.to(device)
    if base == "nf4":
        model.is_loaded_in_4bit = True
        if device.type == "cpu":
            keep_trainable_packing(model)
    elif base == "int8":
        model.is_loaded_in_8bit = True
    return model


def _drawn(shape: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    if len(shape) < 2:
        return torch.ones(tuple(shape), device=device, dtype=dtype)
    return torch.empty(tuple(shape), device=device, dtype=dtype).normal_(0, 0.02)


def _packed(linear: nn.Linear, base: str, device: torch.device, dtype: torch.dtype, compute: torch.dtype) -> Any:
    """A linear layer inside the blocks in 4 or 8 bits, as bitsandbytes packs a model that is loaded."""
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = _drawn(linear.weight.shape, device, dtype)
    if base == "nf4":
        how: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
        packed = bnb.nn.Linear4bit(*sizes, compute_dtype=compute, device="meta", **how)
        packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=packed, **how).to(device)
    else:
        packed = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    packed.bias = linear.bias
    return packed
