"""JapaneseModel: answers in every way, wherever its weights lie; what it cannot be is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kitaeru import JapaneseModel, TrainingResult, load_lora_model
from kitaeru.errors import ModelError, UsageError
from kitaeru.export.chat import open_chat
from kitaeru.model.generate import Sampling


@pytest.fixture(scope="module")
def model(bundled: Path) -> JapaneseModel:
    return JapaneseModel("bundled")


def test_importing_imports_no_torch() -> None:
    program = """
import sys
import kitaeru
from kitaeru import *
assert "kitaeru.api" in sys.modules
model = JapaneseModel("bundled", load_in_4bit=True)
config = MultiGPUTrainingConfig(strategy="ddp", max_memory_per_gpu={0: "22GB", 1: "22GB"})
AdvancedMultiGPUTrainer(model, config, lora=LoRAConfig(r=8)); QuantizationOptimizer("bundled")
assert len(model.list_supported_models()) > 20
assert not {"torch", "transformers", "peft", "datasets"} & sys.modules.keys()
assert all(hasattr(kitaeru, name) for name in kitaeru.__all__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_answers(model: JapaneseModel) -> None:
    said = model.generate_japanese("自己紹介をしてください。", max_new_tokens=12)
    assert said
    assert (
        said == "".join(model.generate_japanese("自己紹介をしてください。", streaming=True, max_new_tokens=12)).strip()
    )
    with_input = model.generate_japanese("要約してください。", "日本で一番高い山は富士山です。", max_new_tokens=12)
    assert with_input == model.generate_japanese(
        "要約してください。\n\n日本で一番高い山は富士山です。", max_new_tokens=12
    )
    assert model.generate("日本の首都は", max_new_tokens=4) != model.generate_japanese("日本の首都は", max_new_tokens=4)
    with pytest.raises(UsageError, match="temprature"):
        model.generate("a", temprature=1.0)


def test_a_conversation_is_remembered(model: JapaneseModel) -> None:
    first = model.chat("こんにちは。", max_new_tokens=6)
    second = model.chat("もう一度。", max_new_tokens=6)
    model.reset_chat()
    assert model.chat("こんにちは。", max_new_tokens=6, streaming=False) == first
    assert "".join(model.chat("もう一度。", streaming=True, max_new_tokens=6)).strip() == second
    model.reset_chat()


def test_known_models_come_by_size() -> None:
    sizes = [parameters for _, parameters in JapaneseModel.list_supported_models()]
    assert sizes == sorted(sizes)
    assert sizes[0] < 10**9 < 10**11 < sizes[-1]


def test_a_fallback_is_taken_and_named(tiny_model: Path, tmp_path: Path) -> None:
    model = JapaneseModel(tmp_path / "none").load_with_fallback([tmp_path, tiny_model])
    assert model.model_name == str(tiny_model)
    with pytest.raises(ModelError) as caught:
        JapaneseModel(tmp_path / "none").load_with_fallback([tmp_path])
    assert f"{tmp_path / 'none'}:" in str(caught.value)
    assert f"{tmp_path}:" in str(caught.value)


def test_parts_on_disk_answer_the_same(tiny_model: Path, tmp_path: Path, trained: TrainingResult) -> None:
    def answered(model: JapaneseModel) -> torch.Tensor:
        ids = model.tokenizer("富士山は", return_tensors="pt")["input_ids"]
        return model.model(ids.to("cpu")).logits

    room: dict[int | str, int | str] = {"cpu": "4.4MB"}  # of 4.5
    with pytest.raises(ModelError, match="does not fit"):
        JapaneseModel(tiny_model, max_memory=room).load_model()
    on_disk = JapaneseModel(tiny_model, offload_folder=tmp_path, max_memory=room)
    assert "disk" in on_disk.model.hf_device_map.values()
    assert answered(on_disk).equal(answered(JapaneseModel(tiny_model)))
    assert on_disk.generate("富士山は", max_new_tokens=4) == JapaneseModel(tiny_model).generate(
        "富士山は", max_new_tokens=4
    )
    tuned = load_lora_model(on_disk, trained.path)
    assert answered(tuned).allclose(answered(trained.model()), atol=1e-6)
    four = JapaneseModel(tiny_model, load_in_4bit=True, offload_folder=tmp_path, max_memory=room | {"cpu": "1MB"})
    assert answered(four).allclose(answered(JapaneseModel(tiny_model, load_in_4bit=True)), atol=1e-5)
    assert list(tmp_path.glob("tiny-nf4-fp32-*/layer-0001.safetensors"))


def test_a_run_whose_layers_came_from_disk_is_talked_to(trained: TrainingResult, tmp_path: Path) -> None:
    """As a run that fitted nowhere else leaves it."""
    shutil.copytree(trained.folder, tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    plan["chosen"]["layout"]["variant"] = "disk"
    plan["recipe"]["limits"]["offload_folder"] = str(tmp_path / "offload")
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    chat = open_chat(str(tmp_path / "run"))
    chat.sampling = Sampling(max_new_tokens=6)
    said = "".join(chat.say(chat.voices[0], "3番は?"))
    assert said.strip() == trained.model().generate_japanese("3番は?", max_new_tokens=6)
    assert list((tmp_path / "offload").glob("*/layer-0001.safetensors"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "both"),
        ({"load_in_8bit": True, "offload_folder": "x"}, "8 bits"),
        ({"torch_dtype": torch.int8}, "int8"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        JapaneseModel("bundled", **values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16"])
def test_arithmetic_by_any_name(dtype: Any, tiny_model: Path) -> None:
    model = JapaneseModel(tiny_model, torch_dtype=dtype, gradient_checkpointing=True)
    assert model.model.dtype == torch.bfloat16
    assert model.model.model.layers[0].gradient_checkpointing
    first = model.model
    assert model.load_model() is first
    model.unload()
    assert model.load_model() is not first
