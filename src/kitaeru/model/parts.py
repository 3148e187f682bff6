"""A model that comes a part at a time: each layer, and what lies around them, for strategies that keep pieces of it.

`outline` gives the model with stand-ins, which have the shapes of the weights and no memory, so that an adapter can be
put on it. `Parts.read` then reads one layer the way the whole model would be read (renamed, converted, quantised on
arrival), and `Parts.put` puts what was read, here or by another process, in its place. RAM holds one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model.layers import layers_of
from kitaeru.model.load import (
    DTYPES,
    attention_for,
    keep_trainable_packing,
    load_config,
    load_model,
    model_source,
    not_loaded,
)
from kitaeru.model.stages import Share, anatomy_of
from kitaeru.model.stream import SCALES, make_room_for_4_bits
from kitaeru.plan.layouts import comes_in_parts
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection, ModelSection


@dataclass(frozen=True)
class Parts:
    """Where the weights of an outline come from. `layers` are its layers in order; part number i is layer i, the first
    with the embedding and the last with what follows the layers. `owners`: by name, the module that has a weight or
    buffer, and its name there, whatever an adapter has been wrapped around it since.
    """

    section: ModelSection
    layout: Layout
    seed: int
    prefix: str
    layers: tuple[nn.Module, ...]
    owners: Mapping[str, tuple[nn.Module, str]]

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a part by name, on the layout's device; of a 4-bit weight also its constants, NAME#CONSTANT.

        Raises:
            ModelError: it cannot be read.
        """
        share = Share((1,) * len(self.layers), (number,))
        model = load_model(self.section, self.layout, self.seed, share)
        own, edge = f"{self.prefix}.{number}.", number in (0, len(self.layers) - 1)
        found: dict[str, Tensor] = {}
        for name, (module, kept) in _owners(model).items():
            tensor = getattr(module, kept)
            if tensor.is_meta or not (name.startswith(own) or (edge and not name.startswith(f"{self.prefix}."))):
                continue
            found[name] = tensor.detach()
            if isinstance(tensor, bnb.nn.Params4bit):
                found[name] = tensor.data
                constants = tensor.quant_state.as_dict(packed=True)
                found |= {f"{name}{SCALES}{key}": value.to(tensor.device) for key, value in constants.items()}
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `read` gave in its place. 4-bit weights become plain bytes: their constants are the module's.

        Raises:
            ModelError: it has other weights in 4 bits than the outline.
        """
        constants: dict[str, dict[str, Tensor]] = {}
        for key in tensors:
            name, mark, constant = key.partition(SCALES)
            if mark:
                constants.setdefault(name, {})[constant] = tensors[key]
        for name, tensor in tensors.items():
            if SCALES in name:
                continue
            module, own = self.owners[name]
            if isinstance(module, bnb.nn.Linear4bit) != (name in constants) and own == "weight":
                raise ModelError(
                    tr("{model} is stored in 4 bits otherwise than this strategy needs.", model=self.section.name),
                    where=name,
                    remedy=tr("Train it with another strategy: --set strategy=ddp or --set strategy=pipeline."),
                )
            if name in constants:
                assert isinstance(module, bnb.nn.Linear4bit)
                module.quant_state = bnb.functional.QuantState.from_dict(constants[name], tensor.device)
                module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
            elif own in module._buffers:
                module._buffers[own] = tensor
            else:
                module._parameters[own].data = tensor  # type: ignore[union-attr]


def outline(
    section: ModelSection, layout: Layout, lora: LoraSection, seed: int
) -> tuple[PreTrainedModel, Parts | None]:
    """A model with stand-ins for its weights, and where these come from. Where the model or the way it is trained wants
    all weights at once, the model itself, loaded whole, and None.

    Raises:
        ModelError: as `load_model`.
    """
    if not comes_in_parts(layout, lora):
        return load_model(section, layout, seed), None
    config = load_config(section)
    trains_all = layout.method == "full"
    dtype = torch.float32 if trains_all else DTYPES[layout.precision]
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention_for(section, config),
                trust_remote_code=section.trust_remote_code,
            )
        model.tie_weights()
        with suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(model_source(section), revision=section.revision)
    except ModelError:
        raise
    except Exception as error:
        raise not_loaded(section, error) from error
    try:
        prefix = f"{model.base_model_prefix}.{anatomy_of(model).layers}"
    except ModelError:  # no list of layers that could be read one by one
        if layout.base != "none":
            raise
        return load_model(section, layout, seed), None
    found = layers_of(model)
    assert found is not None
    if layout.base == "nf4":
        for layer in found[1]:
            make_room_for_4_bits(layer, layout.precision)
        model.is_loaded_in_4bit = True  # as transformers says it to PEFT
        if layout.device == "cpu":
            keep_trainable_packing(model)
    _stand_in(model)
    one = replace(layout, strategy="single", devices=1, replicas=1, variant="", shards=0)
    return model, Parts(section, one, seed, prefix, tuple(found[1]), _owners(model))


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter (a tied one by all its names) and buffer: its name, the module that has it, its name there."""
    return {
        f"{path}.{own}" if path else own: (module, own)
        for path, module in model.named_modules()
        for own, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _stand_in(model: nn.Module) -> None:
    """Give each parameter one number that stands everywhere in it: PEFT looks at devices, kinds and shapes."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in new:
                packed = isinstance(parameter, bnb.nn.Params4bit)
                shape = (-(-parameter.numel() // 2), 1) if packed else parameter.shape
                data = torch.zeros((), dtype=torch.uint8 if packed else parameter.dtype).expand(shape)
                new[id(parameter)] = (
                    bnb.nn.Params4bit(data, requires_grad=False, quant_type="nf4", bnb_quantized=True)
                    if packed
                    else nn.Parameter(data, requires_grad=False)
                )
            module._parameters[own] = new[id(parameter)]
