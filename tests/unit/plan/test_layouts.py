from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from kitaeru.hardware import parse_gpus
from kitaeru.plan.layouts import (
    RULES,
    Case,
    activation_policies,
    arrangements,
    illegal,
    is_built,
    precision_for,
    ways,
)
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

A5000, T4, V100 = parse_gpus("RTX A5000, T4, V100 16GB").devices


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", "data": {"train": "d"}, **values})


def layout(**values: Any) -> Layout:
    usual: dict[str, Any] = {"strategy": "single", "method": "lora", "base": "none", "precision": "bf16"}
    usual |= {"activations": "keep", "micro_batch_tokens": 512, "device": "cuda"}
    return Layout(**(usual | values))


LLAMA = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
FULL = {"method": "full"}
GRAPHS = {"arithmetic": "int8", "graphs": True}
# What is illegal: the layout, the recipe, the device, words of the reason, and what else of the case is not usual.
ILLEGAL: list[tuple[dict[str, Any], dict[str, Any], Any, str, dict[str, Any]]] = [
    ({}, {}, None, "no GPU", {}),
    ({"strategy": "ddp"}, {}, A5000, "there is one", {}),
    ({"method": "full", "base": "nf4"}, {}, A5000, "4 or 8 bits", {}),
    ({"method": "qlora"}, {}, A5000, "4-bit", {}),
    ({}, {}, T4, "bf16", {}),
    ({"precision": "fp16", "device": "cpu"}, {}, None, "fp16", {}),
    ({"base": "int8", "precision": "fp16"}, {}, V100, "INT8", {}),
    ({"device": "cpu"}, {"train": {"optimizer": "paged_adamw_8bit"}}, None, "paged", {}),
    ({"base": "nf4"}, {"lora": {"init": "pissa"}}, A5000, "PiSSA", {}),
    ({"strategy": "zero3", "devices": 2, "base": "int8"}, {}, A5000, "LLM.int8", {}),
    ({"strategy": "tensor", "devices": 2, "base": "nf4"}, {}, A5000, "one piece", {}),
    ({"strategy": "tensor", "devices": 3}, {}, A5000, "divide by 3", {}),
    ({"strategy": "tensor", "devices": 2}, {"lora": {"dora": True}}, A5000, "whole rows", {}),
    ({"strategy": "tensor", "devices": 2}, {}, A5000, "cuts no experts", {"shape": replace(LLAMA, experts=8)}),
    ({"strategy": "tensor", "devices": 2}, {}, A5000, "spans them all", {"shape": replace(LLAMA, qk_norm="full")}),
    ({"strategy": "tensor", "devices": 2}, {}, A5000, "own heads", {"shape": replace(LLAMA, attention_dropout=0.1)}),
    ({"strategy": "tensor", "devices": 2}, {"train": {"optimizer": "adafactor"}}, A5000, "needs whole weights", {}),
    ({"strategy": "tensor", "devices": 2, "precision": "fp16"}, {}, V100, "with tensor each", {}),
    ({"strategy": "pipeline", "variant": "1f1b", "devices": 40}, {}, A5000, "has 32", {}),
    (FULL | {"strategy": "pipeline", "devices": 2}, {}, A5000, "one table", {"shape": replace(LLAMA, tied=True)}),
    ({"strategy": "pipeline", "variant": "1f1b", "devices": 2}, {"lora": {"init": "olora"}}, A5000, "only its own", {}),
    ({"strategy": "fsdp", "devices": 2, "method": "qlora", "base": "nf4"}, {"lora": {"dora": True}}, A5000, "pieces of",
     {}),
    ({"strategy": "pipeline", "variant": "1f1b", "devices": 2, "precision": "fp16"}, {}, V100, "scales the loss", {}),
    (FULL | {"strategy": "fsdp", "devices": 2}, {"train": {"optimizer": "adafactor"}}, A5000, "piece", {}),
    (FULL | {"strategy": "fsdp", "devices": 2}, {"train": {"optimizer": "adamw_8bit"}}, A5000, "piece", {}),
    (FULL | {"strategy": "fsdp", "devices": 2, "precision": "fp16"}, {}, A5000, "scales the loss", {}),
    (FULL | {"strategy": "zero2", "devices": 2}, {"train": {"optimizer": "adamw_8bit"}}, A5000, "piece", {}),
    (FULL | {"strategy": "zero3", "variant": "offload", "devices": 2}, {"train": {"optimizer": "lion"}}, A5000,
     "is AdamW", {}),
    ({"strategy": "zero3", "variant": "offload", "devices": 2}, {}, A5000, "too small", {}),
    (FULL, {"train": {"optimizer": "adamw_16bit"}}, A5000, "lie in RAM", {}),
    (FULL | {"variant": "offload"}, {}, A5000, "not kept in between", {}),
    (FULL | {"variant": "offload", "activations": "recompute", "precision": "fp16"}, {}, V100, "scales the loss", {}),
    ({"variant": "offload", "activations": "recompute"}, {}, A5000, "too small", {}),
    ({"strategy": "tensor", "devices": 2, "activations": "offload"}, {}, A5000, "all layers", {}),
    ({"device": "cpu", "activations": "offload", "precision": "fp32"}, {}, None, "already", {}),
    ({"strategy": "zero2", "devices": 2, "recomputed": 3}, {}, A5000, "goes through all of them", {}),
    ({"strategy": "fsdp", "variant": "offload", "devices": 2, "activations": "offload"}, {}, A5000, "same link", {}),
    ({"recomputed": 32}, {}, A5000, "checkpointing=true", {}),
    (FULL | {"variant": "disk", "activations": "recompute"}, {}, A5000, "frozen layers", {}),
    ({"variant": "disk"}, {}, A5000, "computed twice", {}),
    ({"activations": "keep8"}, {}, A5000, "fused", {}),
    (FULL | {"arithmetic": "16bit"}, {}, A5000, "arithmetic: plain", {}),
    (FULL | {"arithmetic": "int8", "strategy": "zero2", "devices": 2}, {}, A5000, "8 bits with zero2", {}),
    (FULL | {"arithmetic": "int8", "precision": "fp16"}, {}, A5000, "everything else", {}),
    (FULL | {"arithmetic": "int8"}, {}, A5000, "most of its work", {"shape": replace(LLAMA, experts=8)}),
    (FULL | {"arithmetic": "int8", "activations": "keep8"}, {}, A5000, "belongs to fused", {}),
    (FULL | {"arithmetic": "fp8"}, {}, A5000, "needs compute capability 8.9", {}),
    ({"arithmetic": "int8", "strategy": "fsdp", "devices": 2}, {}, A5000, "whole", {}),
    ({"arithmetic": "int8"}, {"lora": {"dora": True}}, A5000, "plain LoRA", {}),
    ({"arithmetic": "int8"}, {}, A5000, "none that", {"shape": replace(LLAMA, family="olmo2")}),
    ({"arithmetic": "fp8"}, {}, A5000, "8.9", {}),
    (GRAPHS | {"device": "cpu", "precision": "fp32"}, {}, None, "need a GPU", {}),
    (GRAPHS | {"arithmetic": "plain"}, {}, A5000, "model's own code", {}),
    (GRAPHS | {"strategy": "pipeline", "variant": "1f1b", "devices": 2}, {}, A5000, "waits for others in a pass", {}),
    (GRAPHS | {"activations": "offload"}, {}, A5000, "no part of a CUDA graph", {}),
    (GRAPHS, {"train": {"neftune_alpha": 5}}, A5000, "draws noise", {}),
    (GRAPHS, {"data": {"train": "d", "packing": False}}, A5000, "a few sizes", {}),
    (GRAPHS | {"step_in_backward": True}, {"train": {"max_grad_norm": 0.0}}, A5000, "stay in their places", {}),
    (FULL | {"step_in_backward": True, "strategy": "ddp", "devices": 2}, {}, A5000, "only on one device", {}),
    (FULL | {"step_in_backward": True}, {}, A5000, "norm of 1.0", {}),
    (FULL | {"step_in_backward": True, "precision": "fp16"}, {}, A5000, "fp16 looks at all", {}),
    (FULL | {"step_in_backward": True}, {"train": {"max_grad_norm": 0.0, "on_nan": "skip"}}, A5000, "be skipped", {}),
    (FULL | {"step_in_backward": True}, {"train": {"max_grad_norm": 0.0}, "data": {"train": "d", "packing": False}},
     A5000, "several micro-batches", {}),
    ({"strategy": "zero2", "devices": 2, "base": "nf4"}, {}, A5000, "in few bits",
     {"shape": replace(LLAMA, family="mixtral", experts=8, expert_intermediate=64)}),
    ({}, {"lora": {"init": "olora"}}, A5000, "stacked, and PEFT's adapters for these know no lora.init=olora",
     {"shape": replace(LLAMA, family="mixtral", experts=8, expert_intermediate=64)}),
    ({"strategy": "zero3", "devices": 2, "base": "nf4"}, {}, A5000, "bytes", {}),
    ({"strategy": "zero3", "devices": 2}, {"lora": {"targets": ["embed_tokens"]}}, A5000, "of an embedding", {}),
    ({"strategy": "zero2", "devices": 2}, {}, A5000, "expert", {"shape": replace(LLAMA, experts=8)}),
    (FULL | {"strategy": "zero2", "variant": "offload", "devices": 2, "device": "cpu", "precision": "fp32"}, {}, None,
     "in RAM already", {}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "wish", "device", "words", "more"), ILLEGAL, ids=[case[3] for case in ILLEGAL])
