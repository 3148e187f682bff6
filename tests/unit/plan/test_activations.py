"""What the planner says layers keep, against the tensors torch saves for the very modules the engine trains."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.kernels.experts import Adapter
from kitaeru.model import attention
from kitaeru.model.adapt import add_adapter
from kitaeru.model.experts import PackedExperts, fill
from kitaeru.model.fused import Place, fused_layer
from kitaeru.model.layers import checkpoint_by_layer
from kitaeru.model.load import load_model
from kitaeru.model.rounded import round_products
from kitaeru.plan.activations import _kept_packed, activation_bytes, cast_bytes
from kitaeru.plan.stored import Setting, packs_experts
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection, ModelSection
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
    if layout.base != "none":  # packed while it is loaded
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = load_model(ModelSection(name=folder), layout, 0)
    trained: Any = model
    if layout.method == "lora":
        model = model.to(torch.bfloat16 if layout.precision == "bf16" else torch.float32)
    if layout.method in ("lora", "qlora"):
        trained = add_adapter(model, lora, 0)
    if layout.again(shape.layers):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        checkpoint_by_layer(model, layout.again(shape.layers), None)
    if layout.arithmetic != "plain":
        assert round_products(model, layout.arithmetic, torch.bfloat16)
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_trained_products_in_8_bits_keep_what_is_read_once(family: str) -> None:
    """And no copy of a weight."""
    lora = LoraSection()
    layout = replace(single("full", "bf16"), arithmetic="fp8")
    saved, shape = saved_bytes(family, dict(FAMILIES)[family], layout, lora)
    assert cast_bytes(layout, shape, lora) == 0
    assert predicted(layout, shape, lora) == pytest.approx(saved, rel=0.045)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")], ids=["experts", "attention"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_packed_experts_keep_what_the_plan_says(family: str, targets: tuple[str, ...]) -> None:
    changes = {**dict(FAMILIES)[family], "intermediate_size": 192}
    changes |= {"moe_intermediate_size": 192} if family == "qwen3_moe" else {}
    lora = LoraSection(r=4, targets=targets)
    layout = Layout("single", "qlora", "nf4", "fp32", "keep", TOKENS, "cpu")
    saved, shape = saved_bytes(family, changes, layout, lora)
    assert packs_experts(layout.base, shape)
    assert predicted(layout, shape, lora) == pytest.approx(saved, rel=0.012)


@pytest.mark.parametrize("r", [0, 4])
def test_one_module_of_packed_experts_in_16_bits(r: int) -> None:
    """To the byte, but for where each expert's tokens end. (In bf16 bitsandbytes' other layers keep more on a CPU.)"""
    torch.manual_seed(0)
    experts = PackedExperts(4, (64, 128), "silu", "nf4", torch.bfloat16)
    for name, size in experts.shapes.items():
        fill(experts, name, torch.randn(size).bfloat16())
    if r:
        experts.adapters = {
            name: Adapter(torch.randn(4 * rank, k).requires_grad_(), torch.randn(n, rank * 4).requires_grad_(), 1.0)
            for (name, (_, n, k)), rank in zip(experts.shapes.items(), (2 * r, r), strict=True)
        }
    x = torch.randn(TOKENS, 128).bfloat16().requires_grad_()
    index = torch.rand(TOKENS, 4).argsort(1)[:, :2]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = experts(x, index, torch.rand(TOKENS, 2).requires_grad_())
    config = AutoConfig.for_model(
        "mixtral",
        **{**SIZES, "hidden_size": 128, "intermediate_size": 64, "num_local_experts": 4},
        num_experts_per_tok=2,
    )
    lora = LoraSection(r=r) if r else LoraSection(targets=("q_proj",))
    layout = Layout("single", "qlora", "nf4", "bf16", "keep", TOKENS, "cpu")
    per_pair = _kept_packed(layout, ModelShape.from_config(config.to_dict()), lora)
    assert y.shape == x.shape
    assert sum(kept.values()) == TOKENS * (2 * 128 + 2 * per_pair) + 4 * 4


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


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral"])
@pytest.mark.parametrize("recomputed", [1, 2])
def test_some_layers_keep_their_input_and_the_others_everything(family: str, recomputed: int) -> None:
    layout = replace(single("lora", "bf16"), recomputed=recomputed)
    lora = LoraSection(r=4)
    saved, shape = saved_bytes(family, dict(FAMILIES)[family], layout, lora)
    casts = cast_bytes(layout, shape, lora) * recomputed // shape.layers  # of layers whose casts nothing keeps
    assert predicted(layout, shape, lora) - casts == pytest.approx(saved, rel=0.045)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("arithmetic", ["16bit", "fp8", "int8"])
@pytest.mark.parametrize("activations", ["keep", "keep8", "recompute"])
def test_a_fused_layer_keeps_what_the_plan_says(kind: str, arithmetic: Any, activations: Any) -> None:
    """Every tensor of one layer's `Saved`, each memory once; cos, sin and the like belong to all layers."""
    if (arithmetic, activations) == ("16bit", "keep8"):
        return
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=320,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    model.requires_grad_(False)
    section = LoraSection(r=8)
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    fused = fused_layer(model.model.layers[0], config, arithmetic, torch.bfloat16)
    fused.keep = arithmetic if activations == "keep8" else "16bit"
    tokens = 48
    turns = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    place = Place(turns, turns, torch.tensor([0, tokens], dtype=torch.int32), tokens)
    hidden = torch.randn(tokens, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        _, saved = fused.forward(hidden, place)
    shape = ModelShape.from_config(config.to_dict())
    layout = Layout("single", "lora", "none", "bf16", activations, tokens, "cpu", arithmetic=arithmetic)
    expected = activation_bytes(layout, shape, Setting(section)) - _outside(layout, shape, section, tokens)
    if activations == "recompute":
        assert expected == tokens * 256 * 2
        return
    memory: dict[int, int] = {}
    for value in _tensors(saved):
        memory[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    lse = tokens * 4 * 4  # the log-sum-exp that attention keeps in its graph
    assert sum(memory.values()) + lse == expected


def _outside(layout: Layout, shape: ModelShape, section: LoraSection, tokens: int) -> int:
    empty = replace(layout, activations="recompute")
    return activation_bytes(empty, shape, Setting(section)) - tokens * shape.layers * 2 * shape.hidden


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for name in (f.name for f in fields(value)):
            yield from _tensors(getattr(value, name))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)
