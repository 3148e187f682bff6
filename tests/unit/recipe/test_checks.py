"""Impossible combinations: each rule fires on its case, with a remedy that works, and not beside it."""

from __future__ import annotations

import pytest

from kitaeru.errors import RecipeError
from kitaeru.recipe import checks, presets
from kitaeru.recipe.read import read
from kitaeru.recipe.types import Recipe

BASE = ["model=bundled", "data.train=a.jsonl"]

# rule, the clashing values, and a change after which the recipe is right
CASES = [
    ("ds_config_is_deepspeeds", ["limits.ds_config=own.json"], "strategy=zero2"),
    ("split_needs_a_splitting_strategy", ["strategy=ddp", "limits.split_over=2"], "limits.split_over="),
    ("fsdp_cuts_no_int8", ["strategy=fsdp", "model.quantize=int8"], "model.quantize=nf4"),
    ("qlora_needs_nf4", ["method=qlora", "model.quantize=int8"], "method=lora"),
    ("qlora_needs_nf4", ["method=qlora", "model.quantize=none"], "model.quantize="),
    ("whole_weights_are_not_quantised", ["method=full", "model.quantize=nf4"], "model.quantize="),
    ("whole_weights_are_not_quantised", ["method=pretrain", "model.quantize=int8"], "model.quantize=none"),
    ("adapter_needs_adapter_method", ["method=full", "lora.r=8"], "method=lora"),
    ("adapter_needs_adapter_method", ["method=pretrain", "lora.plus_ratio=16"], "lora.plus_ratio="),
    ("pissa_needs_float_base", ["method=qlora", "lora.init=pissa"], "lora.init=olora"),
    ("pissa_needs_float_base", ["model.quantize=int8", "lora.init=pissa"], "model.quantize=none"),
    ("one_validation_set", ["data.valid=b.jsonl", "data.valid_fraction=0.1"], "data.valid_fraction="),
    ("validation_is_not_training", ["data.valid=a.jsonl"], "data.valid=b.jsonl"),
    (
        "micro_batch_holds_longest",
        ["limits.micro_batch_tokens=512", "data.seq_len=1024"],
        "limits.micro_batch_tokens=1024",
    ),
    (
        "one_global_batch",
        ["train.global_batch_tokens=9", "train.global_batch_examples=9"],
        "train.global_batch_tokens=",
    ),
    ("warmup_ends", ["train.warmup_steps=10", "train.max_steps=10"], "train.warmup_steps=9"),
    (
        "wsd_fits",
        ["train.schedule=wsd", "train.warmup_fraction=0.5", "train.decay_fraction=0.6"],
        "train.decay_fraction=0.5",
    ),
    ("clipping_needs_all_gradients", ["train.step_in_backward=true"], "train.max_grad_norm=0"),
    (
        "clipping_needs_all_gradients",
        ["train.step_in_backward=true", "train.max_grad_norm=0.5"],
        "train.step_in_backward=",
    ),
    ("early_stop_needs_validation", ["train.early_stop=2"], "data.valid_fraction=0.05"),
    ("gpu_only", ["limits.device=cpu", "train.optimizer=paged_adamw_8bit"], "train.optimizer=adamw_8bit"),
    ("gpu_only", ["limits.device=cpu", "train.precision=fp16"], "train.precision=bf16"),
    (
        "what_is_checkpointed_agrees",
        ["limits.checkpointing=false", "limits.recomputed_layers=3"],
        "limits.checkpointing=",
    ),
    (
        "what_is_checkpointed_agrees",
        ["limits.checkpointing=false", "limits.offload_activations=true"],
        "limits.offload_activations=false",
    ),
    (
        "what_is_checkpointed_agrees",
        ["limits.recomputed_layers=3", "limits.offload_activations=true"],
        "limits.recomputed_layers=",
    ),
    ("gpu_only", ["limits.device=cpu", "model.attention=flash_attention_2"], "limits.device=cuda"),
]


@pytest.mark.parametrize(("rule", "values", "mend"), CASES)
def test_rule(rule: str, values: list[str], mend: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(None, overrides=BASE + values)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].remedy
    read(None, overrides=[*BASE, *values, mend])

    recipe = Recipe.model_validate(_nested(BASE + values))
    given = {value.partition("=")[0] for value in values}
    only = list(getattr(checks, rule)(recipe, given))
    assert [clash.what for clash in only] == [clash.what for clash in checks.check(recipe, given)]


def _nested(overrides: list[str]) -> dict[str, object]:
    """Without the clash checks: the values as the types take them."""
    from kitaeru.recipe.yamltext import parse

    out: dict[str, object] = {}
    for text in overrides:
        path, _, raw = text.partition("=")
        inner = out
        *sections, name = path.split(".")
        for section in sections:
            held = inner.setdefault(section, {})
            inner = held if isinstance(held, dict) else inner.setdefault(section, {})  # type: ignore[assignment]
            if isinstance(held, str):
                inner = out[section] = {"name": held}
        inner[name] = parse(raw, "").values
    return out


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in checks.RULES} == {case[0] for case in CASES}


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("method", ["auto", "full", "lora", "qlora", "pretrain"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_clash_with_nothing_ordinary(preset: str, method: str, device: str) -> None:
    more = [f"preset={preset}", f"method={method}", f"limits.device={device}", "data.valid=b.jsonl"]
    recipe = read(None, overrides=BASE + more).recipe
    assert recipe.method == method
    bare = read(None, overrides=[*BASE, f"method={method}", f"limits.device={device}", "data.valid=b.jsonl"]).recipe
    assert recipe != bare.model_copy(update={"preset": preset}), "a preset that changes nothing"


def test_max_steps_comes_before_epochs_and_is_no_clash() -> None:
    recipe = read(None, overrides=[*BASE, "train.max_steps=3", "train.epochs=2"]).recipe
    assert (recipe.train.max_steps, recipe.train.epochs) == (3, 2.0)


def test_a_default_written_out_is_no_clash() -> None:
    """A complete recipe, every value written, reads back whatever its method."""
    read(None, overrides=[*BASE, "method=full", "lora.r=16", "lora.init=default"])
