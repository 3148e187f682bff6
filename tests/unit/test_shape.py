from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitaeru.errors import ModelError
from kitaeru.shape import ModelShape, catalogue

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "max_position_embeddings": 64,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# family, what differs from SIZES
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"head_dim": 8}),
    ("qwen2_moe", MIXTURE | {"head_dim": 8, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    ("qwen3", {}),
    ("qwen3_moe", MIXTURE | {"mlp_only_layers": [0, 3]}),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 16}),
    ("gemma3_text", {"sliding_window": 16}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("phi3", {"head_dim": 8, "pad_token_id": 0}),
    ("granite", {"head_dim": 8}),
    ("smollm3", {"head_dim": 8, "pad_token_id": 0}),
    ("olmo2", {"head_dim": 8}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    ("stablelm", {"head_dim": 8}),
    ("stablelm", {"head_dim": 8, "use_qkv_bias": True}),
    ("starcoder2", {"head_dim": 8, "num_key_value_heads": 2}),
    ("gpt_neox", {"head_dim": 8, "num_key_value_heads": 6}),
    ("gpt2", {"n_embd": 48, "n_layer": 5, "n_head": 6, "n_positions": 64, "n_inner": 80, "head_dim": 8}),
]


def built(family: str, changes: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The full config of a tiny model and the model itself, without storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.to_dict(), model


@pytest.mark.parametrize(("family", "changes"), CASES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(CASES)])
def test_parameters_are_those_transformers_builds(family: str, changes: dict[str, Any]) -> None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config, model = built(family, changes)
    shape = ModelShape.from_config(config)
    assert shape.exact
    assert shape.parameters() == sum(p.numel() for p in model.parameters())

    head = model.get_output_embeddings()
    linears: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        # The gate of a shared expert is one row: neither adapted nor worth counting as a layer.
        if isinstance(module, nn.Linear | Conv1D) and module is not head and module.weight.shape[0] > 1:
            found = linears.setdefault(name.rpartition(".")[2], [0, 0])
            found[0] += module.weight.numel()
            found[1] += 1
    ours: dict[str, list[int]] = {}
    for linear in shape.linears():
        found = ours.setdefault(linear.name, [0, 0])
        found[0] += linear.weights * linear.count
        found[1] += linear.count
    assert ours == linears


def test_the_catalogue_counts_what_transformers_counted() -> None:
    wrong = {
        entry.name: shape.parameters() - entry.parameters
        for entry in catalogue()
        if (shape := ModelShape.from_catalogue(entry.name)) and shape.parameters() != entry.parameters
    }
    assert not wrong
    assert len(catalogue()) >= 45


def test_mixtral_uses_a_quarter_of_its_experts() -> None:
    shape = ModelShape.from_catalogue("mistralai/mixtral-8x7b-v0.1")
    assert shape is not None
    assert shape.parameters() == 46_702_792_704
    assert 12.5e9 < shape.active_parameters() + shape.embedding_parameters() < 13e9


def test_sliding_layers() -> None:
    gemma2, gemma3 = (ModelShape.from_catalogue(f"google/gemma-{n}") for n in ("2-2b", "3-1b-pt"))
    qwen = ModelShape.from_catalogue("Qwen/Qwen3-8B")
    assert gemma2 is not None
    assert gemma3 is not None
    assert qwen is not None
    assert (gemma2.sliding_layers, gemma3.sliding_layers, qwen.sliding_layers) == (13, 22, 0)
    assert qwen.packed_causal
    assert gemma2.packed_causal
    assert (gemma2.sandwiched, gemma3.sandwiched, qwen.sandwiched) == (True, True, False)


def test_a_folder_and_its_file_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"}))
    shape = ModelShape.from_folder(tmp_path)
    assert shape.hidden == 48
    assert ModelShape.from_folder(tmp_path / "config.json").parameters() == shape.parameters()


def test_the_text_part_of_a_model_that_also_sees() -> None:
    outer = {"model_type": "gemma3", "text_config": SIZES | {"model_type": "gemma3_text"}, "vision_config": {}}
    assert (
        ModelShape.from_config(outer).parameters()
        == ModelShape.from_config(SIZES | {"model_type": "gemma3_text"}).parameters()
    )


def test_an_unknown_family_is_counted_as_a_llama_and_says_so() -> None:
    unknown = ModelShape.from_config(SIZES | {"model_type": "tomorrow"})
    assert not unknown.exact
    assert unknown.parameters() == ModelShape.from_config(SIZES | {"model_type": "llama"}).parameters()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "hidden_size": 64}, "num_hidden_layers"),
        ({"model_type": "mamba2", **SIZES}, "mamba2"),
        ({"model_type": "t5", **SIZES}, "t5"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ModelShape.from_config(config)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config"):
        ModelShape.from_folder(tmp_path)


def test_an_unknown_id_is_not_in_the_catalogue() -> None:
    assert ModelShape.from_catalogue("nobody/nothing") is None
