"""Answers from a model: one prompt in, text out, in pieces if wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kitaeru.model import attention


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most likely one; None leaves a penalty to the model."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float | None = None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]] = (), text: str | None = None
) -> Tensor:
    """Token ids int64 [1, n] of a conversation that awaits its answer, or of a text to continue."""
    if text is not None:
        rendered, special = text, True
    else:
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        special = False
    ids: Tensor = tokenizer(rendered, add_special_tokens=special, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    messages: Sequence[dict[str, Any]] = (),
    text: str | None = None,
    sampling: Sampling | None = None,
    streamer: BaseStreamer | None = None,
) -> str:
    """What the model says next, special tokens left out. `streamer` receives tokens as they come."""
    sampling = sampling or Sampling()
    ids = encode_prompt(tokenizer, messages, text).to(first_device(model))
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if sampling.repetition_penalty is not None:
        choice["repetition_penalty"] = sampling.repetition_penalty
    with _ready_to_generate(model):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **choice,
        )
    said: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return said.strip()


def first_device(model: PreTrainedModel) -> torch.device:
    """Where tokens go in: the device that computes the embedding, whose weights may lie elsewhere (accelerate)."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place)
    weights: list[torch.Tensor] = [embedding.weight, *model.parameters()]
    return next(weight.device for weight in weights if not weight.is_meta)  # another rank may have the embedding


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's, the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*found, tokenizer.eos_token_id) if i is not None})


@contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, a key/value cache and an attention that knows it; all put back afterwards."""
    trained, kernel, cache = model.training, model.config._attn_implementation, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    if kernel == attention.NAME:
        model.set_attn_implementation(attention.own_kernel(model.config))
    try:
        yield
    finally:
        if kernel == attention.NAME:
            model.set_attn_implementation(kernel)
        model.config.use_cache = cache
        model.train(trained)
