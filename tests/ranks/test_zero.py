"""ZeRO through DeepSpeed's engine is the same training, and its checkpoints are everybody's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("deepspeed", reason="the extra is not installed: pip install 'kitaeru[deepspeed]'")

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
        assert far(answer["weights"], wanted["weights"]) <= 1e-5
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        assert answer["frozen"]
    # Each rank has a share of what is trained.
    assert sum(answer["numbers"] for answer in answers) == wanted["numbers"]
