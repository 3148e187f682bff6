"""Layers on disk in the plan: taken where nothing else fits, and named where that would help."""

from __future__ import annotations

from typing import Any

import pytest

from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.plan.choose import make_plan
from kitaeru.recipe.types import Recipe
from kitaeru.shape import find_shape

CARD = parse_gpus("1x RTX A5000", "128GB")


def recipe(model: str, length: int = 1024, **changes: Any) -> Recipe:
    return Recipe.model_validate({"model": model, "data": {"train": "d", "seq_len": length}, **changes})


def plan(model: str, hardware: Hardware = CARD, **changes: Any) -> Any:
    return make_plan(recipe(model, **changes), hardware, find_shape(model))


def test_seventy_billion_on_one_card() -> None:
    name = "tokyotech-llm/Llama-3.1-Swallow-70B-v0.1"
    with pytest.raises(PlanError) as caught:
        plan(name)
    assert "--set limits.offload_folder=./offload" in (caught.value.remedy or "")
    made = plan(name, limits={"offload_folder": "./offload"}, method="qlora")
    assert made.layout.way == "single-disk"
    assert made.layout.activations == "recompute"
    assert made.chosen.peak_bytes < 25 * 10**9
    # 70.55 billion weights in 4 bits are 39 GB: the tables (4.2 GB) and two of 80 layers are in memory
    assert made.chosen.memory["weights"] < 0.2 * 39 * 10**9
    # each layer is read twice for a micro-batch
    assert made.chosen.speed.parts["offload"] > 0


def test_a_folder_is_not_used_where_there_is_room() -> None:
    made = plan("elyza/Llama-3-ELYZA-JP-8B", limits={"offload_folder": "./offload"})
    assert made.layout.way == "single"
    assert made.layout.method in ("lora", "qlora")


@pytest.mark.parametrize("changes", [{"method": "full"}, {"model": {"name": "", "quantize": "int8"}}])
def test_what_cannot_come_from_disk(changes: dict[str, Any]) -> None:
    name = "tokyotech-llm/Llama-3.1-Swallow-70B-v0.1"
    if "model" in changes:
        changes = {"model": {**changes["model"], "name": name}}
    wish = Recipe.model_validate({"model": name, "data": {"train": "d"}, "limits": {"offload_folder": "x"}, **changes})
    with pytest.raises(PlanError):
        make_plan(wish, CARD, find_shape(name))


def test_a_limit_of_ram() -> None:
    machine = Hardware(host_ram_bytes=64 * 10**9, host_free_bytes=60 * 10**9, cpu_cores=8)
    shape = find_shape("sbintuitions/sarashina2.2-1b")
    wish = recipe("sbintuitions/sarashina2.2-1b", 256, method="lora", limits={"ram_gb": 4.0})
    with pytest.raises(PlanError, match=r"4\.0 GB free"):
        make_plan(wish, machine, shape)
    wish = recipe("sbintuitions/sarashina2.2-1b", 256, method="lora", limits={"ram_gb": 4.0, "offload_folder": "x"})
    assert make_plan(wish, machine, shape).layout.way == "single-disk"
