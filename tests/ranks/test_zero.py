"""ZeRO through DeepSpeed's engine is the same training, and its checkpoints are everybody's."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="the extra is not installed: pip install 'kitaeru[deepspeed]'"
)

STEPS = 6
# Accumulation (a global batch is several micro-batches of uneven length), packing, clipping that bites, decay, dropout.
HARD = {
    "train__max_steps": STEPS,
    "train__learning_rate": 3e-3,
    "train__global_batch_tokens": 300,
    "train__max_grad_norm": 0.05,
    "train__weight_decay": 0.1,
    "train__warmup_steps": 1,
    "micro_batch_tokens": 64,
}
LORA = {"lora__dropout": 0.1, "lora__r": 4, "train__neftune_alpha": 5.0}


@pytest.fixture(scope="session")
def alone(crew, family, chat_data, valid_data, tmp_path_factory):
    """`alone("llama", "lora")`: the same run on one process."""
    done = {}

    def get(name, method, **more):
        key = (name, method, *sorted(more.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("single")
            options = {**options_of(method), "data__valid": str(valid_data), **more}
            arguments = {"folder": folder / "run", "model": family(name), "data": chat_data, "method": method}
            [done[key]] = crew.run(folder, 1, crew.train, **arguments, **options)
        return done[key]

    return get


def options_of(method):
    return HARD | (LORA if method != "full" else {})


def far(ours, theirs):
    """The largest relative difference, tensor by tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-6)) for n in theirs)


@pytest.mark.parametrize(
    ("strategy", "variant", "name", "method", "more"),
    [
        ("zero1", "", "llama", "full", {}),
        ("zero1", "", "qwen3", "lora", {}),
        ("zero2", "", "gemma", "full", {}),
        ("zero2", "", "llama", "lora", {"activations": "recompute"}),
        ("zero2", "offload", "qwen3", "full", {}),
        ("zero3", "", "qwen3", "full", {"activations": "recompute"}),
        ("zero3", "", "llama", "lora", {}),
        ("zero3", "offload", "llama", "full", {}),
        ("zero3", "offload-all", "gemma", "full", {"activations": "recompute"}),
    ],
)
def test_same_losses_and_weights(
    crew, family, chat_data, valid_data, alone, tmp_path, strategy, variant, name, method, more
):
    options = {**options_of(method), "data__valid": str(valid_data), **more}
    arguments = {"folder": tmp_path / "run", "model": family(name), "data": chat_data, "method": method}
    answers = crew.run(tmp_path, 2, crew.train, strategy=strategy, variant=variant, **arguments, **options)
    wanted = alone(name, method)
    assert wanted["steps"] == list(range(1, STEPS + 1))
    assert min(wanted["norms"]) > HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["tokens"] == wanted["tokens"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert answer["frozen"]
    assert far(answers[0]["weights"], wanted["weights"]) <= 1e-5
    # Each rank has a share of what is trained.
    assert sum(answer["numbers"] for answer in answers) == wanted["numbers"]


# A rate that does not depend on the run's length, so that a part of it can be run.
RUN = {
    "train__max_steps": 9,
    "train__learning_rate": 3e-3,
    "train__global_batch_tokens": 300,
    "train__schedule": "constant",
    "train__warmup_steps": 0,
    "train__save_every": 3,
    "train__keep_checkpoints": 9,
    "train__keep_best": False,
    "train__weight_decay": 0.1,
    "micro_batch_tokens": 64,
}


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("full", [("single", 1, ""), ("zero1", 2, ""), ("zero3", 3, "")]),
        ("full", [("zero3", 2, "offload-all"), ("zero2", 3, "offload"), ("fsdp", 2, "")]),
        ("lora", [("zero2", 2, ""), ("zero3", 2, ""), ("single", 1, "")]),
    ],
)
def test_one_run_under_three_strategies(crew, family, chat_data, tmp_path, method, parts):
    options = {"model": family("llama"), "data": chat_data, "method": method, **RUN}
    [wanted] = crew.run(tmp_path / "whole", 1, crew.train, folder=tmp_path / "alone", write=True, **options)
    losses = []
    for number, (strategy, ranks, variant) in enumerate(parts):
        answers = crew.run(
            tmp_path / str(number),
            ranks,
            crew.train,
            folder=tmp_path / "run",
            strategy=strategy,
            variant=variant,
            resume=number > 0,
            write=number == 2,
            stop_at=3 * (number + 1),
            **options,
        )
        losses += answers[0]["losses"]
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    assert far(answers[0]["weights"], wanted["weights"]) <= 1e-5
    assert far(written(answers[0]["result"]), written(wanted["result"])) <= 1e-5


def written(folder):
    from pathlib import Path

    from safetensors.torch import load_file

    [file] = Path(folder).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("strategy", "variant"), [("zero2", "offload"), ("zero3", "")])
def test_a_step_left_out_leaves_nothing_behind(crew, family, chat_data, tmp_path, strategy, variant):
    options = {"model": family("llama"), "data": chat_data, "method": "full", "step": 2, **RUN}
    options |= {"train__max_steps": 4, "train__on_spike": "skip"}
    [wanted] = crew.run(tmp_path / "1", 1, crew.skips, folder=tmp_path / "one", **options)
    how = {"strategy": strategy, "variant": variant}
    for answer in crew.run(tmp_path / "2", 2, crew.skips, folder=tmp_path / "two", **how, **options):
        assert answer["skipped"] == wanted["skipped"] == [2]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


def test_a_frozen_base_in_4_bits_stays_as_it_is(crew, tiny_model, chat_data, tmp_path):
    """And answers are those of one device."""
    options = {"model": tiny_model, "data": chat_data, "method": "qlora", "stop_at": 5, **RUN}
    [wanted] = crew.run(tmp_path / "1", 1, crew.answering, folder=tmp_path / "one", **options)
    for answer in crew.run(tmp_path / "2", 2, crew.answering, folder=tmp_path / "two", strategy="zero2", **options):
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["frozen"]
        assert answer["texts"] == wanted["texts"]


def test_weights_in_pieces_answer_and_come_back(crew, family, chat_data, valid_data, tmp_path):
    """Earlier weights are put back after an evaluation; ranks without a micro-batch of their own; answers."""
    options = {"model": family("llama"), "data": chat_data, "method": "full", **RUN}
    best = {"data__valid": str(valid_data), "train__keep_best": True, "train__eval_every": 3, "step": 3}
    best |= {"train__global_batch_tokens": 60, "train__max_steps": 4}
    [wanted] = crew.run(tmp_path / "1", 1, crew.best, folder=tmp_path / "one", **options | best)
    answers = crew.run(tmp_path / "2", 2, crew.best, folder=tmp_path / "two", strategy="zero3", **options | best)
    for answer in answers:
        assert answer["again"] == answer["then"] == pytest.approx(wanted["again"], rel=1e-5)
    [wanted] = crew.run(tmp_path / "3", 1, crew.answering, folder=tmp_path / "three", stop_at=2, **options)
    how = {"strategy": "zero3", "stop_at": 2}
    for answer in crew.run(tmp_path / "4", 2, crew.answering, folder=tmp_path / "four", **how, **options):
        assert answer["texts"] == wanted["texts"]
