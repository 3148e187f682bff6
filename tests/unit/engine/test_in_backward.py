"""Weights that change in the backward pass: the numbers of the usual way, with a gradient at a time."""

import math

import pytest
import torch
from torch import nn

from kitaeru.engine import run as engine
from kitaeru.engine.in_backward import InBackward
from kitaeru.engine.optim import build_optimizer, optimizer_state, set_rate
from kitaeru.engine.preflight import preflight
from kitaeru.engine.run import prepare, train
from kitaeru.engine.same_run import compare
from kitaeru.errors import SteppedDownError, TrainingError
from kitaeru.events import Preflight, Step, SteppedDown
from kitaeru.recipe.types import TrainSection

OPTIMIZERS = ("adamw", "adamw_16bit", "adamw_8bit", "lion", "adafactor")


@pytest.fixture
def start(training, tiny_model, chat_data, tmp_path):
    def make(name, method="full", **changes):
        options = {"train__max_grad_norm": 0.0, "train__weight_decay": 0.1, "micro_batch_tokens": 256, **changes}
        return training.Training(tmp_path / name, tiny_model, chat_data, method, **options)

    return make


def same(one, other):
    theirs = other.weights()
    assert all(torch.equal(value, theirs[name]) for name, value in one.weights().items())
    assert one.losses == other.losses
    assert [s.grad_norm for s in one.steps] == pytest.approx([s.grad_norm for s in other.steps], rel=1e-6)
    assert [s.learning_rate for s in one.steps] == [s.learning_rate for s in other.steps]


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 160), nn.LayerNorm(160), nn.Linear(160, 64))


def loss_of(model, step):
    ids = torch.arange(step, step + 8) % 32
    return (model(ids) @ model[0].weight.T).square().mean()  # the table is read twice


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_the_same_steps(name):
    section = TrainSection(optimizer=name, weight_decay=0.1)
    runs = []
    for early in (False, True):
        model = module()
        named = list(model.named_parameters())
        optimizer = build_optimizer(named, section, learning_rate=1e-2, lora_plus_ratio=None, device_type="cpu")
        in_backward, norms = InBackward(optimizer, named) if early else None, []
        for step in range(4):
            set_rate(optimizer, 1 - step / 4)
            if in_backward is None:
                loss_of(model, step).backward()
                norms.append(float(nn.utils.get_total_norm([p.grad.double() for p in model.parameters()])))
                optimizer.step()
                optimizer.zero_grad()
            else:
                with in_backward.doing("step"):
                    loss_of(model, step).backward()
                norms.append(float(in_backward.norm()))
                assert in_backward.alive() == {name for name, _ in named}
            assert all(p.grad is None for p in model.parameters())
        runs.append((dict(named), optimizer_state(optimizer, named), norms))
    (weights, state, norms), (others, other_state, other_norms) = runs
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert all(torch.equal(tensor, other_state[0][key]) for key, tensor in state[0].items())
    assert state[1] == other_state[1]
    assert norms == pytest.approx(other_norms, rel=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("full", {"precision": "bf16", "activations": "recompute", "train__optimizer": "adamw_8bit"}),
        ("full", {"precision": "bf16", "activations": "recompute", "arithmetic": "fp8"}),
        ("qlora", {"arithmetic": "int8", "lora__plus_ratio": 4.0}),
        ("lora", {"lora__dora": True, "lora__modules_to_save": ["embed_tokens"]}),
    ],
)
def test_runs_end_in_the_same_weights(start, method, options):
    usual, early = start("usual", method, **options), start("early", method, step_in_backward=True, **options)
    usual.run()
    preflight(early.loop)
    early.run()
    assert len(early.losses) == 4
    same(early, usual)


def test_a_gradient_at_a_time_is_there(start):
    """Bytes of gradients that any parameter has, after each has come."""
    most = {}
    for name, early in (("usual", False), ("early", True)):
        made = start(name, step_in_backward=early)
        seen = most.setdefault(name, [])

        def count(_, made=made, seen=seen):
            seen.append(sum(p.grad.nbytes for _, p in made.trainee.named if p.grad is not None))

        for _, parameter in made.trainee.named:
            parameter.register_post_accumulate_grad_hook(count)
        made.run()
    weights = sum(parameter.nbytes for _, parameter in made.trainee.named)
    assert max(most["usual"]) == weights
    assert max(most["early"]) == 0


def test_a_resumed_run_is_the_same(start):
    whole = start("whole", step_in_backward=True, train__save_every=2)
    whole.run()
    again = start("again", step_in_backward=True, train__save_every=2)
    again.loop.restore(whole.folder / "checkpoints" / "step-00000002")
    again.run()
    assert again.losses == whole.losses[2:]
    assert all(torch.equal(value, whole.weights()[name]) for name, value in again.weights().items())
    without = start("without", train__save_every=2, train__step_in_backward=False)
    without.loop.restore(whole.folder / "checkpoints" / "step-00000002")
    without.run()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in without.weights().items())
    told = {"recipe": whole.recipe.model_dump(mode="json")}
    compare(told, {"recipe": without.recipe.model_dump(mode="json")})


