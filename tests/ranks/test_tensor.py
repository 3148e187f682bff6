"""Tensor parallel is the same training: losses and weights of the single process, in fp32 to 1e-5."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("name", "method", "ranks", "how"),
    [
        ("llama", "lora", 2, {}),
        ("llama", "full", 2, {}),
        ("qwen3", "lora", 2, {"activations": "recompute"}),
        ("qwen3", "pretrain", 2, {}),
        ("gemma", "lora", 2, {}),
        ("gemma", "full", 2, {"activations": "recompute"}),
        ("neox", "full", 4, {}),
        ("llama", "lora", 4, {"replicas": 2}),
        ("qwen3", "full", 4, {"replicas": 2}),
    ],
)
def test_same_losses_and_weights(crew, hard, alone, tmp_path, name, method, ranks, how):
    options, wanted = hard(name, method), alone(name, method)
    answers = crew.run(tmp_path, ranks, crew.train, folder=tmp_path / "run", strategy="tensor", **options, **how)
    assert min(wanted["norms"]) > crew.HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["steps"] == list(range(1, crew.STEPS + 1))
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert crew.far(answer["weights"], wanted["weights"]) <= 1e-5
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        assert answer["frozen"]
        assert answer["numbers"] < wanted["numbers"]  # each rank has a part


@pytest.mark.parametrize("more", [{"lora__modules_to_save": ("lm_head",)}, {"lora__init": "pissa"}], ids=str)
def test_adapters_that_start_from_whole_weights(crew, hard, alone, tmp_path, more):
    options, wanted = hard("qwen3", "lora", **more), alone("qwen3", "lora", **more)
    for answer in crew.run(tmp_path, 2, crew.train, folder=tmp_path / "run", strategy="tensor", **options):
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert crew.far(answer["weights"], wanted["weights"]) <= 1e-5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_moves_to_and_from_it(crew, family, chat_data, tmp_path, method):
    """Two steps under each of four arrangements are the eight steps of one process, and so is the result."""
    options = {**crew.HARD, "train__max_steps": 8, "train__schedule": "constant", "train__warmup_steps": 0}
    options |= {"train__save_every": 2, "train__keep_best": False, "train__max_grad_norm": 1.0}
    options |= {"model": family("llama"), "data": chat_data, "method": method}
    [wanted] = crew.run(tmp_path / "whole", 1, crew.train, folder=tmp_path / "one", write=True, **options)
    losses = []
    parts = [("single", 1, {}), ("tensor", 2, {}), ("ddp", 2, {}), ("tensor", 4, {"replicas": 2})]
    for part, (strategy, ranks, how) in enumerate(parts):
        place = {"folder": tmp_path / "run", "strategy": strategy, "resume": part > 0, "write": part == 3}
        answers = crew.run(tmp_path / str(part), ranks, crew.train, stop_at=2 * (part + 1), **place, **options, **how)
        losses += answers[0]["losses"]
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    assert crew.far(crew.written(answers[0]["result"]), crew.written(wanted["result"])) <= 1e-5


def test_answers_and_bytes(crew, family, chat_data, tmp_path):
    """With caches and without, each rank says what one process says, and holds half of the layers' bytes."""
    options = {
        **crew.HARD,
        "model": family("gemma", 5),
        "data": chat_data,
        "method": "lora",
        "stop_at": 3,
        "lora__r": 2,
    }
    [wanted] = crew.run(tmp_path / "1", 1, crew.answering, folder=tmp_path / "one", **options)
    for answer in crew.run(tmp_path / "2", 2, crew.answering, folder=tmp_path / "two", strategy="tensor", **options):
        assert answer["texts"] == wanted["texts"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["frozen"]
        assert answer["bytes"] < 0.6 * wanted["bytes"]
    assert len(wanted["texts"][0]) > 8


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [("llama", 4, "num_key_value_heads is 2"), ("mixtral", 2, "not known here"), ("gpt2", 2, "do not say")],
)
def test_what_cannot_be_cut_is_refused(crew, family, chat_data, tmp_path, name, ranks, words):
    options = {**crew.HARD, "model": family(name), "data": chat_data, "method": "full"}
    with pytest.raises(AssertionError, match=words):
        crew.run(tmp_path, ranks, crew.train, folder=tmp_path / "run", strategy="tensor", **options)
