"""The configs: every field reaches the recipe, or is refused with what to write instead."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from kitaeru import LoRAConfig, MultiGPUTrainingConfig, TrainingConfig
from kitaeru.api.configs import gigabytes
from kitaeru.errors import UsageError

# field, a value, and what it says in the recipe
TRAINING: list[tuple[str, Any, dict[str, Any]]] = [
    ("learning_rate", 3e-4, {"train.learning_rate": 3e-4}),
    ("batch_size", 4, {"train.global_batch_examples": 8}),
    ("gradient_accumulation_steps", 4, {"train.global_batch_examples": 8}),
    ("effective_batch_size", 64, {"train.global_batch_examples": 64}),
    ("num_epochs", 2, {"train.epochs": 2.0}),
    ("max_steps", 7, {"train.max_steps": 7}),
    ("warmup_steps", 5, {"train.warmup_steps": 5}),
    ("max_grad_norm", 0.5, {"train.max_grad_norm": 0.5}),
    ("weight_decay", 0.1, {"train.weight_decay": 0.1}),
    ("lr_scheduler_type", "constant_with_warmup", {"train.schedule": "constant"}),
    ("max_length", 512, {"data.seq_len": 512}),
    ("eval_steps", 3, {"train.eval_every": 3}),
    ("save_steps", 4, {"train.save_every": 4}),
    ("save_total_limit", 1, {"train.keep_checkpoints": 1}),
    ("fp16", True, {"train.precision": "fp16"}),
    ("bf16", True, {"train.precision": "bf16"}),
    ("gradient_checkpointing", True, {"limits.checkpointing": True}),
    ("optim", "lion", {"train.optimizer": "lion"}),
    ("seed", 9, {"train.seed": 9}),
]
MULTI: list[tuple[str, Any, dict[str, Any]]] = [
    ("strategy", "tensor_parallel", {"strategy": "tensor", "limits.split_over": 2}),
    ("max_memory_per_gpu", {0: "22GB", 1: "22GB"}, {"limits.memory_gb": 22.0, "limits.devices": 2}),
    ("pipeline_parallel_size", 2, {"strategy": "pipeline", "limits.split_over": 2}),
    ("tensor_parallel_size", 2, {"strategy": "tensor", "limits.split_over": 2}),
    ("devices", 2, {"limits.devices": 2}),
]
# Told to the trainer: where the run lies, how it is shown, and the recipe itself.
ELSEWHERE = {"output_dir", "logging_steps", "recipe"}


@pytest.mark.parametrize(("name", "value", "said"), TRAINING, ids=[case[0] for case in TRAINING])
def test_a_field_reaches_the_recipe(name: str, value: Any, said: dict[str, Any]) -> None:
    before, after = TrainingConfig().values(2), TrainingConfig(**{name: value}).values(2)
    assert {path: v for path, v in after.items() if v != before[path]} == said


@pytest.mark.parametrize(("name", "value", "said"), MULTI, ids=[case[0] for case in MULTI])
def test_a_field_of_several_devices_reaches_the_recipe(name: str, value: Any, said: dict[str, Any]) -> None:
    before, after = MultiGPUTrainingConfig().values(2), MultiGPUTrainingConfig(**{name: value}).values(2)
    assert {path: v for path, v in after.items() if v != before[path]} == said


def test_no_field_is_left_out() -> None:
    assert {f.name for f in fields(TrainingConfig)} == {case[0] for case in TRAINING} | ELSEWHERE
    own = {f.name for f in fields(MultiGPUTrainingConfig)} - {f.name for f in fields(TrainingConfig)}
    assert own == {case[0] for case in MULTI}


@pytest.mark.parametrize(
    ("strategy", "more", "examples"),
    [
        ("ddp", {}, 64),
        ("zero3", {}, 64),
        ("auto", {}, 64),
        ("single", {}, 32),
        ("model_parallel", {}, 32),
        ("pipeline", {}, 32),
    ],
)
def test_the_effective_batch_counts_copies_of_the_model(strategy: Any, more: Any, examples: int) -> None:
    config = MultiGPUTrainingConfig(strategy=strategy, batch_size=8, gradient_accumulation_steps=4, **more)
    assert config.values(2)["train.global_batch_examples"] == examples


def test_a_pipeline_of_two_on_four_devices_is_two_copies() -> None:
    assert MultiGPUTrainingConfig(strategy="tensor_parallel", tensor_parallel_size=2).copies(4) == 2
    config = MultiGPUTrainingConfig(strategy="pipeline", pipeline_parallel_size=2, batch_size=8)
    assert config.values(4)["train.global_batch_examples"] == 16


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fp16": True, "bf16": True}, "both"),
        ({"batch_size": 0}, "counts from 1"),
        ({"max_memory_per_gpu": {0: "22GB", 1: "24GB"}}, "different"),
        ({"max_memory_per_gpu": {0: "22GB", 2: "22GB"}}, "0, 2"),
        ({"max_memory_per_gpu": {0: "22 apples"}}, "not a size"),
        ({"max_memory_per_gpu": {0: "22GB"}, "devices": 2}, "names 1"),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "not built"),
        ({"pipeline_parallel_size": 2, "strategy": "ddp"}, "does nothing"),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        MultiGPUTrainingConfig(**values)
    assert caught.value.remedy or "counts" in words


def test_three_numbers_of_a_batch_must_agree() -> None:
    config = TrainingConfig(batch_size=8, gradient_accumulation_steps=4, effective_batch_size=64)
    assert config.values(2)["train.global_batch_examples"] == 64
    with pytest.raises(UsageError, match="make 32"):
        config.values(1)


def test_sizes() -> None:
    assert (gigabytes("22GB"), gigabytes(22 * 10**9), gigabytes("500 MB")) == (22.0, 22.0, 0.5)
    assert gigabytes("1GiB") == pytest.approx(1.073741824)


def test_an_adapter_in_the_recipes_words() -> None:
    values = LoRAConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]).values()
    assert values == {"lora.r": 8, "lora.alpha": 16.0, "lora.dropout": 0.1, "lora.targets": ["q_proj", "v_proj"]}
    assert LoRAConfig(r=4).values()["lora.alpha"] == 8.0
    assert LoRAConfig(target_modules="all-linear").values()["lora.targets"] == ["all-linear"]


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ({}, None),
        ({"use_qlora": False}, None),
        ({"use_qlora": True}, "nf4"),
        ({"qlora_4bit": True}, "nf4"),
        ({"use_qlora": True, "qlora_4bit": False}, "int8"),
    ],
)
def test_how_the_base_is_held(given: dict[str, Any], base: str | None) -> None:
    assert LoRAConfig(**given).base == base


def test_adapters_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="biases"):
        LoRAConfig(bias="all")
    with pytest.raises(UsageError, match="4-bit"):
        LoRAConfig(use_qlora=False, qlora_4bit=True)
