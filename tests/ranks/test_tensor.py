"""Tensor parallel is the same training: losses and weights of the single process, in fp32 to 1e-5."""

from __future__ import annotations

import pytest
import torch

STEPS = 6
# Accumulation, micro-batches of uneven length, packing, clipping that bites, decay, dropout, noise.
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


def far(ours, theirs):
    """The largest relative difference, tensor by tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-6)) for n in theirs)


@pytest.mark.parametrize(
    ("name", "method", "ranks", "how"),
    [
        ("llama", "lora", 2, {}),
        ("llama", "full", 2, {}),
        ("qwen3", "lora", 2, {"activations": "recompute"}),
        ("qwen3", "full", 2, {}),
        ("qwen3", "pretrain", 2, {}),
        ("gemma", "lora", 2, {}),
        ("gemma", "full", 2, {"activations": "recompute"}),
        ("biased", "lora", 4, {}),
        ("biased", "full", 4, {}),
        ("llama", "lora", 4, {"replicas": 2}),
        ("qwen3", "full", 4, {"replicas": 2}),
    ],
)
def test_same_losses_and_weights(crew, family, chat_data, valid_data, tmp_path, name, method, ranks, how):
    lora = LORA if method == "lora" else {}
    options = {**HARD, **lora, "data__valid": str(valid_data), "model": family(name), "data": chat_data}
    options |= {"method": method}
    if name == "biased":  # gradients of nearly nought, of which Adam makes steps as large as any, differ by rounding
        options["train__epsilon"] = 1e-5
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    place = {"folder": tmp_path / "many", "strategy": "tensor"}
    answers = crew.run(tmp_path / "n", ranks, crew.train, **place, **options, **how)
    assert min(wanted["norms"]) > HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert far(answer["weights"], wanted["weights"]) <= 1e-5
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        assert answer["frozen"]
        assert answer["numbers"] < wanted["numbers"]  # each rank has a part
