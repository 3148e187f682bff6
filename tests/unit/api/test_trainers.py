"""The trainers: from a model, a config and texts to a recipe, and from that to a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from peft import PeftModel
from torch import distributed
from transformers import AutoModelForCausalLM

from kitaeru import (
    AdvancedMultiGPUTrainer,
    FullFinetuningTrainer,
    JapaneseModel,
    LoRAConfig,
    LoRAFinetuningTrainer,
    MultiGPUTrainingConfig,
    TrainingConfig,
    TrainingResult,
    load_lora_model,
)
from kitaeru.errors import CheckpointError, DataError, ModelError, RecipeError, UsageError

ROWS = [{"instruction": f"{i}番は?", "output": f"{i}番です。"} for i in range(8)]


pytestmark = pytest.mark.usefixtures("in_tmp")


def test_a_run_learns_and_says_so(trained: TrainingResult) -> None:
    metrics = trained.metrics
    assert trained.outcome == "finished"
    assert metrics["steps"] == 4
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_bytes"] > 10**8
    assert trained.plan.recipe.train.global_batch_examples == 8
    assert trained.adapter_path == trained.path
    assert trained.report_path.stat().st_size > 10_000
    assert json.loads((trained.folder / "data" / "train.jsonl").read_text().splitlines()[0])["output"] == "0番です。"


def test_the_result_answers_as_peft_does(trained: TrainingResult, tiny_model: Path) -> None:
    ours = trained.model()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    theirs = PeftModel.from_pretrained(base, str(trained.path))
    ids = ours.tokenizer("1番は?", return_tensors="pt")["input_ids"]
    assert ours.model(ids).logits.allclose(theirs(ids).logits, atol=1e-5)
    plain = JapaneseModel(tiny_model).model(ids).logits
    assert not ours.model(ids).logits.allclose(plain, atol=1e-3), "an adapter that changes nothing"
    assert load_lora_model(tiny_model, trained.folder).adapter == trained.path


def test_a_run_goes_on_where_it_was(trained: TrainingResult, tiny_model: Path, small: Any, tmp_path: Path) -> None:
    def trainer(steps: int) -> LoRAFinetuningTrainer:
        config = small(tmp_path / "run", max_steps=steps, save_steps=1, warmup_steps=0, lr_scheduler_type="constant")
        return LoRAFinetuningTrainer(tiny_model, LoRAConfig(r=4), config)

    first = trainer(2).train(ROWS)
    with pytest.raises(UsageError, match="already holds a run"):
        trainer(4).train(ROWS)
    oldest = sorted((first.folder / "checkpoints").iterdir())[0]
    with pytest.raises(CheckpointError, match="newest"):
        trainer(4).train(ROWS, resume_from_checkpoint=oldest)
    second = trainer(4).train(ROWS, resume_from_checkpoint=first.folder)
    assert second.metrics["steps"] == 4
    assert second.history.started is not None
    assert second.history.started.resumed_step == 2


def test_all_weights_are_trained(tiny_model: Path, small: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run", max_steps=1, learning_rate=1e-3)
    result = FullFinetuningTrainer(tiny_model, config).train(["吾輩は猫である。名前はまだ無い。"] * 4)
    assert result.plan.layout.method == "full"
    assert result.adapter_path is None
    assert result.path.name == "model"
    assert result.plan.recipe.data.train[0].kind == "text"
    assert isinstance(result.model().generate("吾輩は", max_new_tokens=2), str)


# ---- what a recipe is made of --------------------------------------------------------------------------------------


def advanced(model: Any = "bundled", lora: LoRAConfig | None = None, **config: Any) -> AdvancedMultiGPUTrainer:
    return AdvancedMultiGPUTrainer(model, MultiGPUTrainingConfig(**config), lora)


def test_the_reports_own_lines(tmp_path: Path) -> None:
    """The four settings of the optimisation report, as recipes (strategies that are not built are refused there)."""
    memory = {0: "22GB", 1: "22GB"}
    ddp = advanced(strategy="ddp", batch_size=8, gradient_accumulation_steps=4, max_memory_per_gpu=memory)
    recipe = ddp.recipe(ROWS, output=tmp_path)
    assert (recipe.strategy, recipe.train.global_batch_examples, recipe.limits.devices) == ("ddp", 64, 2)
    assert recipe.limits.memory_gb == 22.0
    qlora = LoRAConfig(use_qlora=True, qlora_4bit=True, r=8)
    recipe = advanced(lora=qlora, max_memory_per_gpu=memory).recipe(ROWS, output=tmp_path)
    assert (recipe.method, recipe.model.quantize, recipe.lora.r) == ("qlora", "nf4", 8)
    model = JapaneseModel("bundled", load_in_4bit=True, device_map="auto", offload_folder="./offload")
    recipe = LoRAFinetuningTrainer(model).recipe(ROWS, output=tmp_path)
    assert (recipe.method, recipe.limits.offload_folder) == ("qlora", "offload")
    assert FullFinetuningTrainer("bundled", TrainingConfig(fp16=True)).recipe(ROWS).train.precision == "fp16"


def test_a_model_says_where_and_how(tmp_path: Path) -> None:
    model = JapaneseModel(
        "bundled", "cpu", torch_dtype="bfloat16", use_flash_attention=False, gradient_checkpointing=True,
        max_memory={"cpu": "9GB"},
    )  # fmt: skip
    recipe = LoRAFinetuningTrainer(model).recipe(ROWS, output=tmp_path)
    assert (recipe.limits.device, recipe.train.precision, recipe.model.attention) == ("cpu", "bf16", "sdpa")
    assert (recipe.limits.checkpointing, recipe.limits.ram_gb) == (True, 9.0)
    gpus = JapaneseModel("bundled", max_memory={0: "20GB", 1: "20GB"})
    recipe = LoRAFinetuningTrainer(gpus).recipe(ROWS, output=tmp_path)
    assert (recipe.limits.devices, recipe.limits.memory_gb) == (2, 20.0)
    config = MultiGPUTrainingConfig(max_memory_per_gpu={0: "10GB"})
    assert LoRAFinetuningTrainer(gpus, None, config).recipe(ROWS, output=tmp_path).limits.memory_gb == 10.0


def test_the_recipe_has_the_last_word(tmp_path: Path) -> None:
    mapping = TrainingConfig(seed=1, recipe={"train.seed": 2, "train": {"neftune_alpha": 5.0}})
    recipe = LoRAFinetuningTrainer("bundled", None, mapping).recipe(ROWS, output=tmp_path)
    assert (recipe.train.seed, recipe.train.neftune_alpha) == (2, 5.0)
    flags = TrainingConfig(batch_size=8, recipe=["limits.devices=2", "strategy=ddp"])
    recipe = LoRAFinetuningTrainer("bundled", None, flags).recipe(ROWS, output=tmp_path)
    assert recipe.train.global_batch_examples == 16
    with pytest.raises(RecipeError, match=r"Python: train.lerning_rate"):
        LoRAFinetuningTrainer("bundled", None, TrainingConfig(recipe={"train.lerning_rate": 1.0})).recipe(ROWS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FullFinetuningTrainer(JapaneseModel("bundled", load_in_4bit=True)), "4 or 8 bits"),
        (lambda: AdvancedMultiGPUTrainer("bundled", None, LoRAConfig(), method="full"), "every weight"),
        (lambda: LoRAFinetuningTrainer(JapaneseModel("m", load_in_8bit=True), LoRAConfig(use_qlora=True)), "int8"),
        (lambda: LoRAFinetuningTrainer(3), "int is no model"),  # type: ignore[arg-type]
        (lambda: FullFinetuningTrainer("bundled", {"lr": 1}), "dict is no config"),  # type: ignore[arg-type]
        (lambda: FullFinetuningTrainer("bundled").train(ROWS, resume_from_checkpoint=True), "which run"),
        (lambda: LoRAFinetuningTrainer(JapaneseModel("m", {"a": 0})).train(ROWS), "strategy="),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_a_script_that_has_made_its_own_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="process group already"):
            LoRAFinetuningTrainer("bundled", None, TrainingConfig(output_dir=tmp_path / "run")).train(ROWS)
    finally:
        distributed.destroy_process_group()


def test_a_method_without_a_config() -> None:
    four = JapaneseModel("bundled", load_in_4bit=True)
    assert AdvancedMultiGPUTrainer(four).recipe(ROWS).method == "qlora"
    assert AdvancedMultiGPUTrainer("bundled").recipe(ROWS).method == "auto"
    assert AdvancedMultiGPUTrainer("bundled", method="full").recipe(ROWS).method == "full"


# ---- what is learnt from -----------------------------------------------------------------------------------------


def test_data_in_every_form(tmp_path: Path) -> None:
    trainer = LoRAFinetuningTrainer("bundled")
    named = trainer.recipe("my.jsonl", output=tmp_path).data.train[0]
    assert (named.path, (tmp_path / "data").exists()) == ("my.jsonl", False)
    table = trainer.recipe(Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2]), output=tmp_path)
    assert [len(Path(s[0].path).read_text().splitlines()) for s in (table.data.train, table.data.valid)] == [8, 2]
    texts = trainer.recipe((f"文{i}" for i in range(3)), output=tmp_path).data.train[0]
    assert Path(texts.path).read_text().splitlines()[2] == '{"text": "文2"}'


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "not one example"),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "one split"),
        (7, "nothing to train on"),
        (["a", {"text": "b"}], "Example 2 is a dict"),
        ([3], "Example 1 is a int"),
        ([{"text": b"x"}], "JSON"),
    ],
)
def test_data_that_is_none(given: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        LoRAFinetuningTrainer("bundled").recipe(given)


def test_no_adapter_there(tmp_path: Path, tiny_model: Path, trained: TrainingResult) -> None:
    with pytest.raises(ModelError, match="adapter_config"):
        load_lora_model("bundled", tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        load_lora_model("bundled", trained.path).load_model()
    with pytest.raises(UsageError, match="as it is"):
        LoRAFinetuningTrainer(trained.model()).train(ROWS)
