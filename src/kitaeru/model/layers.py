"""The decoder of a causal language model and its layers, found by what the config says of their number."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kitaeru.model.offload import Host


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part below the output head; the model itself where there is no such part."""
    found: nn.Module = getattr(model, model.base_model_prefix, model)
    return found


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The name, in the decoder, of the list of its layers, and the list; None where none has the config's length."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = [
        (name, child)
        for name, child in decoder_of(model).named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    return found[0] if len(found) == 1 else None


def checkpoint_by_layer(model: PreTrainedModel, count: int, host: Host | None) -> bool:
    """Of a model whose checkpointing is enabled let only the first `count` layers do it, with their inputs in `host`
    but for the last layer's, which is wanted at once. Whether its layers can be told so.
    """
    found = layers_of(model)
    layers: list[Any] = list(found[1]) if found else []
    if not layers or not all(hasattr(layer, "_gradient_checkpointing_func") for layer in layers):
        return False
    for layer in layers[count:]:
        layer.gradient_checkpointing = False
    if host is not None:
        host.attach(decoder_of(model))
        for layer in layers[: min(count, len(layers) - 1)]:
            layer._gradient_checkpointing_func = host.checkpointed(layer._gradient_checkpointing_func)
    return True


class Draws:
    """Random numbers of a forward pass that depend on its seed and on the layer, not on the layers before: the same
    dropout wherever a model is cut.
    """

    def __init__(self) -> None:
        self._seed: int | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Let each layer of `model` draw from a seed of its own in training."""
        found = layers_of(model)
        for index, layer in enumerate(found[1] if found else ()):
            layer.register_forward_pre_hook(partial(self._enter, index))

    def begin(self, seed: int) -> None:
        """A pass of this seed begins; a backward pass that computes again must begin with that of its forward pass."""
        self._seed = seed % 2**48
        torch.manual_seed(self._seed)

    def _enter(self, index: int, layer: nn.Module, _: Any) -> None:
        if layer.training and self._seed is not None:
            torch.manual_seed(self._seed * 65_521 + index + 1)
