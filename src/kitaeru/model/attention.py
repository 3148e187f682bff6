"""kitaeru's packed attention as an attention implementation of transformers, for models it is right for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from kitaeru.kernels.packed_attention import Sight, packed_attention

NAME = "kitaeru_packed"


def register() -> None:
    """Make `attn_implementation="kitaeru_packed"` known to transformers. Harmless when repeated."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _no_mask)


def suits(config: PretrainedConfig) -> bool:
    """Whether a config speaks of causal attention only, to all or to the last tokens: no chunks, no dropout.

    What a config does not say (sinks, position biases) is found by `engine.build`, which compares numbers.
    """
    kinds = getattr(config, "layer_types", None) or ()
    both_ways = getattr(config, "use_bidirectional_attention", None)
    known = all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    return known and not both_ways and not getattr(config, "attention_dropout", 0.0)


def sight_of(config: PretrainedConfig, layer: int) -> Sight:
    """What the queries of a layer see, by the config's word, as the models' own masks take it."""
    window, cap = getattr(config, "sliding_window", None), getattr(config, "attn_logit_softcapping", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return Sight((window or 0) if slides else 0, float(cap or 0.0))


def own_kernel(config: PretrainedConfig) -> str:
    """The implementation of transformers for what is no packed row: SDPA knows no capped scores."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


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
    sight = Sight(kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0)
    if torch.is_autocast_enabled(query.device.type):
        # Positions are turned in 32 bits where the residual stream is; autocast does not know this operation.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = packed_attention(query, key, value, cu_seqlens, kwargs["max_length_q"], scaling, sight)
    return output.transpose(1, 2).contiguous(), None
