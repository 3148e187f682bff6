"""What the planner says layers keep, against the tensors torch saves for the very modules the engine trains."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.model import attention
from kitaeru.model.adapt import add_adapter
from kitaeru.plan.activations import activation_bytes, cast_bytes
from kitaeru.plan.stored import Setting
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection
from kitaeru.shape import ModelShape

TOKENS = 192
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"head_dim": 16, "sliding_window": 64}),
    ("phi3", {}),
    ("gpt_neox", {"num_key_value_heads": 4}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3_moe", MIXTURE),
    ("starcoder2", {}),
    ("olmo2", {}),
]
TRAININGS = [("lora", "bf16"), ("lora", "fp32"), ("full", "bf16"), ("full", "fp32")]


def saved_bytes(family: str, changes: dict[str, Any], layout: Layout, lora: LoraSection) -> tuple[int, ModelShape]:
    """Bytes of the storages that autograd keeps when a packed row of two examples went forward, weights left out."""
    attention.register()
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME if attention.suits(config) else "eager"
    )
    shape = ModelShape.from_config(config.to_dict())
    trained: Any = model
    if layout.method == "lora":
        trained = add_adapter(model.to(torch.bfloat16 if layout.precision == "bf16" else torch.float32), lora, 0)
    if layout.activations == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained.train()
    lengths = [TOKENS // 2, TOKENS - TOKENS // 2]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    constant = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=layout.precision == "bf16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        getattr(model, model.base_model_prefix)(
            input_ids=torch.randint(0, 300, (1, TOKENS)),
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        )
    return sum(found.values()), shape


def predicted(layout: Layout, shape: ModelShape, lora: LoraSection) -> int:
    # Ids, positions and targets are the batch's and not autograd's.
    kept = activation_bytes(layout, shape, Setting(lora)) - 3 * 8 * TOKENS
    return kept + (cast_bytes(layout, shape, lora) if layout.activations == "keep" else 0)


def single(method: Any, precision: Any, activations: Any = "keep") -> Layout:
    return Layout("single", method, "none", precision, activations, TOKENS, "cpu")


@pytest.mark.parametrize(("method", "precision"), TRAININGS)
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_kept_is_what_torch_saves(family: str, changes: dict[str, Any], method: str, precision: str) -> None:
    lora = LoraSection(r=4)
    layout = single(method, precision)
    saved, shape = saved_bytes(family, changes, layout, lora)
    assert predicted(layout, shape, lora) == pytest.approx(saved, rel=0.045)


@pytest.mark.parametrize(
    ("lora", "tolerance"),
    [
        (LoraSection(r=8, targets=("q_proj", "v_proj")), 0.01),
        (LoraSection(r=64), 0.01),
        (LoraSection(r=4, dropout=0.1), 0.055),
        (LoraSection(r=4, dora=True), 0.02),
    ],
    ids=["targets", "rank", "dropout", "dora"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_adapters(lora: LoraSection, tolerance: float, precision: str) -> None:
    layout = single("lora", precision)
    saved, shape = saved_bytes("llama", {}, layout, lora)
    assert predicted(layout, shape, lora) == pytest.approx(saved, rel=tolerance)


@pytest.mark.parametrize(("method", "precision"), TRAININGS)
def test_recomputation_keeps_each_layer_s_input(method: str, precision: str) -> None:
    layout = single(method, precision, "recompute")
    saved, shape = saved_bytes("llama", {}, layout, LoraSection(r=4))
    # Checkpoints hold the rotary tables in a closure, which autograd's hooks do not see.
    rotary = 2 * shape.head_dim * TOKENS * (4 if method == "full" or precision == "fp32" else 2)
    assert predicted(layout, shape, LoraSection(r=4)) - rotary == pytest.approx(saved, rel=0.01)
