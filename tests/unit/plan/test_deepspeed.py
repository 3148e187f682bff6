"""DeepSpeed's configuration: made from the plan, with what a person adds; two truths are one too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitaeru.errors import UsageError
from kitaeru.hardware import parse_gpus
from kitaeru.plan.choose import survey
from kitaeru.plan.deepspeed import deepspeed_config
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import Recipe
from kitaeru.shape import find_shape


def layout(strategy: str = "zero2", variant: str = "", **changes: Any) -> Layout:
    return Layout(strategy, "full", "none", "bf16", "keep", 2048, "cuda", 2, variant, 2, **changes)


def made(own: Any = None, folder: Path | None = None, on: Layout | None = None, **train: Any) -> dict[str, Any]:
    limits = {}
    if own is not None:
        assert folder is not None
        path = folder / "own.json"
        path.write_text(own if isinstance(own, str) else json.dumps(own))
        limits = {"ds_config": str(path)}
    on = on or layout()
    values = {"model": "m", "data": {"train": "d"}, "method": "full", "strategy": on.strategy}
    recipe = Recipe.model_validate({**values, "train": {"learning_rate": 1e-5, **train}, "limits": limits})
    return deepspeed_config(on, recipe, 50_000_000)


def test_what_decides_the_mathematics_stays_with_kitaeru() -> None:
    for each in (layout("zero1"), layout("zero2", "offload"), layout("zero3", "offload-all")):
        config = made(on=each)
        zero = config["zero_optimization"]
        assert zero["stage"] == int(each.strategy[-1])
        assert (config["gradient_clipping"], config["communication_data_type"]) == (0.0, "fp32")
        assert not config["bf16"]["enabled"]
        assert not config["fp16"]["enabled"]
        assert ("offload_optimizer" in zero) is each.variant.startswith("offload")
        assert ("offload_param" in zero) is (each.variant == "offload-all")
    assert made(on=layout("zero3"))["zero_optimization"]["reduce_bucket_size"] == 32 << 20


def test_buffers_are_no_larger_than_what_is_trained() -> None:
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "d"}})
    assert deepspeed_config(layout(), recipe, 1000)["zero_optimization"]["reduce_bucket_size"] == 1024


def test_every_made_configuration_is_one_to_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for each in (layout("zero1"), layout("zero2", "offload"), layout("zero3", "offload-all")):
        config = made(on=each)
        read = DeepSpeedZeroConfig(**config["zero_optimization"])
        assert read.stage == config["zero_optimization"]["stage"]
        assert read.reduce_bucket_size == config["zero_optimization"]["reduce_bucket_size"]


def test_a_person_s_own_values_are_taken(tmp_path: Path) -> None:
    own = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": "auto", "weight_decay": 0.0}},
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True, "sub_group_size": "auto"},
    }  # fmt: skip
    config = made(own, tmp_path)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["overlap_comm"] is True
    assert "sub_group_size" not in config["zero_optimization"]
    assert "optimizer" not in config
    assert config["gradient_clipping"] == 0.0


CLASHES: list[tuple[Any, str]] = [
    ("{", "cannot be read"),
    ("[]", "not a JSON object"),
    ({"train_batch_size": 64}, "`train_batch_size` says 64, and the recipe says 32"),
    ({"train_micro_batch_size_per_gpu": 4}, "says 4, and the recipe says at most 2048 tokens"),
    ({"gradient_accumulation_steps": 8}, "`gradient_accumulation_steps` says 8"),
    ({"gradient_clipping": 0.5}, "`gradient_clipping` says 0.5, and the recipe says 1.0"),
    ({"fp16": {"enabled": True}}, "`fp16` says fp16, and the recipe says bf16"),
    ({"optimizer": {"type": "Lamb"}}, "says Lamb, and the recipe says adamw"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "says lr=0.001, and the recipe says lr=1e-05"),
    ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "amsgrad"),
    ({"scheduler": {"type": "WarmupLR"}}, "says WarmupLR, and the recipe says cosine"),
    ({"communication_data_type": "bf16"}, "32 bits"),
    ({"curriculum_learning": {}}, "`curriculum_learning` in DeepSpeed's configuration is not for kitaeru"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "`zero_optimization.zero_quantized_weights`"),
    ({"zero_optimization": 2}, "`zero_optimization` is not a JSON object"),
    ({"zero_optimization": {"stage": 3}}, "stage` is 3, and the strategy zero2"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "RAM"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offloads otherwise"),
]


@pytest.mark.parametrize(("own", "words"), CLASHES, ids=[case[1] for case in CLASHES])
def test_what_says_something_else_is_refused(own: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        made(own, tmp_path, global_batch_examples=32)
    assert words in caught.value.what
    assert caught.value.where == str(tmp_path / "own.json")
    assert caught.value.remedy


def test_a_file_chooses_what_goes_to_ram(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    values = {"model": "meta-llama/Llama-2-7b-hf", "data": {"train": "d"}, "method": "full", "strategy": "zero3"}
    recipe = Recipe.model_validate({**values, "limits": {"ds_config": str(path)}})
    found = survey(recipe, parse_gpus("2x RTX A5000", "512GB"), find_shape(values["model"]))
    assert found.plan is not None
    assert found.plan.layout.way == "zero3-offload-all"


def test_deepspeed_is_taken_when_asked_for() -> None:
    pair, name = parse_gpus("2x RTX A5000", "128GB"), "elyza/Llama-3-ELYZA-JP-8B"
    open_recipe = Recipe.model_validate({"model": name, "data": {"train": "d"}})
    found = survey(open_recipe, pair, find_shape(name))
    zero = [c for c in found.candidates if c.layout.strategy.startswith("zero") and c.fits and c.built]
    assert zero
    assert all("--set strategy=zero" in " ".join(c.why) for c in zero)
    assert found.plan is not None
    assert not found.plan.layout.strategy.startswith("zero")
    asked = survey(open_recipe.model_copy(update={"strategy": "zero2"}), pair, find_shape(name))
    assert asked.plan is not None
    assert asked.plan.layout.strategy == "zero2"
