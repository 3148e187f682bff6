"""The loop: what a step does, when it validates, saves and stops, and that it goes on where it was."""

import math
import os
import signal

import pytest
import torch

from kitaeru.engine import checkpoint
from kitaeru.errors import CheckpointError, TrainingError
from kitaeru.events import Evaluated, Saved
from kitaeru.model.head import plain_loss


def kinds(made):
    return [(type(e).__name__, e.step) for e in made.events if isinstance(e, Evaluated | Saved) or hasattr(e, "tokens")]


def validations(made):
    return [e for e in made.events if isinstance(e, Evaluated)]


def with_losses(made, losses):
    """Let validation find these losses, one after another."""
    rest = iter(losses)
    made.loop.evaluate = lambda corpus: (next(rest), 10)
    return made


@pytest.fixture
def start(training, tiny_model, chat_data, valid_data, tmp_path):
    def make(method="lora", **changes):
        return training.Training(tmp_path, tiny_model, chat_data, method, data__valid=str(valid_data), **changes)

    return make


def test_it_validates_first_then_steps_validates_and_saves_when_due(start):
    made = start(train__max_steps=5, train__eval_every=2, train__save_every=3, train__keep_best=False)
    assert made.run() == "finished"
    assert kinds(made) == [
        ("Evaluated", 0),
        ("Step", 1),
        ("Step", 2),
        ("Evaluated", 2),
        ("Step", 3),
        ("Saved", 3),
        ("Step", 4),
        ("Evaluated", 4),
        ("Step", 5),
        ("Evaluated", 5),
        ("Saved", 5),
    ]


def test_the_validation_loss_is_the_mean_over_all_trained_tokens(start):
    made = start(micro_batch_tokens=64)
    loss, tokens = made.loop.evaluate(made.data.valid)
    assert tokens == made.data.valid.trained_tokens
    total = 0.0
    for index in range(len(made.data.valid)):
        example = made.data.valid.example(index)
        scores = made.logits(torch.tensor([example.input_ids]))[0].log_softmax(-1)
        for t, (token, trained) in enumerate(zip(example.input_ids, example.trained, strict=True)):
            total -= float(scores[t - 1, token]) if trained else 0.0
    assert loss == pytest.approx(total / tokens, rel=1e-6)
    few, some = made.loop.evaluate(made.data.valid), start(train__eval_max_examples=2)
    assert 0 < some.loop.evaluate(some.data.valid)[1] < few[1]


def test_validation_leaves_no_trace_in_training(start):
    often, never = start(train__eval_every=1, lora__dropout=0.2), start(lora__dropout=0.2)
    never.loop.valid = None
    often.run()
    never.run()
    assert often.losses == never.losses
    assert all(torch.equal(w, never.weights()[n]) for n, w in often.weights().items())


