"""A model in 4 or 8 bits: a copy on disk, and what each costs and loses, measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from kitaeru.errors import ModelError, UsageError
from kitaeru.export.card import write_card
from kitaeru.export.place import new_folder, weight_files_bytes
from kitaeru.export.probe import logits_of, loss_of, probe_ids
from kitaeru.i18n import tr
from kitaeru.model.experts import PackedExperts
from kitaeru.model.generate import first_device
from kitaeru.model.head import distance
from kitaeru.model.load import DTYPES, is_quantised, load_config, load_to_answer
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.plan.types import Base, Precision
from kitaeru.recipe.types import ModelSection

Bits = Literal[4, 8]
_BASES: dict[int, Base] = {4: "nf4", 8: "int8", 16: "none"}
NEW_TOKENS = 32


@dataclass(frozen=True)
class Quantised:
    """A quantised copy. `apart`: how far its logits lie from the unquantised model's, as a share of their size."""

    folder: Path
    bits: Bits
    weight_bytes: int
    apart: float


@dataclass(frozen=True)
class Measured:
    """One way to hold a model, measured here. `bits` 16: unquantised, in the arithmetic's own width (32 on a CPU).

    `loss` is the mean loss in nats a token of the texts, `apart` how far logits lie from the unquantised model's.
    """

    bits: int
    weight_bytes: int
    load_seconds: float
    tokens_per_second: float
    loss: float
    apart: float
    peak_bytes: int


def quantize(section: ModelSection, bits: Bits, target: Path) -> Quantised:
    """Write the model in NF4 (double quantisation) or LLM.int8 to `target`, with tokenizer and model card.

    The written folder is opened again, and its logits compared with those of the model it was written from.

    Raises:
        UsageError: the model is quantised already, or `target` is not empty.
        ModelError: it cannot be loaded, or what was written is not it.
    """
    quiet_libraries()
    if is_quantised(load_config(section)):
        raise UsageError(
            tr("{model} holds its weights in few bits already.", model=section.name),
            remedy=tr("Start from the unquantised model."),
        )
    precision, tokenizer = stored_precision(section), load_tokenizer(section)
    ids = probe_ids(tokenizer)
    with new_folder(target) as folder:
        whole = logits_of(load_to_answer(section, base="none", precision=precision), ids)
        model = load_to_answer(section, base=_BASES[bits], precision=precision)
        if not is_quantised(model.config):
            raise ModelError(tr("transformers cannot quantise {model}.", model=section.name))
        if any(isinstance(module, PackedExperts) for module in model.modules()):
            raise ModelError(
                tr("There is no file format in which other programs would read the packed experts of {model}.",
                   model=section.name),
                remedy=tr("It needs none: training and chat pack the experts while they load the 16-bit files."),
            )  # fmt: skip
        meant = logits_of(model, ids)
        model.save_pretrained(str(folder), safe_serialization=True)
        tokenizer.save_pretrained(str(folder))
        del model
        _let_go()
        again = load_to_answer(ModelSection(name=str(folder)), base="none", precision=precision)
        if not distance(logits_of(again, ids), meant) <= 1e-3:
            raise ModelError(
                tr("The files in {folder} do not hold the model they were written from.", folder=target.name),
                remedy=tr("Please report this."),
            )
        apart = distance(meant, whole)
        facts = {
            tr("weights"): f"{bits} bit ({'NF4' if bits == 4 else 'LLM.int8'}, bitsandbytes)",
            tr("bytes of weights"): f"{weight_files_bytes(folder):,}",
            tr("logits, apart from the original's"): f"{apart:.2%}",
        }
        title = f"{Path(section.name).name} {bits}bit"
        write_card(folder, title=title, base=section.name, tags=("quantized",), library="transformers", facts=facts)
        size = weight_files_bytes(folder)
    return Quantised(target, bits, size, apart)


def benchmark(section: ModelSection, texts: Sequence[str] = ()) -> Iterator[Measured]:
    """The model unquantised, in 8 and in 4 bits: what each takes, how fast it answers, what it loses. One at a time.

    `texts` are what the loss is measured on, beside a fixed Japanese paragraph.

    Raises:
        ModelError: it cannot be loaded.
    """
    quiet_libraries()
    precision, tokenizer = usual_precision(), load_tokenizer(section)
    ids = probe_ids(tokenizer, texts)
    whole: torch.Tensor | None = None
    for bits in (16, 8, 4):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model = load_to_answer(section, base=_BASES[bits], precision=precision)
        seconds = time.perf_counter() - started
        logits = logits_of(model, ids)
        whole = logits if whole is None else whole
        yield Measured(
            bits=bits if bits < 16 else torch.finfo(DTYPES[precision]).bits,
            weight_bytes=held_bytes(model),
            load_seconds=seconds,
            tokens_per_second=_speed(model, ids),
            loss=loss_of(logits, ids),
            apart=distance(logits, whole),
            peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        )
        del model
        _let_go()


def stored_precision(section: ModelSection) -> Precision:
    """The width a model's weights are stored in, which what is not quantised keeps."""
    dtype = load_config(section).dtype
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


def usual_precision() -> Precision:
    """The arithmetic of answers on this machine: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights as they are held, scales of quantised ones included, tied ones once."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(t.numel() * t.element_size() for t in state.as_dict(packed=True).values())
        scales = getattr(parameter, "SCB", None)
        total += scales.numel() * scales.element_size() if scales is not None else 0
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return total + sum(buffer.numel() * buffer.element_size() for module in experts for buffer in module.buffers())


def _speed(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Tokens a second of one answer, after a short one that warms up."""
    prompt = ids[:, :16].to(first_device(model))
    words = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        model.generate(prompt, max_new_tokens=2, min_new_tokens=2, **words)
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **words)
    return NEW_TOKENS / (time.perf_counter() - started)


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
