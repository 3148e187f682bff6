"""Laws of the planner on several devices, for any model, machine and layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.plan.activations import activation_bytes, cast_bytes, last_norm_bytes, one_layer_bytes
from kitaeru.plan.choose import OFFLOAD_GAIN, Survey, survey
from kitaeru.plan.layouts import arrangements, is_built, waits_to_be_asked
from kitaeru.plan.memory import head_bytes, workspace_bytes
from kitaeru.plan.problem import free_bytes, needed_bytes
from kitaeru.plan.ranks import rank_items
from kitaeru.plan.stored import Setting, trained_parameters, weight_bytes
from kitaeru.plan.types import Candidate, Layout
from kitaeru.plan.work import head_forward, layer_backward, layer_forward, model_flops_per_token
from kitaeru.recipe.types import LoraSection, Recipe
from kitaeru.shape import ModelShape, catalogue

SHAPES = [ModelShape.from_config(entry.config, entry.name) for entry in catalogue()]
MACHINES = ("2x RTX A5000", "2x RTX A5000, nvlink", "4x RTX 3090", "8x H100", "RTX A6000, RTX A4000", "2x T4", "none")
SETTING = Setting(LoraSection(r=16))
METHODS = [("lora", "none"), ("qlora", "nf4"), ("full", "none")]

shared = st.builds(
    lambda strategy, variant, way, activations, tokens: Layout(
        strategy, way[0], way[1], "bf16", activations, tokens, "cuda", 2, variant if strategy != "ddp" else "", 2
    ),
    st.sampled_from(["ddp", "fsdp", "zero1", "zero2", "zero3"]),
    st.just(""),
    st.sampled_from(METHODS),
    st.sampled_from(["keep", "recompute"]),
    st.integers(64, 20_000),
)


def peak(layout: Layout, shape: ModelShape, rank: int = 0, micro_batches: int = 8) -> int:
    return sum(rank_items(layout, shape, SETTING, rank, micro_batches).values())


@given(st.sampled_from(SHAPES), shared, st.sampled_from(["ddp", "fsdp", "pipeline", "tensor", "zero2"]))
def test_a_layer_costs_the_same_whichever_device_has_it(shape: ModelShape, layout: Layout, strategy: str) -> None:
    placed = replace(layout, strategy=strategy, devices=8, replicas=2, variant="interleaved", chunks=2, cuts=(1,) * 8)
    alone = placed.of_one_device
    for cost in (activation_bytes, one_layer_bytes):
        assert cost(placed, shape, SETTING) == cost(alone, shape, SETTING)
    for cost in (workspace_bytes, cast_bytes, trained_parameters):
        assert cost(placed, shape, SETTING.lora) == cost(alone, shape, SETTING.lora)
    for cost in (head_bytes, head_forward, weight_bytes, last_norm_bytes):
        assert cost(placed, shape) == cost(alone, shape)
    for work in (layer_forward, layer_backward):
        assert work(placed, shape, SETTING, 1024.0) == work(alone, shape, SETTING, 1024.0)


@given(st.sampled_from(SHAPES), shared, st.integers(2, 6))
def test_more_shards_never_raise_a_rank_s_bytes(shape: ModelShape, layout: Layout, more: int) -> None:
    wider = replace(layout, devices=2 * more, replicas=2 * more)
    assert peak(wider, shape) <= peak(layout, shape)


@given(st.sampled_from(SHAPES), st.sampled_from(METHODS), st.integers(64, 8192), st.sampled_from([1, 2]))
def test_more_stages_never_raise_a_middle_rank_s_stored_bytes(
    shape: ModelShape, way: tuple[Any, Any], tokens: int, chunks: int
) -> None:
    assume(shape.layers >= 8)

    def stored(stages: int) -> int:
        cuts = tuple(shape.layers // stages for _ in range(stages))
        layout = Layout("pipeline", *way, "bf16", "keep", tokens, "cuda", stages, "1f1b", cuts=cuts)
        items = rank_items(layout, shape, SETTING, 1, 8)
        return items["weights"] + items.get("optimizer", 0)

    assert stored(8) <= stored(4) <= stored(2)


@given(st.sampled_from(SHAPES), shared, st.integers(1, 5000))
def test_longer_micro_batches_never_take_less(shape: ModelShape, layout: Layout, more: int) -> None:
    assert peak(layout, shape) <= peak(replace(layout, micro_batch_tokens=layout.micro_batch_tokens + more), shape)


@given(st.sampled_from(SHAPES), shared)
def test_items_are_whole_positive_bytes(shape: ModelShape, layout: Layout) -> None:
    items = rank_items(layout, shape, SETTING, 0, 8)
    assert all(isinstance(size, int) and size > 0 for size in items.values())


def look(shape: ModelShape, machine: Hardware, method: str, strategy: str, batch: int) -> Survey | str:
    values: dict[str, Any] = {"model": "m", "data": {"train": "d"}, "method": method, "strategy": strategy}
    recipe = Recipe.model_validate(values | {"train": {"global_batch_tokens": batch}})
    try:
        return survey(recipe, machine, shape)
    except PlanError as error:
        return str(error)


surveys = given(
    st.sampled_from(SHAPES),
    st.sampled_from(MACHINES),
    st.sampled_from(["auto", "qlora", "full"]),
    st.sampled_from(["auto", "ddp", "fsdp", "pipeline", "tensor", "zero3"]),
    st.sampled_from([4096, 16384, 100_000]),
)


def check(found: Survey, candidate: Candidate) -> None:
    problem, layout, speed = found.problem, candidate.layout, candidate.speed
    assert speed is not None
    assert sum(candidate.memory.values()) == candidate.peak_bytes
    assert candidate.memory in candidate.devices
    assert len(candidate.devices) == layout.devices
    assert sum(candidate.host.values()) == candidate.host_bytes
    room = [
        free_bytes(problem, layout, rank) - needed_bytes(layout, sum(items.values()))
        for rank, items in enumerate(candidate.devices)
    ]
    assert candidate.fits is (min(room) >= 0) or candidate.host_bytes > problem.hardware.host_free_bytes
    assert candidate.phases["evaluation" if layout.graphs else "steady_step"] == candidate.peak_bytes
    assert speed.low <= speed.tokens_per_second <= speed.high
    assert candidate.why
    if layout.cuts:
        assert sum(layout.cuts) == problem.shape.layers
    if layout.device == "cuda" and problem.precision != "fp32":  # never faster than the sheet allows
        devices = [problem.device_of(rank) for rank in range(layout.devices)]
        eight = layout.arithmetic in ("fp8", "int8")
        rates = [
            max(d.int8_tops, d.fp8_tflops) if eight else d.fp16_tflops if problem.precision == "fp16" else d.bf16_tflops
            for d in devices
            if d
        ]
        assert speed.high * model_flops_per_token(layout, problem.shape, problem.typical) <= sum(rates) * 1e12


def open_to(candidate: Candidate, recipe: Recipe) -> bool:
    return not waits_to_be_asked(candidate.layout.strategy, recipe)


@settings(max_examples=40)
@surveys
def test_a_survey_is_sound_and_comes_out_the_same_twice(
    shape: ModelShape, machine: str, method: str, strategy: str, batch: int
) -> None:
    hardware = parse_gpus(machine, "128GB")
    found = look(shape, hardware, method, strategy, batch)
    again = look(shape, hardware, method, strategy, batch)
    if isinstance(found, str) or isinstance(again, str):
        assert found == again
        return
    assert found.candidates == again.candidates
    assert any(candidate.fits for candidate in found.candidates)
    names = [candidate.layout.name for candidate in found.candidates]
    assert len(set(names)) == len(names)
    for candidate in found.candidates:
        check(found, candidate)
        assert candidate.built is is_built(candidate.layout)
    if found.plan is None:
        assert not any(c.fits and c.built and open_to(c, found.problem.recipe) for c in found.candidates)
        return
    chosen = found.plan.chosen
    assert chosen is found.candidates[0]
    assert chosen.fits
    assert chosen.built
    usable = [c for c in found.candidates if c.fits and c.built and open_to(c, found.problem.recipe)]
    rivals = [c for c in usable if c.layout.method == chosen.layout.method]
    if not chosen.layout.variant.startswith("offload"):  # in RAM only where nothing else fits
        rivals = [c for c in rivals if not c.layout.variant.startswith("offload")]
    for rival in rivals:
        away = rival.layout.activations == "offload"
        bound = OFFLOAD_GAIN * 1.021 if away and chosen.layout.activations != "offload" else 1.021
        assert chosen.speed.step_seconds <= bound * rival.speed.step_seconds


@given(st.integers(2, 16))
def test_every_way_uses_one_or_all_devices(count: int) -> None:
    for arrangement in arrangements("auto", count):
        assert arrangement.devices in (1, count)
        assert count % arrangement.replicas == 0