def test_each_rule_says_why(
    changes: dict[str, Any], wish: dict[str, Any], device: Any, words: str, more: dict[str, Any]
) -> None:
    reason = illegal(layout(**changes), recipe(**wish), device, **{"shape": LLAMA, **more})
    assert reason is not None
    assert words in reason


def test_the_cases_meet_nearly_every_rule() -> None:
    met = set()
    for changes, wish, device, _, more in ILLEGAL:
        case = Case(layout(**changes), recipe(**wish), device, **{"shape": LLAMA, **more})
        met.add(next(rule for rule in RULES if rule(case)))
    assert {rule.__name__ for rule in set(RULES) - met} == {"_quantised_needs_pascal"}  # no card of the table is so old


def test_ways_to_use_devices() -> None:
    def names(wish: str, count: int) -> list[str]:
        layouts = (layout(**{f.name: getattr(a, f.name) for f in fields(a)}) for a in arrangements(wish, count))
        return [made.way for made in layouts]

    assert names("pipeline", 2) == ["pipeline-1f1b", "pipeline-interleaved", "pipeline-gpipe"]
    assert "pipeline-1f1b-dp2" in names("auto", 4)
    assert len(set(names("auto", 8))) == len(names("auto", 8))
    for arrangement in arrangements("auto", 6):
        assert arrangement.devices in (1, 6)
        assert arrangement.devices % arrangement.replicas == 0


