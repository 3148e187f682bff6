"""Memory runs out at some moment of a run: it goes on with less at a time, and computes what it would have computed."""

import json

import pytest
import torch

from kitaeru.engine import run as engine
from kitaeru.engine.ladder import RUNG, Rung, lower
from kitaeru.engine.memory import out_of_memory
from kitaeru.engine.preflight import preflight, worst_examples
from kitaeru.engine.run import prepare, train
from kitaeru.errors import SteppedDownError, TrainingError
from kitaeru.events import Evaluated, Preflight, RunStarted, Step, SteppedDown, read
from kitaeru.plan.types import Layout, Plan

FAR = {"rel": 1e-6}


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def too_large(made, step, most, *, training=True):
    """No micro-batch of more than `most` tokens passes once `step` steps are done."""

    def look(_, __, arguments):
        model = made.trainee.model
        if model.training == training and made.loop.progress.step >= step and arguments["input_ids"].numel() > most:
            fail()

    made.trainee.causal_lm.model.register_forward_pre_hook(look, with_kwargs=True)


def once(made, step):
    """A function that fails the first time it is called after `step` steps."""
    left = [1]

    def look(*_):
        if made.loop.progress.step == step and left:
            left.clear()
            fail()

    return look


@pytest.fixture
def start(training, tiny_model, chat_data, valid_data, tmp_path):
    def make(name, **changes):
        options = {"train__max_steps": 5, "train__eval_every": 2, "data__valid": str(valid_data), **changes}
        return training.Training(tmp_path / name, tiny_model, chat_data, micro_batch_tokens=256, **options)

    return make


@pytest.fixture
def whole(start):
    """The same run with nothing going wrong."""
    made = start("whole")
    made.run()
    return made


def stepped(made):
    return [e for e in made.events if isinstance(e, SteppedDown)]


def validations(made):
    return [e.loss for e in made.events if isinstance(e, Evaluated)]


def same(made, whole):
    assert made.losses == pytest.approx(whole.losses, **FAR)
    assert validations(made) == pytest.approx(validations(whole), **FAR)
    assert [s.tokens for s in made.steps] == [s.tokens for s in whole.steps]
    theirs = whole.weights()
    apart = [(value - theirs[name]).norm() / theirs[name].norm() for name, value in made.weights().items()]
    assert max(apart) < 1e-4


def test_a_forward_pass_that_does_not_fit(start, whole):
    made = start("made")
    too_large(made, 2, 100)
    assert made.run() == "finished"
    same(made, whole)
    assert [(e.step, e.micro_batch_tokens, e.planned_micro_batch_tokens) for e in stepped(made)] == [
        (2, 128, 256),
        (2, 64, 256),
    ]
    assert made.trainee.plan.layout.micro_batch_tokens == 64
    assert json.loads((made.folder / RUNG).read_text())["planned"] == "single/lora/keep/256"


def test_a_backward_pass_that_fails_halfway(start, whole):
    made = start("made")
    made.trainee.named[len(made.trainee.named) // 2][1].register_hook(once(made, 3))
    assert made.run() == "finished"
    same(made, whole)
    assert [(e.step, e.micro_batch_tokens) for e in stepped(made)] == [(3, 128)]


def test_a_validation_that_does_not_fit(start, whole):
    made = start("made")
    too_large(made, 2, 128, training=False)
    assert made.run() == "finished"
    same(made, whole)
    assert [(e.step, e.micro_batch_tokens) for e in stepped(made)] == [(2, 128)]


def test_other_errors_are_no_business_of_it(start):
    made = start("made")

    def break_down(*_):
        raise RuntimeError("shapes do not match")

    made.trainee.causal_lm.model.register_forward_pre_hook(break_down)
    with pytest.raises(RuntimeError, match="shapes"):
        made.run()
    assert stepped(made) == []


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_running_out(error, is_one):
    assert out_of_memory(error) is is_one


# --- before training ---


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw_8bit", "lion"])
def test_trying_the_largest_micro_batch_changes_nothing(start, optimizer):
    plain = start("plain", train__optimizer=optimizer, lora__dropout=0.1)
    tried = start("tried", train__optimizer=optimizer, lora__dropout=0.1)
    before, state = tried.weights(), torch.random.get_rng_state()
    preflight(tried.loop)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tried.weights().items())
    assert not tried.trainee.optimizer.state
    plain.run()
    tried.run()
    assert tried.losses == plain.losses
    assert all(torch.equal(value, plain.weights()[name]) for name, value in tried.weights().items())
    [event] = [e for e in tried.events if isinstance(e, Preflight)]
    longest = int(tried.data.train.lengths.max())
    assert 256 >= event.tokens > 256 - longest
    assert event.peak_bytes > 0


def test_the_worst_micro_batch_is_as_large_as_any_to_come(start):
    made = start("made")
    corpus, lengths = made.data.train, made.data.train.lengths
    worst = worst_examples(corpus, 256, packing=True)
    assert lengths[worst].max() == lengths.max()
    assert 256 - lengths.min() < lengths[worst].sum() <= 256
    largest = max(max(made.loop._split(made.loop.sampler.next()).tokens) for _ in range(40))
    assert lengths[worst].sum() > largest - lengths.min()
    assert lengths[worst_examples(corpus, 256, packing=False)].tolist() == [lengths.max()]
    assert lengths[worst_examples(corpus, 4096, packing=True, most=100)].sum() <= 100


