from __future__ import annotations

from typing import Any

import pytest

from kitaeru.hardware import parse_gpus
from kitaeru.plan.layouts import RULES, activation_policies, illegal, precision_for, ways
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import Recipe

A5000, T4, V100 = parse_gpus("RTX A5000, T4, V100 16GB").devices


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", "data": {"train": "d"}, **values})


def layout(**values: Any) -> Layout:
    usual: dict[str, Any] = {"strategy": "single", "method": "lora", "base": "none", "precision": "bf16"}
    usual |= {"activations": "keep", "micro_batch_tokens": 512, "device": "cuda"}
    return Layout(**(usual | values))


ILLEGAL: list[tuple[dict[str, Any], dict[str, Any], Any, str]] = [
    ({"strategy": "fsdp"}, {}, A5000, "fsdp"),
    ({}, {}, None, "no GPU"),
    ({"method": "full", "base": "nf4"}, {}, A5000, "4 or 8 bits"),
    ({"method": "qlora"}, {}, A5000, "4-bit"),
    ({}, {}, T4, "bf16"),
    ({"precision": "fp16", "device": "cpu"}, {}, None, "fp16"),
    ({"base": "int8", "precision": "fp16"}, {}, V100, "INT8"),
    ({"device": "cpu"}, {"train": {"optimizer": "paged_adamw_8bit"}}, None, "paged"),
    ({"base": "nf4"}, {"lora": {"init": "pissa"}}, A5000, "PiSSA"),
]


@pytest.mark.parametrize(("changes", "wish", "device", "words"), ILLEGAL, ids=[case[-1] for case in ILLEGAL])
def test_each_rule_says_why(changes: dict[str, Any], wish: dict[str, Any], device: Any, words: str) -> None:
    reason = illegal(layout(**changes), recipe(**wish), device)
    assert reason is not None
    assert words in reason


def test_the_cases_meet_nearly_every_rule() -> None:
    assert len(ILLEGAL) == len(RULES) - 1  # no card of the table is too old for bitsandbytes


@pytest.mark.parametrize("changes", [{}, {"method": "qlora", "base": "nf4"}, {"method": "full"}, {"base": "int8"}])
def test_what_works_is_legal(changes: dict[str, Any]) -> None:
    assert illegal(layout(**changes), recipe(), A5000) is None


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
    assert activation_policies(recipe()) == ("keep", "recompute")
    assert activation_policies(recipe(limits={"checkpointing": True})) == ("recompute",)
    assert [precision_for(recipe(), device) for device in (A5000, T4, None)] == ["bf16", "fp16", "fp32"]
    assert precision_for(recipe(train={"precision": "fp32"}), A5000) == "fp32"
