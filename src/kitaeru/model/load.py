"""Loading a causal language model as the plan says: dtype, quantisation, attention, device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model import attention
from kitaeru.model.bundled import bundled_folder
from kitaeru.model.experts import packing
from kitaeru.model.stages import Share, keep_only, move, places_of, put_back, without
from kitaeru.plan.stored import trains_from_ram
from kitaeru.plan.types import Base, Layout, Precision
from kitaeru.recipe.types import ModelSection

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_source(section: ModelSection) -> str:
    """The folder or Hub id behind a recipe's model name."""
    return str(bundled_folder()) if section.name == "bundled" else section.name


def load_config(section: ModelSection) -> PretrainedConfig:
    """The model's config, without its weights.

    Raises:
        ModelError: not found, no network, no permission, it wants to run code of its own, or it is more than a language
            model.
    """
    source = model_source(section)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:
        raise not_loaded(section, error) from error
    if not hasattr(config, "num_hidden_layers"):
        raise ModelError(
            tr("{model} is more than a language model: it also sees or hears.", model=section.name),
            remedy=tr("Name a model of text alone, or a folder with the language model taken out of it."),
        )
    return config


def load_model(
    section: ModelSection,
    layout: Layout,
    seed: int,
    share: Share | None = None,
    devices: Sequence[torch.device] = (),
) -> PreTrainedModel:
    """The model on the layout's device, ready for an adapter or for full training.

    Frozen bases are stored as the layout's base says; weights that will all be trained are fp32 masters, computed
    under autocast. `pretrain` starts from random weights drawn from `seed`. With a `share` only the weights of its
    stages are read, and the rest of the model is on the meta device; with `devices` each stage goes to its own.

    Raises:
        ModelError: it cannot be found or loaded, or cut into stages.
    """
    config = load_config(section)
    options: dict[str, Any] = {
        "attn_implementation": attention_for(section, config),
        "trust_remote_code": section.trust_remote_code,
    }
    trains_all = layout.method in ("full", "pretrain")
    dtype = torch.float32 if trains_all else DTYPES[layout.precision]
    # Cut into pieces a layer at a time on its way to the device: it need not fit there whole.
    through_ram = layout.strategy in ("fsdp", "tensor", "zero3") or trains_from_ram(layout)
    device = torch.device("cpu" if through_ram else layout.device)
    if layout.method == "pretrain":
        torch.manual_seed(seed)
        config.dtype = torch.float32
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:
            raise not_loaded(section, error) from error
        if share is not None:
            return keep_only(model, share, device)
        return move(model, layout.cuts, devices) if devices else model.to(device)
    source = model_source(section)
    _refuse_pickles(source)
    if layout.base != "none":
        options["quantization_config"] = quantisation(layout.base, layout.precision)
    elif is_quantised(config):
        raise ModelError(
            tr("{model} holds its weights in few bits already.", model=section.name),
            remedy=tr("Train an adapter on it: --set method=qlora for 4 bits, --set model.quantize=int8 for 8."),
        )
    kind: Any = AutoModelForCausalLM
    places: dict[str, torch.device] = {"": device}
    outline = None
    try:
        if share is not None or devices:
            outline = _outline(config, options, dtype)
            kind = type(outline) if share is None else without(type(outline), share)
            places = places_of(outline, layout.cuts, devices) if devices else places
        loaded: PreTrainedModel = kind.from_pretrained(
            source,
            config=config,
            revision=section.revision,
            dtype=dtype,
            device_map=places,
            use_safetensors=True,
            **options,
        )
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:
        raise not_loaded(section, error) from error
    if outline is not None:
        remove_hook_from_submodules(loaded)  # stages move their own inputs
        if share is not None:
            loaded.__class__ = type(outline)
            put_back(loaded, outline, share)
    if layout.base == "nf4" and layout.device == "cpu":
        keep_trainable_packing(loaded)
    return loaded


