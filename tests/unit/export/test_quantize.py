"""A model in fewer bits: what is written is what was measured, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from kitaeru import JapaneseModel, LoRAFinetuningTrainer, QuantizationOptimizer, TrainingConfig
from kitaeru.cli import main
from kitaeru.errors import ModelError, UsageError
from kitaeru.export import quantize


@pytest.fixture(scope="module")
def four(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> quantize.Quantised:
    return QuantizationOptimizer(tiny_model).quantize_to_4bit(tmp_path_factory.mktemp("bits") / "four")


def test_four_bits(four: quantize.Quantised, tiny_model: Path) -> None:
    assert 0.001 < four.apart < 0.2
    # 73,728 numbers in two layers, of 4 bytes before and half a byte now; the table keeps its width
    saved = (tiny_model / "model.safetensors").stat().st_size - four.weight_bytes
    assert saved == pytest.approx(73_728 * 3.5, rel=0.2)
    model = JapaneseModel(four.folder)
    assert any(isinstance(module, Linear4bit) for module in model.model.modules())
    assert isinstance(model.generate_japanese("こんにちは。", max_new_tokens=4), str)
    card = (four.folder / "README.md").read_text()
    assert "base_model" in card
    assert f"{four.apart:.2%}" in card


def test_an_adapter_on_it_is_qlora_only(four: quantize.Quantised, tmp_path: Path) -> None:
    recipe = {"limits.device": "cpu", "samples.count": 0, "track.tensorboard": False}
    config = TrainingConfig(max_steps=1, max_length=32, output_dir=tmp_path / "run", recipe=recipe)
    rows = ["吾輩は猫である。"] * 4
    with pytest.raises(ModelError, match="few bits already"):
        LoRAFinetuningTrainer(four.folder, None, config).train(rows)
    config.output_dir = tmp_path / "again"
    trained = LoRAFinetuningTrainer(JapaneseModel(four.folder, load_in_4bit=True), None, config).train(rows)
    assert trained.metrics["steps"] == 1


def test_eight_bits_by_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(tiny_model), "--to", "8bit", "-o", str(tmp_path / "eight")]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bits"] == 8
    assert 0 < said["apart"] < 0.05
    model = JapaneseModel(tmp_path / "eight").model
    assert any(isinstance(module, Linear8bitLt) for module in model.modules())
    assert main(words) == 2  # it is not empty
    assert "not empty" in capsys.readouterr().err


def test_a_copy_that_is_not_the_model_is_not_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = quantize.logits_of
    seen: list[torch.Tensor] = []

    def third_is_wrong(*given: Any) -> torch.Tensor:
        seen.append(real(*given))
        return seen[-1] * (1.1 if len(seen) == 3 else 1.0)

    monkeypatch.setattr(quantize, "logits_of", third_is_wrong)
    with pytest.raises(ModelError, match="do not hold"):
        QuantizationOptimizer(tiny_model).quantize_to_4bit(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_each_way_is_measured(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "NEW_TOKENS", 4)
    whole, eight, four = QuantizationOptimizer(tiny_model).benchmark_quantization(["こんにちは。"])
    assert (whole.bits, eight.bits, four.bits) == (32, 8, 4)
    assert whole.weight_bytes > eight.weight_bytes > four.weight_bytes > 16384 * 64 * 4
    assert whole.apart == 0 < eight.apart < four.apart
    assert all(m.tokens_per_second > 0 and abs(m.loss - whole.loss) < 0.1 for m in (eight, four))


def test_what_is_quantised_already(four: quantize.Quantised, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already"):
        QuantizationOptimizer(JapaneseModel("bundled", load_in_4bit=True))
    with pytest.raises(UsageError, match="already"):
        QuantizationOptimizer(four.folder).quantize_to_8bit(tmp_path / "x")
