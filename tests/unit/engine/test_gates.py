"""What stops a run, or a step, before it does harm."""

import json
import math

import pytest
import torch
from torch import nn

from kitaeru.engine.gates import SPIKE_WINDOW, LossWatch, gradient_gate
from kitaeru.errors import TrainingError
from kitaeru.events import read
from kitaeru.parallel.start import hash_frozen
from kitaeru.recipe.types import TrainSection


def parameters(**gradients):
    """name → gradient (None, or a number to fill it with)."""
    named = []
    for name, value in gradients.items():
        parameter = nn.Parameter(torch.ones(2, 2))
        parameter.grad = None if value is None else torch.full((2, 2), float(value))
        named.append((name.replace("__", "."), parameter))
    return named


def test_gradients_that_all_arrive_pass():
    assert gradient_gate(parameters(a=1e-30, b=-2), 0) == []


@pytest.mark.parametrize("silent", [None, 0.0])
def test_a_tensor_that_gets_no_gradient_is_named(silent):
    with pytest.raises(TrainingError, match=r"step 1: 1 of 2 trained tensors got no gradient: b") as caught:
        gradient_gate(parameters(a=1, b=silent), 0)
    assert "lora.targets" in str(caught.value)


def test_a_lora_a_waits_while_its_b_is_zero_and_not_longer():
    named = parameters(q__lora_A__weight=0, q__lora_B__weight=1)
    with torch.no_grad():
        named[1][1].zero_()
    assert gradient_gate(named, 0) == []
    assert gradient_gate(named, 1) == []  # the first step may have been skipped
    with torch.no_grad():
        named[1][1].fill_(0.1)
    with pytest.raises(TrainingError, match=r"step 2: .*q\.lora_A\.weight"):
        gradient_gate(named, 1)


def test_a_silent_b_is_never_excused():
    named = parameters(q__lora_A__weight=0, q__lora_B__weight=0)
    with torch.no_grad():
        named[1][1].zero_()
    with pytest.raises(TrainingError, match=r"1 of 2 .*q\.lora_B\.weight"):
        gradient_gate(named, 0)


def test_experts_that_saw_no_token_are_told_and_do_not_stop():
    named = parameters(layers__0__experts__down_proj=None, layers__0__gate=1)
    assert gradient_gate(named, 0) == ["layers.0.experts.down_proj"]


def test_a_spike_is_told_from_the_median_and_stays_out_of_it():
    watch = LossWatch(TrainSection(spike_factor=2.0, on_spike="skip"))
    assert [watch.verdict(100.0 if i == 3 else 1.0) for i in range(10)] == ["ok"] * 10  # too few to judge
    assert watch.verdict(1.99) == "ok"
    assert watch.verdict(2.01) == "spike"
    assert 2.01 not in watch.recent
    assert watch.verdict(math.nan) == watch.verdict(math.inf) == "nan"
    assert len(watch.recent) == 11


def test_ignored_spikes_become_the_new_normal():
    watch = LossWatch(TrainSection(spike_factor=2.0, on_spike="ignore"))
    for _ in range(SPIKE_WINDOW):
        watch.verdict(1.0)
    verdicts = [watch.verdict(5.0) for _ in range(SPIKE_WINDOW)]
    assert verdicts[0] == "spike"
    assert verdicts[-1] == "ok"


def test_a_trained_module_outside_of_the_graph_stops_the_first_step(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data)
    inner = made.trainee.causal_lm.model.layers[1].self_attn.k_proj
    inner.forward = inner.base_layer.forward  # the adapter is there and nobody asks it
    with pytest.raises(TrainingError, match=r"step 1: 1 of 28 .*layers\.1\.self_attn\.k_proj\.lora_B"):
        made.run()
    assert made.steps == []
    assert not (tmp_path / "checkpoints").exists()


def test_an_a_that_never_learns_stops_the_second_step(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data)
    lora_a = made.trainee.causal_lm.model.layers[0].mlp.up_proj.lora_A["default"]
    forward = lora_a.forward
    lora_a.forward = lambda x: forward(x).detach()
    with pytest.raises(TrainingError, match=r"step 2: 1 of 28 .*layers\.0\.mlp\.up_proj\.lora_A"):
        made.run()
    assert [s.step for s in made.steps] == [1]


def poison(made, step):
    """Make the first example of the batch of `step` give a loss that is not a number; its place in the file."""
    chosen = []
    original, loss_sum = made.loop._split, made.trainee.held.unit.loss_sum

    def split(indices):
        chosen.append(indices[0])
        return original(indices)

    def poisoned(batch):
        hit = len(chosen) == step and chosen[-1] in batch.examples
        return loss_sum(batch) * (math.nan if hit else 1.0)

    made.loop._split, made.trainee.held.unit.loss_sum = split, poisoned
    return lambda: str(made.data.train.origin(chosen[step - 1]))


