"""`python -m kitaeru train` as a person starts it: what is there afterwards, what is said, and what never appears."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from kitaeru.events import DataReady, Evaluated, RunFinished, RunStarted, Sample, Step
from kitaeru.plan.types import Plan
from kitaeru.recipe.read import read

TOKEN = "hf_secretsecretsecretsecretsecret"


@pytest.fixture(scope="module")
def finished(new_folder, tmp_path_factory):
    """A run of the real program in a fresh interpreter, with a token in its environment, resumed once."""
    folder = new_folder(
        tmp_path_factory.mktemp("train"),
        train__max_steps=6,
        train__eval_every=2,
        train__save_every=2,
        track__tensorboard=True,
        samples__max_new_tokens=8,
    )
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN}
    done = []
    for more in ((), ("--resume",)):
        command = [sys.executable, "-m", "kitaeru", "train", "recipe.yaml", "--plain", *more]
        done.append(
            subprocess.run(command, cwd=folder.path, env=environment, capture_output=True, text=True, timeout=120)
        )
    return folder, done


def test_the_program_ends_well_and_says_where_everything_is(finished):
    _, (first, second) = finished
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    for word in ("step 6", "run/adapter", "run/report.html", "validation loss", "before", "after"):
        assert word in first.stdout, word
    assert "Traceback" not in first.stdout + first.stderr
    assert "Warning" not in first.stderr


def test_the_run_folder_holds_everything(finished):
    folder, _ = finished
    names = {path.name for path in folder.run.iterdir() if not path.name.startswith(".")}
    assert names == {
        "recipe.yaml",
        "plan.json",
        "events.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
        "report.html",
    }
    again = read(folder.run / "recipe.yaml").recipe
    assert again.train.max_steps == 6
    assert again.lora.dropout == 0.1
    plan = Plan.load(folder.run / "plan.json")
    assert plan.layout.micro_batch_tokens == 64
    assert plan.recipe.train.learning_rate == 5e-3
    assert plan.chosen.peak_bytes > 0
    page = (folder.run / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    board = EventAccumulator(str(folder.run / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"]


def test_the_events_tell_the_whole_story(finished):
    folder, _ = finished
    [first, second] = [json.loads(x) for x in folder.log.read_text().splitlines() if '"run_started"' in x]
    assert (first["resumed_step"], second["resumed_step"]) == (0, 6)
    started = folder.events(RunStarted)[0]
    assert (started.method, started.strategy, started.max_steps) == ("lora", "single", 6)
    assert 0 < started.trainable_parameters < started.total_parameters
    assert {"python", "torch", "transformers", "peft"} <= started.environment.keys()
    assert {d.split for d in folder.events(DataReady)} == {"train", "valid"}
    steps = folder.events(Step)
    assert [s.step for s in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert 0 < step.trained_tokens < step.tokens <= 192
        assert step.learning_rate > 0
        assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
        assert step.peak_bytes > 100e6
        assert step.grad_norm > 0
    assert [e.step for e in folder.events(Evaluated)] == [0, 2, 4, 6]
    assert folder.events(RunFinished)[-1].outcome == "finished"


def test_samples_are_taken_before_and_after(finished):
    folder, _ = finished
    samples = folder.events(Sample)
    assert {s.step for s in samples} == {0, 6}
    assert len({s.prompt for s in samples}) == 1
    assert samples[0].prompt in (folder.path / "valid.jsonl").read_text()


def test_a_token_never_appears(finished):
    folder, done = finished
    for process in done:
        assert TOKEN not in process.stdout + process.stderr
    for path in folder.run.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_the_adapter_is_on_the_model_it_names(finished, tiny_model):
    folder, _ = finished
    config = json.loads((folder.run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, folder.run / "adapter")
    assert any(bool(p.any()) for n, p in adapted.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("method", ["full", "pretrain", "qlora"])
def test_the_other_methods_leave_what_they_promise(method, new_folder, tmp_path):
    folder = new_folder(tmp_path, method=method, train__max_steps=3, train__neftune_alpha=None)
    if method != "qlora":
        folder.recipe.pop("lora")
        folder.write()
    folder.train()
    result = folder.run / ("adapter" if method == "qlora" else "model")
    assert folder.events(RunFinished)[-1].result == str(result.relative_to(folder.path))
    if method == "qlora":
        assert folder.adapter()
    else:
        AutoModelForCausalLM.from_pretrained(result)


def test_the_best_checkpoint_is_the_result_and_is_kept(new_folder, tmp_path):
    """At a high rate validation soon rises; one checkpoint is kept besides the best."""
    folder = new_folder(
        tmp_path,
        train__learning_rate=0.3,
        train__schedule="constant",
        train__eval_every=3,
        train__save_every=3,
        train__max_steps=24,
        train__keep_checkpoints=1,
    )
    folder.train()
    losses = {e.step: e.loss for e in folder.events(Evaluated)}
    finished = folder.events(RunFinished)[-1]
    assert finished.best_step == min((loss, step) for step, loss in losses.items() if step)[1] < 24
    assert folder.checkpoints() == [f"step-{finished.best_step:08d}", "step-00000024"]
    from safetensors.torch import load_file

    best = load_file(folder.run / "checkpoints" / f"step-{finished.best_step:08d}" / "state.safetensors")
    for name, tensor in load_file(folder.run / "adapter" / "adapter_model.safetensors").items():
        stored = best["model/" + name.replace(".weight", ".default.weight")]
        assert bool((stored == tensor).all()), name
    last = new_folder(tmp_path / "last", train__keep_best=False, train__max_steps=3)
    last.train()
    assert last.events(RunFinished)[-1].best_step == 3


def test_a_model_with_code_of_its_own_is_refused(new_folder, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    folder = new_folder(tmp_path / "work", model=str(model))
    said = folder.train(code=1)
    assert "model.trust_remote_code=true" in said
    assert "Traceback" not in said
    assert not (tmp_path / "ran").exists()


def test_a_known_family_that_brings_code_runs_none_of_it(new_folder, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    folder = new_folder(tmp_path / "work", model=str(model), train__max_steps=1)
    folder.start().wait()
    assert not (tmp_path / "ran").exists()


def test_weights_in_pickles_are_refused(new_folder, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    said = new_folder(tmp_path / "work", model=str(model)).train(code=1)
    assert "pickles" in said
    assert ".safetensors" in said
