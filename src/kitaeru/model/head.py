"""The output head and the loss of a causal language model, without all logits in memory where that is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kitaeru.data.types import MicroBatch
from kitaeru.kernels.linear_cross_entropy import cross_entropy, linear_cross_entropy, logits_of

LossSum = Callable[[MicroBatch], Tensor]


def forward_arguments(batch: MicroBatch) -> dict[str, Any]:
    """What a transformers model must be told about a packed row."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }


def chunked_loss(model: PreTrainedModel, z_loss: float = 0.0) -> LossSum:
    """The loss sum of a micro-batch through the decoder and the chunked head."""
    decoder = getattr(model, model.base_model_prefix)
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def loss_sum(batch: MicroBatch) -> Tensor:
        hidden = decoder(**forward_arguments(batch)).last_hidden_state
        targets, counted = batch.targets[0], batch.counted
        return linear_cross_entropy(hidden.squeeze(0), head.weight, targets, softcap, counted, z_loss=z_loss)

    return loss_sum


def plain_loss(model: PreTrainedModel, z_loss: float = 0.0) -> LossSum:
    """The loss sum from the model's own logits: right for every model, and the reference."""

    def loss_sum(batch: MicroBatch) -> Tensor:
        logits = model(**forward_arguments(batch)).logits[0].float()
        return cross_entropy(logits, batch.targets[0], z_loss)

    return loss_sum


def recognise_head(model: PreTrainedModel, batch: MicroBatch, z_loss: float = 0.0) -> tuple[LossSum, str]:
    """The chunked loss if its logits are the model's own on `batch`, else the plain one; and why, in a word.

    Fits: a plain linear head without bias or adapter, with or without soft-capped logits. Logits are compared and not
    losses: those of a fresh model hardly depend on the logits.
    """
    head = model.get_output_embeddings()
    if (
        type(head) is not nn.Linear
        or getattr(head, "bias", None) is not None
        or not hasattr(model, model.base_model_prefix)
    ):
        return plain_loss(model, z_loss), "unknown head"
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(**forward_arguments(batch)).last_hidden_state
        theirs = model(**forward_arguments(batch)).logits
        if head.weight.is_meta:
            return plain_loss(model, z_loss), "elsewhere"
        ours = logits_of(hidden, head.weight, getattr(model.config, "final_logit_softcapping", None))
    exact = head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(head.weight.device.type)
    if distance(ours, theirs) <= (1e-4 if exact else 2e-2):
        return chunked_loss(model, z_loss), "chunked"
    return plain_loss(model, z_loss), "the model changes its logits"


def distance(ours: Tensor, theirs: Tensor) -> float:
    """How far two tensors are apart, as a share of their size: 0 for equal ones, nan if one is not finite."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())
