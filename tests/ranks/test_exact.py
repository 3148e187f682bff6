"""Every strategy is the same training: losses and weights of the single process, in fp32 to 1e-5."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mixtral"])
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_same_losses_and_weights(crew, hard, alone, tmp_path, name, method, strategy, ranks):
    options = {"folder": tmp_path / "run", **hard(name, method)}
    answers = crew.run(tmp_path, ranks, crew.train, strategy=strategy, **options)
    wanted = alone(name, method)
    assert wanted["steps"] == list(range(1, crew.STEPS + 1))
    assert min(wanted["norms"]) > crew.HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["tokens"] == wanted["tokens"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert crew.far(answer["weights"], wanted["weights"]) <= 1e-5
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        assert answer["frozen"]
    if strategy == "fsdp" and method == "full":  # and each rank holds a share
        assert sum(answer["numbers"] for answer in answers) == wanted["numbers"]


# Cuts of five layers; the embedding is on the first stage, the head on the last.
TWO, FOUR = (3, 2), (2, 1, 1, 1)
PIPES = {
    "2 ranks": (2, {"variant": "1f1b", "cuts": TWO}),
    "4 ranks": (4, {"variant": "1f1b", "cuts": FOUR}),
    "2 ranks, interleaved": (2, {"variant": "interleaved", "cuts": FOUR}),
    "2 ranks, all forward first, recomputed": (2, {"variant": "gpipe", "cuts": TWO, "activations": "recompute"}),
    "2 lines of 2": (4, {"variant": "1f1b", "cuts": TWO, "replicas": 2}),
}


@pytest.mark.parametrize(
    ("pipe", "name", "method"),
    [
        ("2 ranks", "llama", "lora"),
        ("2 ranks", "qwen3", "full"),
        ("2 ranks", "qwen3", "pretrain"),
        ("2 ranks", "gemma", "lora"),
        ("2 ranks", "mixtral", "lora"),
        ("2 ranks", "mixtral", "full"),
        ("4 ranks", "llama", "lora"),
        ("4 ranks", "qwen3", "full"),
        ("2 ranks, interleaved", "gemma", "lora"),
        ("2 ranks, interleaved", "qwen3", "full"),
        ("2 ranks, all forward first, recomputed", "llama", "lora"),
        ("2 lines of 2", "llama", "lora"),
        ("2 lines of 2", "qwen3", "full"),
    ],
)
def test_a_pipeline_is_the_same_training(crew, hard, alone, tmp_path, pipe, name, method):
    ranks, how = PIPES[pipe]
    options = {"folder": tmp_path / "run", **hard(name, method, 5), **how}
    answers = crew.run(tmp_path, ranks, crew.train, strategy="pipeline", **options)
    wanted = alone(name, method, 5)
    weights = {}
    for answer in answers:
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert answer["frozen"]
        assert all(torch.equal(weights.setdefault(n, w), w) for n, w in answer["weights"].items())
    assert crew.far(weights, wanted["weights"]) <= 1e-5
    # Each rank has its own stages alone.
    assert sum(answer["numbers"] for answer in answers) == wanted["numbers"] * how.get("replicas", 1)


@pytest.mark.parametrize(("name", "method"), [("llama", "lora"), ("qwen3", "full")])
def test_stages_in_one_process_are_the_same_training(crew, hard, alone, tmp_path, name, method):
    options = {"folder": tmp_path / "run", **hard(name, method, 5), "devices": 2, "cuts": TWO}
    [answer] = crew.run(tmp_path, 1, crew.train, strategy="model_parallel", **options)
    wanted = alone(name, method, 5)
    assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
    assert crew.far(answer["weights"], wanted["weights"]) <= 1e-5


SHARDED = {
    "2 copies of 2 pieces": (4, {"shards": 2}),
    "2 copies of 2, kept whole": (4, {"shards": 2, "variant": "grad", "activations": "recompute"}),
    "in RAM": (2, {"variant": "offload"}),
    "inputs in RAM": (2, {"activations": "offload"}),
    "one layer computed again": (2, {"recomputed": 1}),
    "2 copies of 2, in RAM": (4, {"shards": 2, "variant": "offload", "activations": "recompute"}),
    "in RAM, on three": (3, {"variant": "offload", "activations": "recompute"}),
    "in RAM, alone": (1, {"variant": "offload", "activations": "recompute", "strategy": "single"}),
}


@pytest.mark.parametrize(
    ("way", "name", "method"),
    [
        ("2 copies of 2 pieces", "llama", "full"),
        ("2 copies of 2 pieces", "qwen3", "lora"),
        ("2 copies of 2, kept whole", "gemma", "full"),
        ("in RAM", "qwen3", "full"),
        ("in RAM", "mixtral", "full"),
        ("2 copies of 2, in RAM", "qwen3", "full"),
        ("2 copies of 2, in RAM", "mixtral", "full"),
        ("2 copies of 2, in RAM", "llama", "lora"),
        ("in RAM, on three", "neox", "full"),
        ("in RAM, alone", "gemma", "full"),
        ("in RAM, alone", "qwen3", "pretrain"),
        ("in RAM", "llama", "lora"),
        ("inputs in RAM", "gemma", "full"),
        ("one layer computed again", "llama", "lora"),
    ],
)
def test_pieces_are_the_same_training(crew, hard, alone, tmp_path, way, name, method):
    ranks, how = SHARDED[way]
    options = {"folder": tmp_path / "run", **hard(name, method), **how}
    wanted = alone(name, method)
    answers = crew.run(tmp_path / "n", ranks, crew.train, **({"strategy": "fsdp"} | options))
    assert min(wanted["norms"]) > crew.HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert crew.far(answer["weights"], wanted["weights"]) <= 1e-5
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        assert answer["frozen"]
    if method != "lora":  # each rank holds its piece of one copy
        assert sum(answer["numbers"] for answer in answers) == wanted["numbers"] * (2 if "shards" in how else 1)


FROM_RAM = {"variant": "offload", "activations": "recompute", "train__optimizer": "adamw_16bit"}


def test_moments_in_16_bits_are_the_same_on_one_rank_and_on_four(crew, hard, alone, tmp_path):
    """They are rounded alike wherever a weight lies; and the loss is nearly that of moments in 32 bits."""
    options = {**hard("qwen3", "full"), **FROM_RAM, "precision": "fp32"}
    [one] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    how = {"strategy": "fsdp", "shards": 2}
    answers = crew.run(tmp_path / "4", 4, crew.train, folder=tmp_path / "four", **how, **options)
    for answer in answers:
        assert answer["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        # Sums in another order differ in their last bit, and a moment that this takes over an edge by a 256th.
        assert crew.far(answer["weights"], one["weights"]) <= 5e-5
    exact = alone("qwen3", "full")
    assert one["losses"] != exact["losses"]
    assert one["losses"] == pytest.approx(exact["losses"], rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "name", "how"),
    [
        (2, "llama", {}),
        (2, "gemma", {"variant": "grad", "activations": "recompute"}),
        (3, "qwen3", {}),
        (4, "qwen3", {"shards": 2}),
        (2, "qwen3", {"variant": "offload"}),
        (2, "wide mixtral", {}),
    ],
)
def test_a_base_in_4_bits_is_carried_unchanged(crew, hard, tmp_path, ranks, name, how):
    """Every packed weight and constant is the single process's, bit for bit, before training and after; so is what it
    expands to; and the losses are.
    """
    options = hard(name, "qlora")
    [wanted] = crew.run(tmp_path / "1", 1, crew.packed, folder=tmp_path / "one", **options)
    options |= {"folder": tmp_path / "run", "strategy": "fsdp", **how}
    answers = crew.run(tmp_path / "n", ranks, crew.packed, **options)
    assert len(wanted["before"]) > 14 * 5
    assert wanted["before"] == wanted["after"]
    for answer in answers:
        assert answer["before"] == wanted["before"]
        assert answer["after"] == wanted["before"]
        assert answer["frozen"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert crew.far(answer["weights"], wanted["weights"]) <= 1e-5
    copies = ranks // how.get("shards", ranks)
    assert sum(answer["bytes"] for answer in answers) == wanted["bytes"] * copies  # nobody holds another's
    assert max(answer["bytes"] for answer in answers) < 0.52 * wanted["bytes"]
    assert all(answer["read"] == [layer for layer in (0, 1) if layer % ranks == r] for r, answer in enumerate(answers))


PACKED: dict = {}  # the single process's runs
MIXTURES = {
    "ddp": (2, {"strategy": "ddp"}),
    "pipeline": (2, {"strategy": "pipeline", "variant": "1f1b", "cuts": (1, 2), "activations": "recompute"}),
    "model_parallel": (1, {"strategy": "model_parallel", "devices": 2, "cuts": (2, 1)}),
}


@pytest.mark.parametrize(
    ("way", "name", "base"),
    [
        ("ddp", "wide mixtral", "nf4"),
        ("pipeline", "wide mixtral", "nf4"),
        ("pipeline", "wide qwen3_moe", "nf4"),
        ("pipeline", "wide mixtral", "int8"),
        ("model_parallel", "wide qwen3_moe", "nf4"),
    ],
)
def test_a_mixture_with_packed_experts(crew, family, chat_data, valid_data, tmp_path, way, name, base):
    """Adapters on attention, router and experts; the experts' bytes and scales stay what they were."""
    options = {**crew.HARD, "lora__r": 4, "data__valid": str(valid_data), "base": base}
    options |= {"model": family(name, 3), "data": chat_data, "method": "qlora" if base == "nf4" else "lora"}
    ranks, how = MIXTURES[way]
    if (name, base) not in PACKED:
        [PACKED[name, base]] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    wanted = PACKED[name, base]
    answers = crew.run(tmp_path / "n", ranks, crew.train, folder=tmp_path / "run", **options, **how)
    assert sum("experts" in weight for weight in wanted["weights"]) == 3 * 4  # A and B, of two stacks
    weights = {}
    for answer in answers:
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["frozen"]
        weights |= answer["weights"]
    assert crew.far(weights, wanted["weights"]) <= 1e-5
