import pytest

from kitaeru.engine.checkpoint import compare
from kitaeru.errors import CheckpointError
from kitaeru.recipe.types import Recipe

DATA = {"train": "3f" * 32, "valid": "77" * 32}


def fingerprints(contents=DATA, **sections):
    recipe = Recipe.model_validate(
        {"model": "bundled", **sections, "data": {"train": "a.jsonl", "valid": "b.jsonl", **sections.get("data", {})}}
    )
    return {"recipe": recipe.model_dump(mode="json"), "data": contents}


def train(**fields):
    return fingerprints(train=fields)


def test_the_same_run_goes_on():
    compare(fingerprints(), fingerprints())


FREE = {
    "output": {"output": "elsewhere"},
    "limits": {"limits": {"micro_batch_tokens": 64, "threads": 2}},
    "track": {"track": {"wandb": "p"}},
    "samples": {"samples": {"prompts": ["何?", "誰?"]}},
    "workers": {"data": {"workers": 3}},
    "rhythm": {"train": {"save_every": 3, "eval_every": 4, "keep_checkpoints": 9}},
}


@pytest.mark.parametrize("name", FREE)
def test_what_never_reaches_the_weights_may_change(name):
    compare(fingerprints(), fingerprints(**FREE[name]))
    compare(fingerprints(**FREE[name]), fingerprints())


BOUND = {
    "train.learning_rate: null → 0.001": {"train": {"learning_rate": 1e-3}},
    "train.seed: 0 → 1": {"train": {"seed": 1}},
    "lora.targets.0: all-linear → q_proj": {"lora": {"targets": ["q_proj"]}},
    "lora.targets.1: not there → v_proj": {"lora": {"targets": ["all-linear", "v_proj"]}},
    "lora.dora: false → true": {"lora": {"dora": True}},
    "data.packing: true → false": {"data": {"packing": False}},
    "data.train.0.weight: 1.0 → 2.0": {"data": {"train": {"path": "a.jsonl", "weight": 2.0}}},
    "model.name: bundled → other": {"model": "other"},
    "train.max_steps: null → 9 (the learning rate": {"train": {"max_steps": 9}},
    "train.eval_max_examples: null → 5": {"train": {"eval_max_examples": 5}},
}


@pytest.mark.parametrize("line", BOUND)
def test_what_the_steps_made_depend_on_is_named(line):
    with pytest.raises(CheckpointError) as info:
        compare(fingerprints(), fingerprints(**BOUND[line]))
    assert "  - " + line in str(info.value)
    assert str(info.value).count("\n  - ") == 1
    assert "another `output`" in info.value.remedy


def test_all_changes_are_named_at_once():
    with pytest.raises(CheckpointError) as info:
        compare(fingerprints(), fingerprints(train={"seed": 4, "beta1": 0.5, "save_every": 2}, lora={"r": 2}))
    changed = {line.split(":")[0].strip(" -") for line in str(info.value).splitlines() if line.startswith("  - ")}
    assert changed == {"train.seed", "train.beta1", "lora.r"}


def test_changed_data_is_named_and_moved_data_is_not():
    moved = fingerprints(data={"train": "moved/a.jsonl"})
    compare(fingerprints(), moved)
    with pytest.raises(CheckpointError, match=r"data\.train: the content changed \(3f3f3f3f3f3f… → 000000000000…\)"):
        compare(fingerprints(), fingerprints(contents={**DATA, "train": "00" * 32}))
    unknown = [{"recipe": value["recipe"]} for value in (fingerprints(), moved)]
    with pytest.raises(CheckpointError, match=r"data\.train\.0\.path: a\.jsonl → moved/a\.jsonl"):
        compare(*unknown)


CONSTANT = {"schedule": "constant", "warmup_steps": 5}
ALLOWED = [
    (CONSTANT | {"max_steps": 10}, CONSTANT | {"max_steps": 20}),
    ({"schedule": "constant", "warmup_fraction": 0.0, "epochs": 1}, {"schedule": "constant", "warmup_fraction": 0.0}),
    ({"early_stop": 2}, {"early_stop": 3}),
    ({"early_stop": 2}, {}),
    ({"on_nan": "stop"}, {"on_nan": "skip"}),
    ({"on_spike": "stop"}, {"on_spike": "skip", "spike_factor": 5.0}),
    ({"on_spike": "ignore"}, {"on_spike": "ignore", "spike_factor": 2.0}),
    ({"keep_best": True}, {"keep_best": False}),
]
REFUSED = [
    ({"schedule": "constant", "max_steps": 10}, {"schedule": "constant", "max_steps": 20}),  # warm-up is a share
    (CONSTANT | {"max_steps": 10}, {"warmup_steps": 5, "max_steps": 20}),
    ({"early_stop": 3}, {"early_stop": 2}),
    ({}, {"early_stop": 2}),
    ({"on_nan": "skip"}, {"on_nan": "stop"}),
    ({"on_spike": "ignore"}, {"on_spike": "skip"}),
    ({"on_spike": "stop"}, {"on_spike": "stop", "spike_factor": 2.0}),
    ({"on_spike": "skip"}, {"on_spike": "skip", "spike_factor": 5.0}),
    ({"keep_best": False}, {"keep_best": True}),
]


@pytest.mark.parametrize(("before", "after"), ALLOWED)
def test_a_change_that_would_not_have_changed_the_past_is_allowed(before, after):
    compare(train(**before), train(**after))


@pytest.mark.parametrize(("before", "after"), REFUSED)
def test_a_change_that_could_have_changed_the_past_is_refused(before, after):
    with pytest.raises(CheckpointError):
        compare(train(**before), train(**after))