def test_only_what_the_table_names_is_built() -> None:
    for arrangement in arrangements("auto", 4):
        assert is_built(layout(**{f.name: getattr(arrangement, f.name) for f in fields(arrangement)}))
    assert is_built(layout(activations="offload"))
    assert not is_built(layout(strategy="fsdp", variant="offload-all", devices=2))
    assert not is_built(layout(strategy="fsdp", base="int8", devices=2))


@pytest.mark.parametrize("changes", [{}, {"method": "qlora", "base": "nf4"}, {"method": "full"}, {"base": "int8"},
    {"method": "full", "variant": "offload", "activations": "recompute"},
    {"strategy": "tensor", "devices": 2}, {"strategy": "zero3", "devices": 2},
    FULL | {"arithmetic": "int8"}, FULL | {"arithmetic": "int8", "strategy": "fsdp", "devices": 2},
    FULL | {"arithmetic": "int8", "variant": "offload", "activations": "recompute"},
    GRAPHS | {"activations": "keep8"}, GRAPHS | {"activations": "recompute"},
    GRAPHS | {"strategy": "ddp", "devices": 2, "recomputed": 3},
    {"strategy": "zero2", "devices": 2, "base": "nf4"},
    {"strategy": "zero1", "devices": 2, "device": "cpu", "precision": "fp32"}])  # fmt: skip
def test_what_works_is_legal(changes: dict[str, Any]) -> None:
    assert illegal(layout(**changes), recipe(), A5000, LLAMA) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [("lora", "none"), ("qlora", "nf4")]),
        ({"method": "lora"}, [("lora", "none")]),
        ({"method": "qlora"}, [("qlora", "nf4")]),
        ({"method": "full"}, [("full", "none")]),
        ({"method": "lora", "model": {"name": "m", "quantize": "nf4"}}, [("lora", "nf4")]),
        ({"model": {"name": "m", "quantize": "int8"}}, [("lora", "int8")]),
        ({"model": {"name": "m", "quantize": "none"}}, [("lora", "none")]),
        ({"model": {"name": "m", "quantize": "nf4"}}, [("qlora", "nf4")]),
    ],
)
def test_ways_keep_what_is_pinned(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert list(ways(recipe(**values))) == expected


def test_policies_and_precisions() -> None:
    assert activation_policies(recipe()) == ("keep", "recompute", "offload")
    assert activation_policies(recipe(), eight=True) == ("keep", "keep8", "recompute", "offload")
    for limits, wanted in (
        ({"checkpointing": True}, ("recompute", "offload")),
        ({"checkpointing": True, "offload_activations": False}, ("recompute",)),
        ({"offload_activations": True}, ("offload",)),
        ({"checkpointing": False}, ("keep",)),
        ({"recomputed_layers": 3}, ("keep",)),
    ):
        assert activation_policies(recipe(limits=limits)) == wanted
    assert [precision_for(recipe(), device) for device in (A5000, T4, None)] == ["bf16", "fp16", "fp32"]
    assert precision_for(recipe(train={"precision": "fp32"}), A5000) == "fp32"
