"""A whole run from Python: prepare, then train; events in order; failures leave a trace."""

import dataclasses
import json
import re

import pytest
import torch

from kitaeru.engine import run as engine
from kitaeru.engine.run import fingerprints, prepare, run_folder, train
from kitaeru.errors import DataError, MissingLibraryError, ModelError, TrainingError, UsageError
from kitaeru.events import Notice, RunFinished, Step, read
from kitaeru.parallel import zero


@pytest.fixture
def wish(training, tiny_model, chat_data, valid_data, in_tmp):
    def make(**changes):
        options = {
            "data__valid": str(valid_data),
            "train__max_steps": 3,
            "limits__threads": 1,
            "limits__device": "cpu",
            "samples__count": 1,
            "samples__max_new_tokens": 2,
            "output": "run",
        }
        return training.make_recipe(tiny_model, chat_data, changes.pop("method", "lora"), **{**options, **changes})

    return make


def test_events_come_in_order_and_listeners_hear_what_the_log_holds(wish, in_tmp):
    heard, phases = [], []
    result = train(prepare(wish(), phase=lambda *p: phases.append(p)), [heard.append], lambda *p: phases.append(p))
    assert (result.outcome, result.step, result.folder.name) == ("finished", 3, "run")
    assert list(read(in_tmp / "run" / "events.jsonl")) == heard
    names = [type(e).__name__ for e in heard]
    assert names[:5] == ["RunStarted", "DataReady", "DataReady", "Preflight", "Sample"]
    assert names[-2:] == ["Sample", "RunFinished"]
    assert [e.step for e in heard if isinstance(e, Step)] == [1, 2, 3]
    assert {"tokenising", "Loading the model", "Making the optimizer"} <= {p[0] for p in phases}


def test_a_failure_is_the_last_event_and_tells_where(wish, in_tmp):
    run = prepare(wish(train__learning_rate=1e30, method="full"))
    with pytest.raises(TrainingError):
        train(run, [])
    *_, notice, finished = read(in_tmp / "run" / "events.jsonl")
    assert isinstance(notice, Notice)
    assert (notice.level, "not finite" in notice.text) == ("error", True)
    assert isinstance(finished, RunFinished)
    assert finished.outcome == "failed"
    assert finished.step == len([e for e in read(in_tmp / "run" / "events.jsonl") if isinstance(e, Step)]) > 0
    assert not (in_tmp / "run" / "model").exists()


def test_frozen_weights_that_change_spoil_the_run(wish, in_tmp):
    run = prepare(wish())
    models = []

    def flip(event):
        if isinstance(event, Step) and event.step == 2:
            with torch.no_grad():
                models[0].model.layers[1].mlp.up_proj.base_layer.weight.view(-1).view(torch.uint8)[9] ^= 1

    with pytest.MonkeyPatch.context() as patch:
        build = engine.build

        def remember(*arguments, **named):
            trainee = build(*arguments, **named)
            models.append(trainee.causal_lm)
            return trainee

        patch.setattr(engine, "build", remember)
        with pytest.raises(TrainingError, match="Frozen weights changed"):
            train(run, [flip])
    assert not (in_tmp / "run" / "adapter").exists()
    assert (in_tmp / "run" / "checkpoints" / "step-00000003").exists()


def test_a_listener_that_fails_is_a_failed_run(wish, in_tmp):
    def fail(event):
        if isinstance(event, Step):
            raise RuntimeError("broken pen")

    with pytest.raises(RuntimeError, match="broken pen"):
        train(prepare(wish()), [fail])
    assert [e.step for e in read(in_tmp / "run" / "events.jsonl") if isinstance(e, Step)] == [1]


def test_bad_requests_leave_no_run_behind(wish, in_tmp):
    with pytest.raises(DataError):
        prepare(wish(data__train="nowhere.jsonl"))
    with pytest.raises(ModelError):
        prepare(wish(model__name="./nowhere"))
    with pytest.raises(UsageError, match="does not know which run"):
        prepare(wish(output=None), resume=True)
    assert not (in_tmp / "run").exists()


def test_what_deepspeed_is_told_is_in_the_run_folder(wish, in_tmp):
    pytest.importorskip("deepspeed")
    own = in_tmp / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 4096}}))
    asked = {"strategy": "zero2", "limits__devices": 2, "limits__ds_config": str(own)}
    run = prepare(wish(**asked))
    assert run.plan.layout.way == "zero2"
    told = json.loads((run.folder / "ds_config.json").read_text())
    assert told["zero_optimization"]["stage"] == 2
    assert told["zero_optimization"]["reduce_bucket_size"] == 4096
    assert told["train_batch_size"] == 2
    own.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": -1}}))
    with pytest.raises(UsageError, match="DeepSpeed refuses"):
        prepare(wish(output="other", **asked))
    assert not (in_tmp / "other" / "plan.json").exists()


def test_deepspeed_that_is_missing_is_named_with_the_command(wish, in_tmp, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda _: None)
    with pytest.raises(MissingLibraryError) as caught:
        prepare(wish(strategy="zero3"))
    assert "pip install 'kitaeru[deepspeed]'" in caught.value.remedy


def test_a_folder_without_output_is_named_after_model_method_and_time(wish):
    folder = run_folder(wish(output=None))
    assert folder.parts[0] == "runs"
    assert re.fullmatch(r"tiny-lora-\d{8}-\d{6}", folder.name)
    assert run_folder(wish(output="here")).name == "here"


def test_fingerprints_are_of_the_wish_and_the_contents(wish, in_tmp, chat_data, training):
    run = prepare(wish())
    prints = fingerprints(run.wish, run.data)
    assert json.loads(json.dumps(prints)) == prints
    moved = in_tmp / "moved.jsonl"
    moved.write_bytes(chat_data.read_bytes())
    again = prepare(wish(data__train=str(moved), output="other"))
    assert fingerprints(again.wish, again.data)["data"] == prints["data"]
    training.write_data(moved, 23)
    other = prepare(wish(data__train=str(moved), output="third"))
    assert fingerprints(other.wish, other.data)["data"]["train"] != prints["data"]["train"]
    assert fingerprints(other.wish, other.data)["data"]["valid"] == prints["data"]["valid"]


def test_the_environment_holds_versions_and_nothing_of_the_shell(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_in_the_environment")
    found = engine.environment()
    assert {"python", "torch", "transformers", "peft", "kitaeru"} <= found.keys()
    assert "secret" not in str(found)


def test_four_bit_weights_count_as_what_they_stand_for(wish, in_tmp):
    totals = {}
    for method in ("lora", "qlora"):
        heard = []
        train(prepare(wish(method=method, output=method, train__max_steps=1)), [heard.append])
        totals[method] = dataclasses.asdict(heard[0])["total_parameters"]
    assert totals["lora"] == totals["qlora"]
