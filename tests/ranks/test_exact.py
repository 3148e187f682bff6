"""Every strategy is the same training: losses and weights of the single process, in fp32 to 1e-5."""

from __future__ import annotations

import pytest
import torch

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


def options_of(name, method, valid):
    """LoRA's own trials with it; PEFT has no dropout for the stacked experts of a mixture."""
    lora = {} if method == "full" else LORA | ({"lora__dropout": 0.0} if name == "mixtral" else {})
    return {**HARD, **lora, "data__valid": str(valid)}


@pytest.fixture(scope="session")
def reference(crew, family, chat_data, valid_data, tmp_path_factory):
    """`reference("llama", "lora")`: the same run on one process."""
    done = {}

    def get(name, method):
        if (name, method) not in done:
            folder = tmp_path_factory.mktemp("single")
            options = options_of(name, method, valid_data)
            arguments = {"folder": folder / "run", "model": family(name), "data": chat_data, "method": method}
            [answer] = crew.run(folder, 1, crew.train, **arguments, **options)
            done[name, method] = answer
        return done[name, method]

    return get


def far(ours, theirs):
    """The largest relative difference, tensor by tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-6)) for n in theirs)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "mixtral"])
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("ddp", 4), ("fsdp", 2)])
def test_same_losses_and_weights(
    crew, family, chat_data, valid_data, reference, tmp_path, name, method, strategy, ranks
):
    options = options_of(name, method, valid_data)
    arguments = {"folder": tmp_path / "run", "model": family(name), "data": chat_data, "method": method}
    answers = crew.run(tmp_path, ranks, crew.train, strategy=strategy, **arguments, **options)
    wanted = reference(name, method)
    assert wanted["steps"] == list(range(1, STEPS + 1))
    assert min(wanted["norms"]) > HARD["train__max_grad_norm"]  # clipping bites in every step
    for answer in answers:
        assert answer["tokens"] == wanted["tokens"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["valid"] == pytest.approx(wanted["valid"], rel=1e-5)
        assert answer["losses"] == answers[0]["losses"]
        assert far(answer["weights"], wanted["weights"]) <= 1e-5
        assert all(torch.equal(answer["weights"][n], answers[0]["weights"][n]) for n in answer["weights"])
        assert answer["frozen"]
    if strategy == "fsdp" and method == "full":  # and each rank holds a share
        assert sum(answer["numbers"] for answer in answers) == wanted["numbers"]
