"""A checkpoint knows no strategy: written under one, resumed under another, as if nothing had happened; the result is
the same files."""

from __future__ import annotations

import pytest
import torch

STEPS = 9
# A rate that does not depend on the run's length, so that a part of it can be run.
RUN = {
    "train__max_steps": STEPS,
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
PATHS = {
    "1-2-1": [("single", 1), ("ddp", 2), ("single", 1)],
    "ddp-fsdp-single": [("ddp", 2), ("fsdp", 2), ("single", 1)],
    "single-fsdp-ddp4": [("single", 1), ("fsdp", 2), ("ddp", 4)],
    "fsdp3-ddp-fsdp": [("fsdp", 3), ("ddp", 2), ("fsdp", 2)],
}


@pytest.fixture(scope="session")
def whole(crew, family, chat_data, tmp_path_factory):
    """The same run in one go on one process."""
    done = {}

    def get(method):
        if method not in done:
            folder = tmp_path_factory.mktemp("whole")
            options = {"folder": folder / "run", "model": family("llama"), "data": chat_data, "method": method}
            [done[method]] = crew.run(folder, 1, crew.train, write=True, **options, **RUN)
        return done[method]

    return get


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("path", PATHS)
def test_one_run_under_three_strategies(crew, family, chat_data, whole, tmp_path, method, path):
    losses, steps = [], []
    for part, (strategy, ranks) in enumerate(PATHS[path]):
        last = part == len(PATHS[path]) - 1
        answers = crew.run(
            tmp_path / str(part),
            ranks,
            crew.train,
            folder=tmp_path / "run",
            model=family("llama"),
            data=chat_data,
            method=method,
            strategy=strategy,
            resume=part > 0,
            write=last,
            stop_at=3 * (part + 1),
            **RUN,
        )
        losses += answers[0]["losses"]
        steps += answers[0]["steps"]
    wanted = whole(method)
    assert steps == list(range(1, STEPS + 1))
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    for name, weight in wanted["weights"].items():
        assert float((answers[0]["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-6)) <= 1e-5, name
    assert written(answers[0]["result"]).keys() == written(wanted["result"]).keys()
    for name, weight in written(wanted["result"]).items():
        torch.testing.assert_close(written(answers[0]["result"])[name], weight, rtol=1e-4, atol=1e-6)


def written(folder):
    from pathlib import Path

    from safetensors.torch import load_file

    [file] = Path(folder).glob("*.safetensors")
    return load_file(file)


def test_an_adapter_trained_by_several_loads_in_peft(crew, family, chat_data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = crew.run(
        tmp_path / "place",
        2,
        crew.train,
        folder=tmp_path / "run",
        model=family("qwen3"),
        data=chat_data,
        method="lora",
        strategy="fsdp",
        write=True,
        stop_at=3,
        **RUN,
    )
    base = AutoModelForCausalLM.from_pretrained(family("qwen3"), dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, answers[0]["result"]).named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in answers[0]["weights"].items())


def test_qlora_on_two_ranks_is_qlora_on_one(crew, tiny_model, chat_data, tmp_path):
    """A 4-bit base is the same on both; its packed bytes do not change."""
    options = {"model": tiny_model, "data": chat_data, "method": "qlora", "stop_at": 6, **RUN}
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    for answer in crew.run(tmp_path / "2", 2, crew.train, folder=tmp_path / "two", strategy="ddp", **options):
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["frozen"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp_that_keeps_layers_whole_sees_a_restored_checkpoint(crew, family, chat_data, valid_data, tmp_path, method):
    """The variant `grad`, with an evaluation before earlier weights come back; recomputation on top."""
    options = {
        **RUN,
        "model": family("llama"),
        "data": chat_data,
        "method": method,
        "activations": "recompute",
        "data__valid": str(valid_data),
        "train__keep_best": True,
        "train__eval_every": 3,
        "step": 3,
    }
    [wanted] = crew.run(tmp_path / "1", 1, crew.best, folder=tmp_path / "one", **options)
    answers = crew.run(
        tmp_path / "2", 2, crew.best, folder=tmp_path / "two", strategy="fsdp", variant="grad", **options
    )
    assert wanted["again"] == wanted["then"]
    for answer in answers:
        assert answer["again"] == answer["then"]
        assert answer["again"] == pytest.approx(wanted["again"], rel=1e-5)


def test_a_rank_may_have_nothing_to_do(crew, family, chat_data, tmp_path):
    """Four ranks, two micro-batches: no rank hangs, and the losses are the single process's."""
    options = {"model": family("llama"), "data": chat_data, "method": "full", "stop_at": 3, **RUN}
    options |= {"train__global_batch_tokens": 120}
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    for strategy in ("ddp", "fsdp"):
        answers = crew.run(tmp_path / strategy, 4, crew.train, folder=tmp_path / "run", strategy=strategy, **options)
        assert answers[3]["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
