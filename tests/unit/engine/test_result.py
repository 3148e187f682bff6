"""What a run leaves behind is complete and is what was trained, or is not there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kitaeru.engine import result
from kitaeru.engine.result import write_result
from kitaeru.errors import TrainingError


@pytest.fixture
def start(training, tiny_model, chat_data, tmp_path):
    return lambda method="lora", **changes: training.Training(tmp_path, tiny_model, chat_data, method, **changes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_takes_the_place_of_an_older_one_at_once(start, tmp_path, method):
    made = start(method)
    folder = write_result(made.trainee, tmp_path)
    (folder / "leftover").write_text("old")
    shutil.copytree(folder, tmp_path / f".{folder.name}.tmp")  # of a process that was killed
    assert write_result(made.trainee, tmp_path) == folder
    names = {p.name for p in folder.iterdir()}
    assert "leftover" not in names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert not list(tmp_path.glob(".*"))


def test_files_that_do_not_hold_what_was_trained_are_not_put_in_place(start, tmp_path):
    made = start()
    write_result(made.trainee, tmp_path)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    save = made.trainee.model.save_pretrained

    def save_wrongly(folder, **options):
        save(folder, **options)
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        tensors[sorted(tensors)[0]][0, 0] += 1e-3
        save_file(tensors, f"{folder}/adapter_model.safetensors")

    made.trainee.model.save_pretrained = save_wrongly
    with pytest.raises(TrainingError, match="do not hold what was trained"):
        write_result(made.trainee, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_missing_tensor_is_noticed_too(start, tmp_path):
    made = start()
    save = made.trainee.model.save_pretrained

    def save_less(folder, **options):
        save(folder, **options)
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        save_file(dict(sorted(tensors.items())[1:]), f"{folder}/adapter_model.safetensors")

    made.trainee.model.save_pretrained = save_less
    with pytest.raises(TrainingError, match="do not hold what was trained"):
        write_result(made.trainee, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_a_full_disk_is_a_clear_error(start, tmp_path):
    made = start()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    made.trainee.model.save_pretrained = fail
    with pytest.raises(TrainingError, match="No space left") as caught:
        write_result(made.trainee, tmp_path)
    assert "--resume" in str(caught.value)


def test_tied_weights_are_written_once(start, tmp_path):
    made = start("full")
    folder = write_result(made.trainee, tmp_path)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"
    assert made.trainee.causal_lm.config.use_cache is False  # training is not disturbed


def test_the_dtype_of_a_model_from_scratch_follows_its_precision(start, tmp_path):
    made = start("pretrain", precision="bf16")
    made.trainee.stored_dtype = None  # its config names none
    folder = write_result(made.trainee, tmp_path)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("memory", "file"),
    [
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", "base_model.model.layers.0.q_proj.lora_A.weight"),
        ("base_model.model.embed_tokens.modules_to_save.default.weight", "base_model.model.embed_tokens.weight"),
        ("base_model.model.q.lora_magnitude_vector.default.weight", "base_model.model.q.lora_magnitude_vector"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)  # fmt: skip
def test_names_in_memory_and_in_files_meet(memory, file):
    assert result._plain(memory) == result._plain(file)
