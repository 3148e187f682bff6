"""What each device of a layout takes: one device as measured, several shared out as the strategy says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kitaeru.plan.explain import FORMULAS, SPEED_FORMULAS
from kitaeru.plan.host import HOST_ITEMS, host_items
from kitaeru.plan.memory import ITEMS, memory_items
from kitaeru.plan.ranks import PHASES, gathered_bytes, part_of, phase_peaks, rank_items
from kitaeru.plan.speed import PARTS
from kitaeru.plan.stored import Setting, weight_bytes
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection
from kitaeru.shape import ModelShape, find_shape

LLAMA = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
SETTING = Setting(LoraSection(r=16))
DATA_PARALLEL = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def layout(strategy: str = "single", devices: int = 1, **values: Any) -> Layout:
    usual: dict[str, Any] = {"method": "lora", "base": "none", "precision": "bf16", "activations": "recompute"}
    usual |= {"device": "cuda", "devices": devices, "replicas": devices if strategy in DATA_PARALLEL else 1}
    return Layout(strategy, **(usual | {"micro_batch_tokens": 2048} | values))


def peak(made: Layout, rank: int = 0, micro_batches: int = 8, shape: ModelShape = LLAMA) -> int:
    return sum(rank_items(made, shape, SETTING, rank, micro_batches).values())


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_one_device_is_the_measured_model(method: Any, activations: Any, device: Any) -> None:
    made = layout(method=method, base="nf4" if method == "qlora" else "none", activations=activations, device=device)
    assert rank_items(made, LLAMA, SETTING, 0, 8) == memory_items(made, LLAMA, SETTING)


def test_replicas_are_whole_and_only_buckets_come_on_top() -> None:
    more = peak(layout("ddp", 2)) - peak(layout())
    assert 0 < more <= 5 * (32 << 20)


def test_fsdp_divides_the_base_and_leaves_the_adapter() -> None:
    one, two = (rank_items(made, LLAMA, SETTING, 0, 8) for made in (layout(), layout("fsdp", 2)))
    assert two["weights"] == -(-one["weights"] // 2)
    assert two["adapter"] == one["adapter"]
    assert two["optimizer"] == one["optimizer"]
    full = rank_items(layout("fsdp", 4, method="full"), LLAMA, SETTING, 0, 8)
    assert full["weights"] == -(-4 * LLAMA.parameters() // 4)
    assert gathered_bytes(layout("fsdp", 2, variant="grad"), LLAMA) == pytest.approx(2 * LLAMA.parameters(), rel=0.01)


def test_fsdp_in_copies_in_ram_and_in_4_bits() -> None:
    full = {"method": "full"}
    copies = rank_items(layout("fsdp", 8, shards=2, **full), LLAMA, SETTING, 0, 8)
    assert copies["weights"] == -(-4 * LLAMA.parameters() // 2)
    assert copies["optimizer"] == -(-8 * LLAMA.parameters() // 2)
    frozen = layout("fsdp", 2, variant="offload")
    assert host_items(frozen, LLAMA, SETTING)["weights"] == 2 * LLAMA.parameters()
    twice = replace(frozen, devices=4, replicas=4, shards=2)
    assert host_items(twice, LLAMA, SETTING)["weights"] == 4 * LLAMA.parameters()
    assert rank_items(frozen, LLAMA, SETTING, 0, 8)["optimizer"] > 0  # the adapter's stays
    packed = rank_items(layout("fsdp", 2, method="qlora", base="nf4"), LLAMA, SETTING, 0, 8)
    weights, constants = weight_bytes(layout(method="qlora", base="nf4"), LLAMA)
    assert (packed["weights"], packed["quantization"]) == (-(-weights // 2), constants)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_full_training_from_ram(devices: int) -> None:
    """The tables and two layers in 16 bits are on a device; 16 bytes a number are in RAM, 12 with 16-bit moments."""
    made = layout("fsdp" if devices > 1 else "single", devices, variant="offload", method="full")
    here = rank_items(made, LLAMA, SETTING, 0, 8)
    table = 4 * LLAMA.vocab * LLAMA.hidden
    layer = 2 * LLAMA.linear_parameters() // LLAMA.layers
    assert here["weights"] == pytest.approx(2 * table, rel=1e-4)
    assert 2 * layer < here["gathered"] < 2.7 * layer
    assert "optimizer" not in here
    assert here["gradients"] == 2 * table + 4 * LLAMA.hidden  # of what lies outside of the layers
    assert peak(made) < 20e9
    count = LLAMA.parameters()
    for optimizer, each in (("adamw", 16), ("adamw_16bit", 12)):
        host = host_items(made, LLAMA, replace(SETTING, optimizer=optimizer))
        assert host["weights"] + host["optimizer"] + host["gradients"] == each * count
        assert set(host) <= set(HOST_ITEMS)
        assert host["loading"] < 4 * (devices * count / LLAMA.layers + 2 * LLAMA.vocab * LLAMA.hidden)
    if devices == 4:  # two copies of two: a device is as one of two, and RAM has everything twice
        copies, two = replace(made, shards=2), replace(made, devices=2, replicas=2)
        assert rank_items(copies, LLAMA, SETTING, 0, 8) == rank_items(two, LLAMA, SETTING, 0, 8)
        assert [host_items(copies, LLAMA, SETTING)[name] for name in ("weights", "gradients", "optimizer")] == [
            2 * host_items(two, LLAMA, SETTING)[name] for name in ("weights", "gradients", "optimizer")
        ]
    whole = replace(made, method="pretrain")  # random weights are drawn all at once
    assert host_items(whole, LLAMA, SETTING)["loading"] > devices * 4 * count


@pytest.mark.parametrize(("strategy", "most"), [("fsdp", 0.15), ("zero3", 1 / 8)])
def test_pieces_are_loaded_a_layer_at_a_time(strategy: str, most: float) -> None:
    """Unless something needs whole weights: then every process has the model in RAM. DeepSpeed lays out there what it
    trains.
    """
    made = layout(strategy, 8, method="full")
    assert host_items(made, LLAMA, SETTING)["loading"] <= most * 8 * 4 * LLAMA.parameters()
    whole = host_items(replace(made, method="pretrain"), LLAMA, SETTING)["loading"]
    assert whole >= 8 * 4 * LLAMA.parameters()
    adapter = host_items(replace(made, method="lora"), LLAMA, SETTING)["loading"]
    assert adapter < 0.15 * 8 * 2 * LLAMA.parameters()


def test_zero_divides_more_with_each_stage() -> None:
    made = [layout(name, 4, method="full") for name in ("zero1", "zero2", "zero3")]
    peaks = [peak(each) for each in made]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peak(layout("zero3", 4, method="full", variant="offload")) < peaks[2]


def test_an_offload_puts_into_ram_what_it_takes_off_the_device() -> None:
    """DeepSpeed: 12 bytes of optimizer for a number and 8 of gradients; with ZeRO-2 also weights on their way back."""
    for strategy, variant, wanted in (("zero3", "offload", 20), ("zero3", "offload-all", 20), ("zero2", "offload", 24)):
        made = layout(strategy, 2, method="full", variant=variant)
        items = rank_items(made, LLAMA, SETTING, 0, 8)
        assert "optimizer" not in items
        host = host_items(made, LLAMA, SETTING)
        assert set(host) <= set(HOST_ITEMS)
        assert host["optimizer"] + host["gradients"] == wanted * LLAMA.parameters()


def test_stages_hold_their_layers_and_the_early_ones_more_micro_batches() -> None:
    made = layout("pipeline", 4, variant="1f1b", cuts=(8, 8, 8, 8), activations="keep")
    items = [rank_items(made, LLAMA, SETTING, rank, 8) for rank in range(4)]
    table = 2 * LLAMA.vocab * LLAMA.hidden
    assert sum(each["weights"] for each in items) == pytest.approx(2 * LLAMA.parameters(), rel=0.001)
    assert items[0]["weights"] - items[1]["weights"] == table
    kept = [each["activations"] for each in items]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert kept[0] / kept[3] == pytest.approx(4, rel=0.02)
    assert not any("head" in each for each in items[:3])
    assert rank_items(replace(made, variant="gpipe"), LLAMA, SETTING, 1, 8)["activations"] > kept[1]


def test_a_layer_split_keeps_what_a_pipeline_keeps() -> None:
    made = layout("model_parallel", 2, cuts=(16, 16), activations="keep")
    assert [part_of(made, LLAMA, rank, 8).sets for rank in (0, 1)] == [2, 1]
    one = sum(rank_items(made, LLAMA, SETTING, rank, 1)["activations"] for rank in (0, 1))
    assert one == pytest.approx(memory_items(layout(activations="keep"), LLAMA, SETTING)["activations"], rel=0.01)


def test_tensor_ranks_are_narrower_but_see_the_whole_stream() -> None:
    one, two = (
        rank_items(made, LLAMA, SETTING, 0, 8)
        for made in (layout(activations="keep"), layout("tensor", 2, activations="keep"))
    )
    tables = 2 * LLAMA.embedding_parameters()  # whole on both
    assert two["weights"] == pytest.approx((one["weights"] - tables) / 2 + tables, rel=0.001)
    assert 0.5 < two["activations"] / one["activations"] < 0.9


def test_packed_experts() -> None:
    mixtral = find_shape("mistralai/Mixtral-8x7B-v0.1")
    plain, packed = (layout(method="qlora", base="nf4") if nf4 else layout() for nf4 in (False, True))
    assert sum(weight_bytes(plain, mixtral)) > 90e9
    assert sum(weight_bytes(packed, mixtral)) == pytest.approx(24.5e9, rel=0.01)  # 0.516 bytes a weight
    assert peak(packed, shape=mixtral) < peak(plain, shape=mixtral) / 3


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero2", "zero3", "tensor"])
def test_no_phase_passes_the_step_that_the_plan_is_made_for(strategy: str) -> None:
    made = layout(strategy, 1 if strategy == "single" else 2)
    phases = phase_peaks(made, LLAMA, SETTING, 0, 8)
    assert tuple(phases) == PHASES
    assert phases["steady_step"] == max(phases.values()) == peak(made)
    assert 0 < phases["loading"] < phases["steady_step"]
    assert 0 < phases["evaluation"] < phases["steady_step"]
    assert phases["first_step"] <= phases["steady_step"]


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_what_graphs_take_stays_taken_while_a_run_validates(strategy: str) -> None:
    count = 1 if strategy == "single" else 2
    plain = layout(strategy, count, method="qlora", base="nf4", arithmetic="fp8", activations="keep")
    made = replace(plain, graphs=True)
    items, before = rank_items(made, LLAMA, SETTING, 0, 8), rank_items(plain, LLAMA, SETTING, 0, 8)
    beside = items.pop("graphs")
    assert items == before
    assert beside > 2048 * 4 * LLAMA.intermediate  # gate and up of a layer, in 16 bits
    phases = phase_peaks(made, LLAMA, SETTING, 0, 8)
    assert phases["evaluation"] == peak(made) == max(phases.values())
    assert phases["saving"] == phases["steady_step"] == peak(made) - beside
    assert phase_peaks(plain, LLAMA, SETTING, 0, 8)["evaluation"] < phases["steady_step"]


def test_gradients_that_graphs_add_to_are_always_there() -> None:
    alone = replace(SETTING, accumulates=False)
    plain = layout(method="qlora", base="nf4", arithmetic="fp8", activations="keep")
    with_graphs, without = (memory_items(made, LLAMA, alone) for made in (replace(plain, graphs=True), plain))
    assert with_graphs["gradients"] == with_graphs["adapter"]
    assert "gradients" not in without


def test_every_item_has_words() -> None:
    for strategy in (*DATA_PARALLEL, "tensor"):
        assert set(rank_items(layout(strategy, 2), LLAMA, SETTING, 0, 8)) <= set(ITEMS)
    assert set(rank_items(layout(graphs=True), LLAMA, SETTING, 0, 8)) <= set(ITEMS)


def test_every_number_that_is_explained_has_a_formula() -> None:
    assert set(SPEED_FORMULAS) == set(PARTS)
    assert (set(ITEMS) | set(HOST_ITEMS)) - set(FORMULAS) == set()