def _outline(config: PretrainedConfig, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory: names, shapes and code."""
    plain = {name: value for name, value in options.items() if name != "quantization_config"}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **plain)
    return model


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether a config speaks of weights that are stored in few bits."""
    return getattr(config, "quantization_config", None) is not None


def keep_trainable_packing(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes its inference-only layout of 4-bit weights on CPUs with AVX512-BF16.

    It repacks the weights at the first evaluation, and from then on gradients end silently at each such layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attention_for(section: ModelSection, config: PretrainedConfig) -> str | None:
    """The attention implementation of transformers for a recipe's wish; None leaves it to transformers.

    Raises:
        ModelError: `packed` is asked for, and the model has other than causal attention.
    """
    if section.attention in ("auto", "packed"):
        attention.register()
        if attention.suits(config):
            return attention.NAME
        if section.attention == "packed":
            raise ModelError(
                tr("{model} does not use causal attention in every layer, or with dropout.", model=section.name),
                remedy=tr("Leave `model.attention` out, or set it to sdpa or eager."),
            )
        # None: SDPA where the model has it, else its own.
        return "eager" if attention.own_kernel(config) == "eager" else None
    return section.attention


def quantisation(base: Base, precision: Precision) -> BitsAndBytesConfig:
    """How transformers must store a base in 4 (NF4, double quantisation) or 8 bits (LLM.int8); its experts too."""
    if base == "int8":
        return packing(BitsAndBytesConfig(load_in_8bit=True))
    return packing(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[precision],
        )
    )


def _refuse_pickles(source: str) -> None:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise ModelError(
            tr("{folder} holds its weights as pickles (.bin), which can run code when opened.", folder=source),
            remedy=tr("Use a copy with .safetensors files, or convert it where you trust it."),
        )


def not_loaded(section: ModelSection, error: Exception) -> ModelError:
    """The cause in a sentence, with the first line of the library's own words. Tokens never appear in it."""
    text = str(error)
    name = section.name
    said = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
    if "trust_remote_code" in text:
        remedy = tr("It wants to run Python code of its own. If you trust it: --set model.trust_remote_code=true")
    elif "gated" in text.lower() or "401" in text or "403" in text:
        remedy = tr("Accept its licence on its Hub page and log in with `hf auth login`.")
    elif "safetensors" in text.lower():
        remedy = tr("Only .safetensors weights are read: pickles can run code when opened.")
    elif Path(name).exists():
        remedy = tr("The folder must hold config.json and .safetensors files.")
    else:
        remedy = tr("Check the name and the network; a local folder works without one.")
    return ModelError(tr("The model {name} cannot be loaded: {said}", name=name, said=said), remedy=remedy)


def config_dict(config: PretrainedConfig) -> dict[str, Any]:
    """The config as plain data, for `ModelShape.from_config`."""
    value: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return value


def load_to_answer(
    section: ModelSection,
    *,
    base: Base,
    precision: Precision,
    device_map: Any = "auto",
    max_memory: dict[int | str, Any] | None = None,
    offload_folder: Path | None = None,
) -> PreTrainedModel:
    """The model for answers, wherever its parts find room: on the GPUs, then in RAM, in the end in `offload_folder`.

    `device_map` and `max_memory` are accelerate's. Parts that lie on disk are read from the model's own .safetensors
    files each time they are needed; only what has to be converted is written to the folder.

    Raises:
        ModelError: it cannot be found or loaded, or there is no room and no folder.
    """
    config = load_config(section)
    source = model_source(section)
    _refuse_pickles(source)
    options: dict[str, Any] = {"attn_implementation": attention_for(section, config)}
    if options["attn_implementation"] == attention.NAME:  # for packed rows; one answer is no packed row
        options["attn_implementation"] = attention.own_kernel(config)
    if base != "none":
        options["quantization_config"] = quantisation(base, precision)
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=DTYPES[precision],
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=None if offload_folder is None else str(offload_folder),
            use_safetensors=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise not_loaded(section, error) from error
    if offload_folder is None and "disk" in getattr(loaded, "hf_device_map", {}).values():
        raise ModelError(
            tr("{model} does not fit into the GPUs and RAM together.", model=section.name),
            remedy=tr("Name a folder on a fast disk, offload_folder: parts are then read from disk when needed; slow."),
        )
    keep_trainable_packing(loaded)
    loaded.eval()
    return loaded