def test_it_steps_down_before_training_too(start, whole):
    made = start("made")
    too_large(made, 0, 100)
    preflight(made.loop)
    assert made.trainee.plan.layout.micro_batch_tokens == 64
    made.run()
    same(made, whole)


# --- a whole run ---


@pytest.fixture
def wish(training, tiny_model, chat_data, in_tmp):
    def make(output, **changes):
        options = {
            "train__max_steps": 5,
            "train__save_every": 2,
            "limits__micro_batch_tokens": 256,
            "limits__device": "cpu",
            "samples__count": 0,
            "output": output,
        }
        return training.make_recipe(tiny_model, chat_data, "lora", **{**options, **changes})

    return make


@pytest.fixture(scope="module")
def expected(training, tiny_model, chat_data, tmp_path_factory):
    """The losses of the same run with nothing going wrong."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = {"train__max_steps": 5, "limits__micro_batch_tokens": 256, "limits__device": "cpu", "samples__count": 0}
    train(prepare(training.make_recipe(tiny_model, chat_data, "lora", output=str(folder), **options)), [])
    return losses(folder)


@pytest.fixture
def watched(monkeypatch):
    """Hands every loop that a run makes to a function."""

    def attach(function):
        ready = engine._ready

        def look(*arguments):
            trainee, loop = ready(*arguments)
            function(type("Made", (), {"trainee": trainee, "loop": loop}))
            return trainee, loop

        monkeypatch.setattr(engine, "_ready", look)

    return attach


def losses(folder):
    return {e.step: e.loss for e in read(folder / "events.jsonl") if isinstance(e, Step)}


def test_where_smaller_does_not_help_activations_are_computed_again(wish, in_tmp, watched, expected):
    built = []

    def attach(made):
        built.append(made.trainee.plan.layout)
        if built[-1].activations == "keep":
            too_large(made, 3, 0)

    watched(attach)
    train(prepare(wish("run")), [])
    assert losses(in_tmp / "run") == pytest.approx(expected, **FAR)
    assert [layout.policy for layout in built] == ["keep", "keep-recompute1", "recompute"]
    events = list(read(in_tmp / "run" / "events.jsonl"))
    # It was saved after step 3 and goes on from there, not from the checkpoint of step 2.
    assert [e.resumed_step for e in events if isinstance(e, RunStarted)] == [0, 3, 3]
    last = [e for e in events if isinstance(e, SteppedDown)][-1]
    assert (last.step, last.activations, last.planned_activations) == (3, "recompute", "keep")
    assert Plan.load(in_tmp / "run" / "plan.json").layout.activations == "keep"  # what was planned stays on record


def test_an_optimizer_that_fails_goes_back_to_the_checkpoint(wish, in_tmp, watched, expected):
    attached = []

    def attach(made):
        if not attached:
            attached.append(made)
            made.trainee.optimizer.register_step_pre_hook(once(made, 3))

    watched(attach)
    train(prepare(wish("run")), [])
    assert losses(in_tmp / "run") == pytest.approx(expected, **FAR)
    events = list(read(in_tmp / "run" / "events.jsonl"))
    assert [e.resumed_step for e in events if isinstance(e, RunStarted)] == [0, 2]
    assert [e.micro_batch_tokens for e in events if isinstance(e, SteppedDown)] == [128]


def test_a_resumed_run_stays_on_its_rung(wish, in_tmp, watched):
    seen = []

    def attach(made):
        seen.append(made.trainee.plan.layout.micro_batch_tokens)
        too_large(made, 1, 128)

    watched(attach)
    train(prepare(wish("run", train__max_steps=2)), [])
    again = prepare(wish("run", train__max_steps=2), resume=True)
    assert again.plan.layout.micro_batch_tokens == 128
    train(again, [])
    assert seen == [256, 128]
    told = [e.micro_batch_tokens for e in read(in_tmp / "run" / "events.jsonl") if isinstance(e, SteppedDown)]
    assert told == [128, 128]  # when it happened, and when it went on
    smaller = prepare(wish("run", train__max_steps=2, limits__micro_batch_tokens=64), resume=True)
    assert smaller.plan.layout.micro_batch_tokens == 64  # planned otherwise now: the rung is another plan's


def test_there_is_an_end_to_it(wish, watched):
    watched(lambda made: too_large(made, 1, 0))
    with pytest.raises(TrainingError, match="no smaller way") as caught:
        train(prepare(wish("run")), [])
    assert not isinstance(caught.value, SteppedDownError)


def test_what_goes_to_ram_is_in_no_graph():
    planned = Layout("single", "lora", "none", "bf16", "keep", 256, "cuda", arithmetic="fp8", graphs=True)
    rungs = [planned]
    while (found := lower(rungs[-1], longest=256, packing=True, layers=8)) is not None:
        rungs.append(found)
        kept = Rung(planned.name, 256, planned.policy, 256, found.activations, 0, found.recomputed)
        assert kept.layout(planned) == found
    assert [(rung.policy, rung.graphs) for rung in rungs] == [
        ("keep", True), ("keep-recompute4", True), ("recompute", True), ("offload", False),
    ]  # fmt: skip
