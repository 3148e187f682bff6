"""A model run stage by stage is the model, whatever its family does between its layers."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kitaeru.data.types import MicroBatch
from kitaeru.errors import ModelError
from kitaeru.model.head import forward_arguments
from kitaeru.model.stages import Share, Stages, places_of, share_of
from kitaeru.plan.types import Layout

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE),
    "gemma2": transformers.Gemma2Config(**SHAPE, **WINDOW),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, **WINDOW),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt_oss": transformers.GptOssConfig(**SHAPE, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "neox": transformers.GPTNeoXConfig(**{**SHAPE, "rotary_pct": 0.5}),
}


def tiny(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def rows(lengths=(7, 5)):
    total = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return MicroBatch(torch.arange(total)[None] + 3, positions, torch.arange(total)[None], ends, max(lengths))


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_one_after_another_are_the_decoder(name):
    model, cuts = tiny(FAMILIES[name]), (1, 2, 1)
    given = forward_arguments(rows())
    decoder = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        whole, logits = decoder(**given).last_hidden_state, model(**given).logits
        stages = Stages(model, Share(cuts, (0, 1, 2)), torch.device("cpu"), None)
        hidden, seen = None, []
        for stage in range(3):
            with stages.at(stage, hidden):
                hidden = decoder(**given).last_hidden_state
            seen.append(hidden)
        assert torch.equal(hidden, whole)
        assert not any(torch.equal(a, whole) for a in seen[:-1])
        assert torch.equal(model(**given).logits, logits)  # outside of a stage it is itself


def test_a_model_that_adds_something_in_every_stage_is_refused():
    """GPT-2 adds positions to what it is given."""
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    with pytest.raises(ModelError, match="cannot be cut"):
        Stages(tiny(config), Share((2, 2), (0, 1)), torch.device("cpu"), None)


def test_shares():
    def layout(**more):
        values = {"devices": 4, "variant": "1f1b", "cuts": (3, 2, 2, 1), **more}
        return Layout("pipeline", "lora", "none", "fp32", "keep", 64, "cpu", **values)

    assert [share_of(layout(), rank).layers for rank in range(4)] == [(0, 1, 2), (3, 4), (5, 6), (7,)]
    two = layout(replicas=2, chunks=2)
    assert [share_of(two, rank).layers for rank in range(4)] == [(0, 1, 2, 5, 6), (3, 4, 7)] * 2
    assert share_of(Layout("ddp", "lora", "none", "fp32", "keep", 64, "cpu", 2), 0) is None


def test_places():
    model = tiny(FAMILIES["qwen3"])
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    places = places_of(model, (3, 1), (one, two))
    assert {name for name, device in places.items() if device == two} == {"model.layers.3", "model.norm", "lm_head"}
    assert all(name in dict(model.named_modules()) for name in places)
    assert places_of(model, (3, 1), (one, one)) == {"": one}
