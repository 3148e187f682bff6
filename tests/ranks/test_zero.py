"""ZeRO through DeepSpeed's engine is the same training, and its checkpoints are everybody's."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="the extra is not installed: pip install 'kitaeru[deepspeed]'"
)


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
def test_same_losses_and_weights(crew, hard, alone, tmp_path, strategy, variant, name, method, more):
    options = {"folder": tmp_path / "run", **hard(name, method, **more)}
    answers = crew.run(tmp_path, 2, crew.train, strategy=strategy, variant=variant, **options)
    wanted = alone(name, method)
    assert wanted["steps"] == list(range(1, crew.STEPS + 1))
    assert min(wanted["norms"]) > crew.HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["tokens"] == wanted["tokens"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert answer["frozen"]
    assert crew.far(answers[0]["weights"], wanted["weights"]) <= 1e-5
    # Each rank has a share of what is trained.
    assert sum(answer["numbers"] for answer in answers) == wanted["numbers"]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("full", [("single", 1, ""), ("zero1", 2, ""), ("zero3", 3, "")]),
        ("full", [("zero3", 2, "offload-all"), ("zero2", 3, "offload"), ("fsdp", 2, "")]),
        ("lora", [("zero2", 2, ""), ("zero3", 2, ""), ("single", 1, "")]),
    ],
)
def test_one_run_under_three_strategies(crew, family, chat_data, tmp_path, method, parts):
    options = {"model": family("llama"), "data": chat_data, "method": method, **crew.RUN}
    [wanted] = crew.run(tmp_path / "whole", 1, crew.train, folder=tmp_path / "alone", write=True, **options)
    ways = [(strategy, ranks, {"variant": variant}) for strategy, ranks, variant in parts]
    crew.moved(ways, wanted, tmp_path, model=family("llama"), data=chat_data, method=method)


@pytest.mark.parametrize(("strategy", "variant"), [("zero2", "offload"), ("zero3", "")])
def test_a_step_left_out_leaves_nothing_behind(crew, family, chat_data, tmp_path, strategy, variant):
    options = {"model": family("llama"), "data": chat_data, "method": "full", "step": 2, **crew.RUN}
    options |= {"train__max_steps": 4, "train__on_spike": "skip"}
    [wanted] = crew.run(tmp_path / "1", 1, crew.skips, folder=tmp_path / "one", **options)
    how = {"strategy": strategy, "variant": variant}
    for answer in crew.run(tmp_path / "2", 2, crew.skips, folder=tmp_path / "two", **how, **options):
        assert answer["skipped"] == wanted["skipped"] == [2]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


def test_a_frozen_base_in_4_bits_stays_as_it_is(crew, tiny_model, chat_data, tmp_path):
    """And answers are those of one device."""
    options = {"model": tiny_model, "data": chat_data, "method": "qlora", "stop_at": 5, **crew.RUN}
    [wanted] = crew.run(tmp_path / "1", 1, crew.answering, folder=tmp_path / "one", **options)
    for answer in crew.run(tmp_path / "2", 2, crew.answering, folder=tmp_path / "two", strategy="zero2", **options):
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["frozen"]
        assert answer["texts"] == wanted["texts"]


def test_weights_in_pieces_answer_and_come_back(crew, family, chat_data, valid_data, tmp_path):
    """Earlier weights are put back after an evaluation; ranks without a micro-batch of their own; answers."""
    options = {"model": family("llama"), "data": chat_data, "method": "full", **crew.RUN}
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


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_one_layer_is_whole_at_a_time(crew, family, tmp_path, strategy):
    """Also where what is trained is listed elsewhere, as in every run."""
    for one, seen in crew.run(tmp_path, 2, crew.loads, model=family("qwen3", 5), strategy=strategy):
        assert len(seen) == 5
        assert one <= max(seen) < 1.1 * one  # and stand-ins of four bytes each
