"""kitaeru's packed attention as an attention implementation of transformers, for models it is right for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from kitaeru.kernels.packed_attention import packed_attention

NAME = "kitaeru_packed"


def register() -> None:
    """Make `attn_implementation="kitaeru_packed"` known to transformers. Harmless when repeated."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def suits(config: PretrainedConfig) -> bool:
    """Whether a config speaks of plain causal attention only: no sliding window, no soft-capped scores, no dropout.

    What a config does not say (sinks, position biases) is found by `engine.build`, which compares numbers.
    """
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        plain = all(kind == "full_attention" for kind in layer_types)
    else:
        plain = not getattr(config, "sliding_window", None)
    return (
        plain and not getattr(config, "attn_logit_softcapping", None) and not getattr(config, "attention_dropout", 0.0)
    )


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cu_seqlens: Tensor = kwargs["cu_seq_lens_q"]
    if torch.is_autocast_enabled(query.device.type):
        # Positions are turned in 32 bits where the residual stream is; autocast does not know this operation.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = packed_attention(query, key, value, cu_seqlens, kwargs["max_length_q"], scaling)
    return output.transpose(1, 2).contiguous(), None
