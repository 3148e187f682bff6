"""`kitaeru bench --scaling`: real runs of every way asked for, beside their plans; what fails is a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from kitaeru.api.scaling import Bench, Row, run_row, shape_subjects, subject_of, ways, write_text
from kitaeru.cli import main
from kitaeru.cli.scaling import line_of, table_of
from kitaeru.errors import UsageError
from kitaeru.machine.probe import probe
from kitaeru.recipe.read import read
from kitaeru.shape import ModelShape


@pytest.fixture
def recipe(in_tmp: Path, tiny_model: Path, training) -> Path:
    training.write_data(in_tmp / "train.jsonl")
    values = {
        "model": str(tiny_model),
        "data": {"train": "train.jsonl", "seq_len": 64, "workers": 1},
        "method": "lora",
        "train": {"global_batch_tokens": 256, "eval_every": 1},
        "limits": {"threads": 1, "max_restarts": 2},
    }
    path = in_tmp / "recipe.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_a_way_is_measured_beside_its_plan(recipe, in_tmp, capsys):
    words = ["bench", str(recipe), "--scaling", "--only", "ddp", "--steps", "4", "-o", "s.csv"]
    assert main([*words, "--devices", "2", "--work", "work"]) == 0
    said = capsys.readouterr().out
    with (in_tmp / "s.csv").open() as file:
        alone, both = csv.DictReader(file)
    assert (alone["way"], both["way"], alone["outcome"], both["outcome"]) == ("single", "ddp", "ok", "ok")
    assert float(alone["scaling"]) == 1.0
    rates = [float(row["tokens_per_second"]) for row in (both, alone)]
    assert float(both["scaling"]) == pytest.approx(rates[0] / rates[1], rel=0.01)
    assert float(both["last_loss"]) == pytest.approx(float(alone["last_loss"]), rel=1e-4)  # it is the same training
    assert len(both["peak_gib"].split()) == len(both["predicted_gib"].split()) == len(both["idle"].split()) == 2
    assert float(both["low"]) < float(both["predicted"]) < float(both["high"])
    assert all(0 <= float(share) < 1 for share in both["idle"].split())
    assert "ddp · 2" in said
    assert "planned" in said


def test_every_way_is_a_row_with_a_recipe_or_a_reason(recipe, in_tmp):
    bench = Bench(in_tmp, devices=2, on_cpu=True)
    found = {row.way: (row, wish) for row, wish in ways(subject_of(read(recipe).recipe, bench), probe(), bench, 2)}
    row, wish = found["pipeline-1f1b"]
    assert row.outcome == ""
    assert (wish.strategy, wish.limits.variant, wish.limits.devices) == ("pipeline", "1f1b", 2)
    row, wish = found["pipeline-interleaved"]
    assert wish is None
    assert "4 stages" in row.outcome  # the model has two layers
    assert {"ddp", "fsdp", "model_parallel", "tensor"} <= set(found)
    assert all(bool(row.outcome) == (wish is None) for row, wish in found.values())


def test_a_run_that_fails_is_a_row_with_its_reason(recipe, in_tmp):
    (in_tmp / "train.jsonl").write_text('{"messages": 3}\n')
    bench = Bench(in_tmp / "work", steps=2, devices=2, on_cpu=True)
    row = Row("tiny", "lora", "single", 1)
    run_row(row, subject_of(read(recipe).recipe, bench).wish, bench)
    assert row.outcome.startswith("exit 2: ")
    assert "train.jsonl" in row.outcome
    assert row.outcome in line_of(row)
    assert table_of([row]).row_count == 2


def test_a_recipe_is_cut_short_and_otherwise_left(recipe, in_tmp):
    wish = read(recipe).recipe
    short = subject_of(wish, Bench(in_tmp, steps=5, cap_gib=24, on_cpu=True)).wish
    assert (short.train.max_steps, short.limits.memory_gb, short.limits.max_restarts) == (5, 24 * 2**30 / 1e9, 0)
    assert (short.data, short.lora, short.train.global_batch_tokens) == (wish.data, wish.lora, 256)


def test_shapes_get_random_weights_of_their_sizes(in_tmp, monkeypatch):
    known = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    known |= {"vocab_size": 16384, "model_type": "mixtral", "num_local_experts": 2, "num_hidden_layers": 4}

    class Entry:
        name = "mistralai/Mixtral-8x7B-v0.1"
        config = known

    monkeypatch.setattr("kitaeru.api.scaling.catalogue", lambda: [Entry])
    [subject] = shape_subjects("mixtral", Bench(in_tmp, layers=2, seq_len=128, batch=4))
    assert (subject.name, subject.wish.method) == ("mixtral-2", "qlora")
    assert subject.wish.train.global_batch_tokens == 512
    shape = ModelShape.from_folder(Path(subject.wish.model.name))
    assert (shape.layers, shape.hidden, shape.experts) == (2, 64, 2)
    index = json.loads((Path(subject.wish.model.name) / "model.safetensors.index.json").read_text())
    assert "model.layers.1.block_sparse_moe.experts.1.w2.weight" in index["weight_map"]  # as the Hub has it
    with pytest.raises(UsageError, match="9b"):
        next(shape_subjects("9b", Bench(in_tmp)))


def test_rows_of_text_fill_examples(in_tmp, tokenizer_folder):
    from transformers import AutoTokenizer

    path = write_text(in_tmp / "text.jsonl", 256)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    counts = [len(tokenizer(json.loads(line)["text"])["input_ids"]) for line in path.read_text().splitlines()]
    assert min(counts) > 10 * 256
