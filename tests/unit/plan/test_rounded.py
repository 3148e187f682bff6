"""Full training with products in 8 bits: what it costs beside 16, and when it is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.plan.choose import make_plan
from kitaeru.plan.memory import memory_items
from kitaeru.plan.stored import Setting
from kitaeru.plan.types import DataFacts, Layout, Plan
from kitaeru.plan.work import layer_backward, layer_forward
from kitaeru.recipe.types import LoraSection, Recipe
from kitaeru.shape import ModelShape

SMOL = ModelShape.from_catalogue("HuggingFaceTB/SmolLM2-135M")
SARASHINA = ModelShape.from_catalogue("sbintuitions/sarashina2.2-1b")
FACTS = DataFacts(examples=5000, tokens=9_000_000, longest=1800)
H100, A5000, TWO, LAPTOP = (parse_gpus(text, "128GB") for text in ("H100", "RTX A5000", "2x RTX A5000", "none"))
PLAIN = Layout("single", "full", "none", "bf16", "keep", 8192, "cuda")


def plan(on: Hardware, arithmetic: str, shape: ModelShape | None = SARASHINA, **values: Any) -> Plan:
    assert shape is not None
    wish = {"model": "m", "data": {"train": "d"}, "method": "full", "train": {"arithmetic": arithmetic}} | values
    return make_plan(Recipe.model_validate(wish), on, shape, FACTS)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_two_of_three_products_are_in_8_bits(activations: Any) -> None:
    assert SARASHINA is not None
    plain, setting = replace(PLAIN, activations=activations), Setting(LoraSection())
    passes = (layer_forward, layer_backward)
    before, after = (
        [f(layout, SARASHINA, setting, 2048) for f in passes] for layout in (plain, replace(plain, arithmetic="fp8"))
    )
    one = 2 * SARASHINA.linear_parameters() / SARASHINA.layers * 8192
    again = one if activations == "recompute" else 0
    assert [work.eight for work in after] == pytest.approx([one, one + again])
    assert [work.gemm for work in after] == pytest.approx([0, one])
    assert [work.flops() for work in after] == pytest.approx([work.flops() for work in before])


def test_it_is_taken_when_it_is_asked_for_and_then_it_is_faster() -> None:
    left_open, fp8 = plan(H100, "auto"), plan(H100, "fp8")
    assert (left_open.layout.arithmetic, fp8.layout.arithmetic) == ("plain", "fp8")
    [why] = [decision.why for decision in left_open.decisions if decision.path == "train.arithmetic"]
    assert "train.arithmetic=fp8" in why
    assert any("Trained weights are multiplied in FP8" in sentence for sentence in fp8.chosen.why)
    assert left_open.chosen.speed is not None
    assert fp8.chosen.speed is not None
    assert 1.05 < fp8.chosen.speed.tokens_per_second / left_open.chosen.speed.tokens_per_second < 1.5
    assert "keep8" not in {rival.layout.activations for rival in fp8.rivals}


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_it_takes_no_more_memory_than_16_bits(activations: Any) -> None:
    """No 16-bit copies of weights, and one of what several layers read; a little to round in."""
    assert SARASHINA is not None
    plain, setting = replace(PLAIN, activations=activations), Setting(LoraSection())
    wide, narrow = (memory_items(layout, SARASHINA, setting) for layout in (plain, replace(plain, arithmetic="int8")))
    assert "weight_casts" not in narrow
    assert narrow["weights"] == wide["weights"]
    assert 0.85 < sum(narrow.values()) / sum(wide.values()) < 1


@pytest.mark.parametrize(
    ("on", "arithmetic", "more", "words"),
    [
        (A5000, "fp8", {}, r"needs compute capability 8\.9"),
        (A5000, "16bit", {}, r"16 bits are `train\.arithmetic: plain`"),
        (TWO, "int8", {"strategy": "zero2"}, "8 bits with zero2"),
        (TWO, "int8", {"strategy": "tensor"}, "8 bits with tensor"),
        (H100, "fp8", {"train": {"arithmetic": "fp8", "precision": "fp16"}}, "everything else is computed in bf16"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(on: Hardware, arithmetic: str, more: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(on, arithmetic, **more)


def test_a_cpu_takes_what_is_asked_for() -> None:
    assert plan(LAPTOP, "int8", SMOL).layout.arithmetic == "int8"
