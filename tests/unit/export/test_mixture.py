"""A mixture trained with its experts in 4 bits, and what is written of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from kitaeru import JapaneseModel, LoRAFinetuningTrainer, TrainingConfig
from kitaeru.errors import ModelError
from kitaeru.export import merge, quantize
from kitaeru.export.chat import open_chat
from kitaeru.model.experts import PackedExperts
from kitaeru.recipe.types import ModelSection


@pytest.fixture(scope="module")
def mixture(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "model"
    config = MixtralConfig(
        vocab_size=16384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=256, sliding_window=None,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    return folder


def test_trained_merged_and_talked_to(mixture: Path, tmp_path: Path) -> None:
    recipe = {"limits.device": "cpu", "samples.count": 0, "track.tensorboard": False}
    config = TrainingConfig(max_steps=2, max_length=32, output_dir=tmp_path / "run", recipe=recipe)
    model = JapaneseModel(mixture, load_in_4bit=True)
    LoRAFinetuningTrainer(model, None, config).train(["吾輩は猫である。", "名前はまだ無い。"] * 4)
    done = merge.export_merged(tmp_path / "run", tmp_path / "merged")
    assert done.into == "trained"
    assert done.apart < 1e-3
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(mixture).state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    assert 0.01 < (whole[name] - before[name]).norm() / before[name].norm() < 0.2  # as its 4 bits stand for
    chat = open_chat(str(tmp_path / "run"))
    assert any(isinstance(module, PackedExperts) for module in chat.voices[0].model.modules())


def test_there_is_no_file_for_packed_experts(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file format"):
        quantize.quantize(ModelSection(name=str(mixture)), 4, tmp_path / "four")
    assert not (tmp_path / "four").exists()
    [whole, *_, four] = quantize.benchmark(ModelSection(name=str(mixture)))
    layers = whole.weight_bytes - 2 * 4 * 16384 * 64
    assert four.weight_bytes - 2 * 4 * 16384 * 64 < 0.25 * layers
