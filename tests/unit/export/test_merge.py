"""A run's adapter as a whole model: it answers as base and adapter do, or it is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kitaeru import JapaneseModel, LoRAConfig, LoRAFinetuningTrainer, TrainingConfig, TrainingResult
from kitaeru.cli import main
from kitaeru.errors import ModelError, UsageError
from kitaeru.export import merge

ROWS = [{"instruction": f"{i}番は?", "output": f"{i}番です。"} for i in range(16)]


def run_of(folder: Path, model: Path, **lora: Any) -> TrainingResult:
    recipe = {"limits.device": "cpu", "samples.count": 1, "samples.max_new_tokens": 2, "track.tensorboard": False}
    config = TrainingConfig(
        max_steps=4, max_length=64, learning_rate=2e-2, batch_size=8, output_dir=folder, recipe=recipe
    )
    return LoRAFinetuningTrainer(model, LoRAConfig(r=4, **lora), config).train(ROWS)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return run_of(tmp_path_factory.mktemp("merge") / "lora", tiny_model)


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return run_of(tmp_path_factory.mktemp("merge") / "qlora", tiny_model, use_qlora=True)


def logits(model: JapaneseModel) -> torch.Tensor:
    ids = model.tokenizer("3番は?", return_tensors="pt")["input_ids"]
    return model.model(ids).logits.detach()


def test_merged_by_command(run: TrainingResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run.folder), "--to", "merged", "-o", str(tmp_path / "whole"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["apart"] < 1e-3
    assert logits(JapaneseModel(tmp_path / "whole")).allclose(logits(run.model()), atol=1e-4)
    assert not logits(JapaneseModel(tmp_path / "whole")).allclose(
        logits(JapaneseModel(run.plan.recipe.model.name)), atol=1e-2
    )
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "- lora" in card
    assert "train.jsonl" in card
    assert main(["export", str(run.folder), "-o", str(tmp_path / "whole")]) == 2


def test_a_base_in_4_bits_is_merged_as_it_was_trained(packed: TrainingResult, tmp_path: Path) -> None:
    trained = merge.export_merged(packed.folder, tmp_path / "trained")
    original = merge.export_merged(packed.folder, tmp_path / "original", "original")
    assert (trained.into, original.into) == ("trained", "original")
    assert trained.apart < 1e-3 < original.apart
    assert logits(JapaneseModel(tmp_path / "trained")).allclose(logits(packed.model()), atol=1e-3)


def test_the_adapter_alone(run: TrainingResult, tmp_path: Path) -> None:
    done = merge.export_adapter(run.folder, tmp_path / "adapter")
    theirs, ours = (load_file(f / "adapter_model.safetensors") for f in (run.path, done.folder))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert "library_name: peft" in (done.folder / "README.md").read_text()


def test_a_merge_that_answers_otherwise_is_not_kept(
    run: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a library merges with another scale than it trained with."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    real = merge.load_to_answer

    def spoil_after_reading(*given: Any, **named: Any) -> Any:
        if named["base"] == "none" and (folder / "twice").exists():
            weights = load_file(folder / "adapter" / "adapter_model.safetensors")
            spoilt = {name: 3 * w if "lora_B" in name else w for name, w in weights.items()}
            save_file(spoilt, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
        (folder / "twice").touch()
        return real(*given, **named)

    monkeypatch.setattr(merge, "load_to_answer", spoil_after_reading)
    with pytest.raises(ModelError, match="answer otherwise"):
        merge.export_merged(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run folder"):
        merge.export_merged(tmp_path, tmp_path / "out")
    (tmp_path / "plan.json").touch()
    with pytest.raises(UsageError, match="no finished result"):
        merge.export_adapter(tmp_path, tmp_path / "out")
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="every weight"):
        merge.export_merged(tmp_path, tmp_path / "out")