def test_the_best_of_the_checkpoints_is_taken_and_kept(start):
    options = {"train__max_steps": 6, "train__eval_every": 1, "train__save_every": 1, "train__keep_checkpoints": 1}
    made = with_losses(start(**options), [9.0, 8.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    at_best = {}
    save = made.loop.save

    def save_and_look():
        save()
        if made.loop.progress.step == 2:
            at_best.update(made.weights())

    made.loop.save = save_and_look
    made.run()
    assert [e.best for e in validations(made)] == [False, True, True, False, False, False, False]
    assert [p.name for p in checkpoint.available(made.loop.folder)] == ["step-00000002", "step-00000006"]
    assert not all(torch.equal(w, made.weights()[n]) for n, w in at_best.items())
    assert made.loop.take_best() == 2
    assert all(torch.equal(w, made.weights()[n]) for n, w in at_best.items())


def test_a_run_that_only_gets_worse_gives_its_best_checkpoint_and_not_its_last(start):
    made = with_losses(start(train__eval_every=1, train__save_every=1), [1.0, 5.0, 6.0, 7.0, 8.0])
    made.run()
    assert made.loop.take_best() == 1


def test_the_last_step_is_the_result_when_asked_for(start):
    made = with_losses(start(train__eval_every=1, train__keep_best=False), [1.0, 5.0, 6.0, 7.0, 8.0])
    made.run()
    assert made.loop.take_best() == 4


def test_a_validation_that_is_no_number_is_never_best(start):
    made = with_losses(start(train__eval_every=1), [9.0, math.nan, 8.0, math.nan, math.nan])
    made.run()
    assert [e.step for e in validations(made) if e.best] == [2]
    _, meta = checkpoint.load(checkpoint.available(made.loop.folder)[-1])
    assert meta["progress"]["best_step"] == 2


def test_early_stop_waits_as_long_as_asked_and_saves(start):
    options = {"train__max_steps": 9, "train__eval_every": 1, "train__save_every": 9, "train__early_stop": 2}
    made = with_losses(start(**options), [9.0, 8.0, 8.5, 7.0, 7.5, 7.0, 1.0, 1.0])
    assert made.run() == "stopped_early"
    assert made.steps[-1].step == 5
    assert checkpoint.step_of(checkpoint.available(made.loop.folder)[-1]) == 5
    again = start(**options)
    again.loop.restore(checkpoint.available(made.loop.folder)[-1])
    assert again.run() == "stopped_early"
    assert again.steps == []


def test_what_is_restored_is_all_that_matters(start):
    options = {"train__max_steps": 7, "train__save_every": 3, "train__eval_every": 2, "lora__dropout": 0.2}
    options["train__keep_checkpoints"] = 9
    whole = start(**options)
    whole.run()
    again = start(**options)
    again.loop.restore(whole.loop.folder / "step-00000003")
    assert (again.loop.progress.step, again.loop.progress.best_step) == (3, 2)
    assert again.loop.watch.recent == type(again.loop.watch.recent)(whole.losses[:3])
    again.run()
    assert again.losses == whole.losses[3:]
    assert [s.epoch for s in again.steps] == [s.epoch for s in whole.steps[3:]]
    assert [(e.step, e.loss) for e in validations(again)] == [
        (e.step, e.loss) for e in validations(whole) if e.step > 3
    ]
    assert all(torch.equal(w, again.weights()[n]) for n, w in whole.weights().items())


def test_a_checkpoint_of_another_adapter_is_refused(start, tiny_model, training, chat_data, tmp_path):
    start(lora__targets=["q_proj"]).run()
    path = checkpoint.available(tmp_path / "checkpoints")[-1]
    other = start(lora__targets=["q_proj", "v_proj"])
    with pytest.raises(CheckpointError, match=r"lora\.targets"):
        other.loop.restore(path)
    other.loop.fingerprints = checkpoint.load(path)[1]["fingerprints"]
    with pytest.raises(CheckpointError, match=r"no weights for .*v_proj"):
        other.loop.restore(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_it(start, number):
    made = start(train__max_steps=20)
    before = signal.getsignal(number)
    hear = made.trainee.emit

    def emit(event):
        hear(event)
        if getattr(event, "loss", None) and event.step == 3:
            os.kill(os.getpid(), number)

    made.trainee.emit = emit
    assert made.run() == "interrupted"
    assert made.steps[-1].step in (3, 4)
    assert checkpoint.step_of(checkpoint.available(made.loop.folder)[-1]) == made.steps[-1].step
    assert [n.text for n in made.notices if n.level == "warning"] == [
        "Stopping after this step; it is saved first. Once more stops at once."
    ]
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(start):
    made = start(train__max_steps=20)
    split = made.loop._split

    def interrupted(chosen):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return split(chosen)

    made.loop._split = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert signal.getsignal(signal.SIGINT) is before


def test_clipping_reports_the_norm_before_it_and_bounds_the_step(start):
    class Norms(list):
        def look(self, made):
            step = made.trainee.optimizer.step

            def looking(*args, **kwargs):
                total = sum(float(p.grad.double().norm()) ** 2 for _, p in made.trainee.named)
                self.append(total**0.5)
                return step(*args, **kwargs)

            made.trainee.optimizer.step = looking
            made.run()

    clipped, free = Norms(), Norms()
    small, large = start(train__max_grad_norm=0.05), start(train__max_grad_norm=0.0)
    clipped.look(small)
    free.look(large)
    assert all(norm == pytest.approx(0.05, rel=1e-4) for norm in clipped)
    assert free == pytest.approx([s.grad_norm for s in large.steps], rel=1e-5)
    assert small.steps[0].grad_norm == pytest.approx(large.steps[0].grad_norm)
    assert large.steps[0].grad_norm > 0.05


def test_an_overflow_that_never_ends_is_not_taken_for_fp16(start):
    """With a loss scaler an overflow is skipped in silence, but not when there is nothing left to scale down."""
    made = start("full", train__max_steps=40, train__eval_every=100)
    made.trainee.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = made.trainee.causal_lm.model.norm.weight
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="gradient norm"):
        made.run()
    assert [s.skipped for s in made.steps] == [True] * len(made.steps)
    assert len(made.steps) == 3  # 4, 2, 1


def test_a_scaled_loss_trains_like_an_unscaled_one(start):
    plain, scaled = start(), start()
    scaled.trainee.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain.run()
    scaled.run()
    assert scaled.losses == pytest.approx(plain.losses, rel=1e-6)
    assert [s.grad_norm for s in scaled.steps] == pytest.approx([s.grad_norm for s in plain.steps], rel=1e-5)


def test_the_loss_function_may_be_any(start):
    ours, plain = start(), start()
    plain.trainee.held.unit.loss_sum = plain_loss(plain.trainee.causal_lm)
    ours.run()
    plain.run()
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
