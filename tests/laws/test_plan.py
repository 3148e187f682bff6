"""Laws of the planner, for any model, machine and recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kitaeru.errors import PlanError
from kitaeru.hardware import known_gpus, parse_gpus
from kitaeru.plan import fused
from kitaeru.plan.choose import make_plan
from kitaeru.plan.memory import memory_items
from kitaeru.plan.problem import free_bytes, needed_bytes, state
from kitaeru.plan.stored import Setting
from kitaeru.plan.types import DataFacts, Layout
from kitaeru.recipe.types import LoraSection, Recipe
from kitaeru.shape import ModelShape, catalogue

SHAPES = [ModelShape.from_config(entry.config, entry.name) for entry in catalogue()]
MACHINES = [parse_gpus(row.name) for row in known_gpus()] + [parse_gpus("none", ram) for ram in ("8GB", "64GB")]
METHODS = [("lora", "none"), ("qlora", "nf4"), ("lora", "int8"), ("full", "none"), ("pretrain", "none")]

layouts = st.builds(
    lambda way, precision, activations, tokens, device: Layout(
        "single", way[0], way[1], precision, activations, tokens, device
    ),
    st.sampled_from(METHODS),
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.sampled_from(["keep", "recompute"]),
    st.integers(8, 40_000),
    st.sampled_from(["cpu", "cuda"]),
)
settings_ = st.builds(
    Setting,
    st.builds(LoraSection, r=st.integers(1, 256), dora=st.booleans(), dropout=st.sampled_from([0.0, 0.1])),
    st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "adafactor"]),
    accumulates=st.booleans(),
    repeats_keys=st.booleans(),
)
facts_ = st.one_of(
    st.none(),
    st.builds(
        lambda examples, mean, extra, valid: DataFacts(examples, examples * mean, mean + extra, valid),
        st.integers(1, 100_000),
        st.integers(2, 4000),
        st.integers(0, 6000),
        st.integers(0, 100),
    ),
)


@given(st.sampled_from(SHAPES), layouts, settings_, st.integers(1, 5000))
def test_more_tokens_never_take_less(shape: ModelShape, layout: Layout, setting: Setting, more: int) -> None:
    longer = replace(layout, micro_batch_tokens=layout.micro_batch_tokens + more)
    before, after = memory_items(layout, shape, setting), memory_items(longer, shape, setting)
    assert sum(before.values()) <= sum(after.values())


@given(st.sampled_from(SHAPES), layouts, settings_)
def test_recomputing_never_keeps_more(shape: ModelShape, layout: Layout, setting: Setting) -> None:
    keep, again = (replace(layout, activations=policy) for policy in ("keep", "recompute"))
    kept = memory_items(keep, shape, setting)
    recomputed = memory_items(again, shape, setting)
    assert sum(recomputed.values()) <= sum(kept.values())
    away = memory_items(replace(layout, activations="offload"), shape, setting)
    assert sum(away.values()) <= sum(recomputed.values())


@given(st.sampled_from(SHAPES), layouts, settings_, st.integers(1, 200), st.sampled_from(["plain", "16bit"]))
def test_each_layer_that_is_computed_again_spares_something(
    shape: ModelShape, layout: Layout, setting: Setting, count: int, arithmetic: str
) -> None:
    if fused.why_not(shape, setting.lora):
        arithmetic = "plain"
    keep = replace(layout, activations="keep", arithmetic=arithmetic)  # type: ignore[arg-type]
    count %= shape.layers
    some = (replace(keep, recomputed=n) for n in range(count, -1, -1))
    peaks = [sum(memory_items(one, shape, setting).values()) for one in some]
    assert peaks == sorted(peaks)


@given(st.sampled_from(SHAPES), layouts, settings_)
def test_items_are_whole_positive_bytes(shape: ModelShape, layout: Layout, setting: Setting) -> None:
    items = memory_items(layout, shape, setting)
    assert all(isinstance(size, int) and size > 0 for size in items.values())
    assert items["weights"] > 0


def make(recipe: Recipe, machine: Any, shape: ModelShape, facts: DataFacts | None) -> Any:
    try:
        return make_plan(recipe, machine, shape, facts)
    except PlanError as error:
        return str(error)


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(MACHINES),
    facts_,
    st.sampled_from(["auto", "lora", "qlora", "full", "pretrain"]),
    st.sampled_from([None, 128, 3000]),
)
def test_a_plan_fits_and_comes_out_the_same_twice(
    shape: ModelShape, machine: Any, facts: DataFacts | None, method: str, seq_len: int | None
) -> None:
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "d", "seq_len": seq_len}, "method": method})
    made = make(recipe, machine, shape, facts)
    assert made == make(recipe, machine, shape, facts)
    if isinstance(made, str):
        assert "→" in made
        return
    assert made.chosen.peak_bytes == sum(made.chosen.memory.values())
    problem = state(recipe, machine, shape, facts)
    assert needed_bytes(made.layout, made.chosen.peak_bytes) <= free_bytes(problem)
    assert made.layout.micro_batch_tokens >= problem.longest
    assert made.recipe.limits.micro_batch_tokens == made.layout.micro_batch_tokens
    assert made.recipe.train.warmup_steps is None or made.recipe.train.warmup_steps >= 0
