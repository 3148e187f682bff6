"""The loss is the mean over the trained tokens of the whole global batch, however that is cut into pieces."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

STEPS = 4


@pytest.fixture(scope="module")
def run_with(training, tiny_model, chat_data, tmp_path_factory):
    """`run_with(micro, packing, **changes)`: four clipped, decayed steps; losses, norms and final weights."""
    settings_of_all = {
        "train__max_steps": STEPS,
        "train__weight_decay": 0.1,
        "train__max_grad_norm": 0.2,
        "train__warmup_steps": 1,
        "train__epsilon": 1e-3,  # else the first steps of Adam are the signs of gradients, noise of nothing included
        "train__learning_rate": 1e-2,
    }
    memory = {}

    def run(micro, packing=True, method="lora", **changes):
        key = (micro, packing, method, *sorted(changes.items()))
        if key not in memory:
            made = training.Training(
                tmp_path_factory.mktemp("law"),
                tiny_model,
                chat_data,
                method,
                micro_batch_tokens=micro,
                data__packing=packing,
                **{**settings_of_all, **changes},
            )
            made.loop.save = lambda: None  # not what is looked at here, and half of the time
            made.run()
            memory[key] = made
        return memory[key]

    return run


def assert_same(one, other):
    assert [s.trained_tokens for s in one.steps] == [s.trained_tokens for s in other.steps]
    for a, b in zip(one.steps, other.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-6)
    for (name, a), b in zip(one.weights().items(), other.weights().values(), strict=True):
        assert float((a - b).norm()) <= 1e-6 * max(1.0, float(b.norm())), name


@given(micro=st.integers(64, 4096), packing=st.booleans())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_into_micro_batches_trains_the_same(run_with, micro, packing):
    whole = run_with(4096)
    assert max(s.grad_norm for s in whole.steps) > 0.2  # clipping is at work
    assert_same(run_with(micro, packing), whole)


@pytest.mark.parametrize("micro", [64, 100])
def test_full_training_too_with_a_batch_in_examples(run_with, micro):
    changes = {"train__global_batch_examples": 7}
    whole = run_with(4096, True, "full", **changes)
    assert_same(run_with(micro, False, "full", **changes), whole)
    assert_same(run_with(micro, True, "full", **changes), whole)


def test_the_loss_is_the_mean_over_tokens_and_not_over_examples_or_micro_batches(run_with):
    made = run_with(64, True)
    fresh = run_with(64, True, train__max_steps=1)
    indices = fresh.loop.sampler.__class__(fresh.data.train, seed=0, global_batch_tokens=256).next()
    model = fresh.trainee.causal_lm
    total, count, by_example = 0.0, 0, []
    model.set_attn_implementation("eager")
    from peft import set_peft_model_state_dict  # the adapter as it was before training

    b_off = {n: torch.zeros_like(p) for n, p in fresh.trainee.model.state_dict().items() if "lora_B" in n}
    set_peft_model_state_dict(fresh.trainee.model, {n.replace(".default", ""): p for n, p in b_off.items()})
    with torch.no_grad():
        for index in indices:
            example = fresh.data.train.example(index)
            logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0].log_softmax(-1)
            losses = [
                -float(logits[t - 1, token])
                for t, (token, trained) in enumerate(zip(example.input_ids, example.trained, strict=True))
                if trained
            ]
            total, count = total + sum(losses), count + len(losses)
            by_example.append(sum(losses) / len(losses))
    assert made.steps[0].trained_tokens == count
    assert made.steps[0].loss == pytest.approx(total / count, rel=1e-6)
    assert abs(sum(by_example) / len(by_example) - total / count) > 1e-5  # the two differ here