def test_nan_stops_and_names_the_examples(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, micro_batch_tokens=64, train__save_every=1)
    place = poison(made, 3)
    seen = {}
    save = made.loop.save

    def save_and_look():
        save()
        seen.update(made.weights())

    made.loop.save = save_and_look
    with pytest.raises(TrainingError, match="step 3: The loss") as caught:
        made.run()
    assert f"{chat_data}:" in place()
    assert place() in str(caught.value)
    assert "last checkpoint is untouched" in str(caught.value)
    assert [s.step for s in made.steps] == [1, 2]
    assert all(torch.equal(seen[n], w) for n, w in made.weights().items())
    again = training.Training(tmp_path, tiny_model, chat_data, micro_batch_tokens=64, train__save_every=1)
    again.loop.restore(tmp_path / "checkpoints" / "step-00000002")
    assert again.run() == "finished"


def test_nan_is_skipped_and_told(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, micro_batch_tokens=64, train__on_nan="skip")
    place = poison(made, 2)
    before, update = {}, made.loop._update

    def update_and_compare(loss, norm, shares, batches, index):
        before[index] = made.weights()
        return update(loss, norm, shares, batches, index)

    made.loop._update = update_and_compare
    with training.logged(tmp_path / "events.jsonl") as log:
        made.trainee.emit = lambda event: (made.hear(event), log(event))
        assert made.run() == "finished"
    assert [s.skipped for s in made.steps] == [False, True, False, False]
    assert all(torch.equal(before[1][n], before[2][n]) for n in before[1])
    assert not all(torch.equal(before[0][n], before[1][n]) for n in before[0])
    assert all(bool(torch.isfinite(w).all()) for w in made.weights().values())
    [notice] = [n for n in made.notices if n.level == "warning"]
    assert notice.step == 2
    assert place() in notice.examples
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    [skipped] = [line for line in lines if line.get("skipped")]
    assert skipped["loss"] is None
    assert math.isnan(next(e.loss for e in read(tmp_path / "events.jsonl") if getattr(e, "skipped", False)))


def test_a_first_step_that_is_skipped_does_not_trip_the_gradient_gate(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, micro_batch_tokens=64, train__on_nan="skip")
    poison(made, 1)
    assert made.run() == "finished"
    assert [s.skipped for s in made.steps] == [True, False, False, False]


def test_a_wild_learning_rate_stops_with_what_to_do(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, "full", train__learning_rate=1e30)
    with pytest.raises(TrainingError, match="not finite") as caught:
        made.run()
    assert "lower train.learning_rate" in str(caught.value)
    assert f"{chat_data}:" in str(caught.value)


@pytest.mark.parametrize("policy", ["stop", "skip", "ignore"])
def test_a_spike_is_treated_as_asked(training, tiny_model, chat_data, tmp_path, policy):
    made = training.Training(
        tmp_path,
        tiny_model,
        chat_data,
        train__on_spike=policy,
        train__spike_factor=1.5,
        train__max_steps=12,
        train__global_batch_examples=2,
        train__schedule="constant",
        train__learning_rate=1e-4,
    )
    original = made.loop._split

    def split(indices):
        batches = original(indices)
        if made.loop.progress.step == 10:  # noise instead of answers, as a broken row gives: the loss doubles
            with torch.no_grad():
                made.trainee.causal_lm.get_output_embeddings().weight.mul_(40)
        return batches

    made.loop._split = split
    if policy == "stop":
        with pytest.raises(TrainingError, match=r"step 11: The loss jumped to .*train\.jsonl:\d+"):
            made.run()
        return
    assert made.run() == "finished"
    assert made.steps[10].skipped == (policy == "skip")
    notice = next(n for n in made.notices if n.level == "warning")
    assert (notice.step, len(notice.examples)) == (11, 2)


def test_one_byte_of_a_frozen_weight_is_noticed(training, tiny_model, chat_data, tmp_path):
    for method, base in (("lora", None), ("qlora", "nf4"), ("lora", "int8")):
        made = training.Training(tmp_path / f"{method}{base}", tiny_model, chat_data, method, base=base)
        made.run()
        assert hash_frozen(made.trainee.model) == made.trainee.frozen_hash
        weight = made.trainee.causal_lm.model.layers[0].self_attn.q_proj.base_layer.weight
        with torch.no_grad():
            weight.view(-1).view(torch.uint8)[5] ^= 1
        assert hash_frozen(made.trainee.model) != made.trainee.frozen_hash