def test_a_rehearsal_moves_nothing(start):
    made = start("made", step_in_backward=True)
    before = made.weights()
    preflight(made.loop)
    assert all(torch.equal(value, before[name]) for name, value in made.weights().items())
    assert not made.trainee.optimizer.state
    assert [e.tokens for e in made.events if isinstance(e, Preflight)] != []


def spoil(made, step, where):
    """The loss (or the gradient of the first layer alone) of a step is not a number."""
    calls, loss_sum = [], made.trainee.held.unit.loss_sum

    def spoiled(batch):
        calls.append(batch)
        loss = loss_sum(batch)
        return loss * math.nan if len(calls) == step and where == "loss" else loss

    made.trainee.held.unit.loss_sum = spoiled
    if where == "gradient":
        norm = made.trainee.causal_lm.model.layers[0].input_layernorm

        def late(_, __, output):
            output.register_hook(lambda gradient: gradient * (math.nan if len(calls) == step else 1.0))

        norm.register_forward_hook(late)


def test_a_loss_that_is_not_a_number_changes_nothing(start):
    made = start("made", step_in_backward=True, train__save_every=2)
    spoil(made, 3, "loss")
    seen, save = {}, made.loop.save
    made.loop.save = lambda: (save(), seen.update(made.weights()))
    with pytest.raises(TrainingError, match="step 3: The loss") as caught:
        made.run()
    assert "last checkpoint is untouched" in str(caught.value)
    assert all(torch.equal(seen[name], value) for name, value in made.weights().items())


def test_a_spike_is_skipped_before_it_changes_anything(start):
    made = start("made", step_in_backward=True, train__on_spike="skip")
    made.loop.watch.restore([0.01] * 10)
    before = made.weights()
    made.run()
    assert [s.skipped for s in made.steps] == [True] * 4
    assert all(math.isfinite(s.grad_norm) and s.grad_norm > 0 for s in made.steps)
    assert all(torch.equal(value, before[name]) for name, value in made.weights().items())


def test_a_gradient_that_is_not_a_number_ends_the_run_and_names_the_checkpoint(start):
    made = start("made", step_in_backward=True, train__save_every=2)
    spoil(made, 4, "gradient")
    with pytest.raises(TrainingError, match=r"step 4: The loss .* or the gradient norm \(nan\)") as caught:
        made.run()
    assert "step-00000002" in str(caught.value.remedy)
    assert "train.step_in_backward=false" in str(caught.value.remedy)
    assert [path.name for path in sorted((made.folder / "checkpoints").glob("step-*"))] == ["step-00000002"]
    again = start("again", train__save_every=2)
    again.loop.restore(made.folder / "checkpoints" / "step-00000002")
    assert again.run() == "finished"


def test_a_tensor_without_a_gradient_stops_the_first_step(start):
    made = start("made", "lora", step_in_backward=True)
    inner = made.trainee.causal_lm.model.layers[1].self_attn.k_proj
    inner.forward = inner.base_layer.forward
    with pytest.raises(TrainingError, match=r"step 1: 1 of 28 .*layers\.1\.self_attn\.k_proj\.lora_B"):
        made.run()


@pytest.mark.parametrize("backward", [False, True])
def test_memory_that_runs_out(start, backward):
    """In a forward pass nothing has changed, and fewer activations are kept; in a backward pass weights have."""
    made = start("made", step_in_backward=True, train__save_every=1)
    left = [1]

    def fail(*_):
        if made.loop.progress.step == 2 and left:
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    table = made.trainee.causal_lm.model.embed_tokens
    if backward:
        made.trainee.causal_lm.model.layers[0].input_layernorm.weight.register_post_accumulate_grad_hook(fail)
    else:
        table.register_forward_pre_hook(fail)
    before = {}
    save = made.loop.save
    made.loop.save = lambda: (save(), before.update(made.weights()))
    with pytest.raises(SteppedDownError):
        made.run()
    moved = [name for name, value in made.weights().items() if not torch.equal(before[name], value)]
    assert bool(moved) == backward
    assert not [e for e in made.events if isinstance(e, SteppedDown)]
    assert made.loop.ladder.rung.recomputed == 1


def test_from_a_recipe_to_a_result(training, tiny_model, chat_data, tmp_path, monkeypatch):
    """The whole engine, and memory that runs out in a backward pass: it goes on from the last checkpoint."""
    ends = []
    for name, early in (("usual", False), ("early", True)):
        wish = training.make_recipe(
            tiny_model,
            chat_data,
            "full",
            output=str(tmp_path / name),
            train__max_grad_norm=0.0,
            train__step_in_backward=early,
            train__save_every=1,
            samples__count=0,
        )
        run = prepare(wish)
        assert run.plan.layout.step_in_backward == early
        events, left = [], [1] * early
        build = engine.build

        def built(*arguments, left=left, events=events, build=build):
            trainee = build(*arguments)

            def fail(*_):
                if left and len([e for e in events if isinstance(e, Step)]) == 2:
                    left.clear()
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

            trainee.causal_lm.model.layers[0].input_layernorm.weight.register_post_accumulate_grad_hook(fail)
            return trainee

        monkeypatch.setattr(engine, "build", built)
        train(run, [events.append])
        monkeypatch.setattr(engine, "build", build)
        ends.append([e.loss for e in events if isinstance(e, Step)])
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)
