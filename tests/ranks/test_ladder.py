"""Memory runs out on one of two ranks: both come down, and the run computes what it would have computed."""

from __future__ import annotations

import pytest

from kitaeru.engine.hosts import Leader
from kitaeru.engine.launch import launch
from kitaeru.engine.place import Nodes
from kitaeru.engine.run import prepare, train
from kitaeru.errors import SteppedDownError
from kitaeru.events import RunFinished, RunStarted, Step, SteppedDown, read
from kitaeru.hardware import Hardware

OPTIONS = {"train__max_steps": 5, "train__eval_every": 2, "train__global_batch_tokens": 300}


@pytest.fixture(scope="module")
def whole(crew, family, chat_data, valid_data, tmp_path_factory):
    """The same run on one process with nothing going wrong."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = {"folder": folder / "run", "model": family("llama"), "data": chat_data, "method": "lora"}
    [answer] = crew.run(
        folder, 1, crew.train, micro_batch_tokens=64, data__valid=str(valid_data), **arguments, **OPTIONS
    )
    return answer


@pytest.mark.parametrize(("where", "step"), [("forward", 2), ("backward", 3), ("validation", 2)])
def test_ddp_does_the_step_again(crew, family, chat_data, valid_data, whole, tmp_path, where, step):
    arguments = {"folder": tmp_path / "run", "model": family("llama"), "data": chat_data, "method": "lora"}
    options = {"data__valid": str(valid_data), "micro_batch_tokens": 128, "strategy": "ddp", **OPTIONS}
    answers = crew.run(tmp_path, 2, crew.runs_out, rank=1, where=where, step=step, **arguments, **options)
    for answer in answers:
        assert answer["left"] == []  # it did fail
        assert answer["outcome"] == "finished"
        assert answer["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert answer["valid"] == pytest.approx(whole["valid"], rel=1e-6)
        assert answer["sizes"] == [64]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp_goes_on_from_its_last_checkpoint(training, family, chat_data, in_tmp, crew, method):
    """The other rank waits in the middle of the pass for weights: only a new start gets it out of there."""

    def wish(output, **changes):
        options = {"limits__device": "cpu", "samples__count": 0, "train__save_every": 1, "output": output, **changes}
        return training.make_recipe(family("llama"), chat_data, method, **OPTIONS, **options)

    train(prepare(wish("whole", limits__micro_batch_tokens=64, limits__devices=1)), [])
    prepare(wish("run", limits__micro_batch_tokens=128, limits__devices=2, strategy="fsdp"))
    with Leader(Nodes(), Hardware(), print) as leader:
        team = leader.meet(in_tmp / "run", 2, resume=False, restarts=0)
        with pytest.raises(SteppedDownError, match="step 3"):
            launch(in_tmp / "run", crew.fails_once, (str(in_tmp / "run"), 2), team)
        team = leader.meet(in_tmp / "run", 2, resume=True, restarts=0)
        assert launch(in_tmp / "run", crew.fails_once, (str(in_tmp / "run"), 2), team) == "finished"
    events = list(read(in_tmp / "run" / "events.jsonl"))
    ours = {e.step: e.loss for e in events if isinstance(e, Step)}
    theirs = {e.step: e.loss for e in read(in_tmp / "whole" / "events.jsonl") if isinstance(e, Step)}
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert [e.resumed_step for e in events if isinstance(e, RunStarted)] == [0, 2]
    assert [(e.step, e.micro_batch_tokens) for e in events if isinstance(e, SteppedDown)] == [(2, 64)]
    assert [e.outcome for e in events if isinstance(e, RunFinished)] == ["finished"]
