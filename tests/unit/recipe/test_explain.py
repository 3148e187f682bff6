"""Explanations, examples and the table of fields, for every field there is."""

from __future__ import annotations

import pytest

from kitaeru.errors import UsageError
from kitaeru.recipe import messages
from kitaeru.recipe.explain import explain
from kitaeru.recipe.fields import FieldSpec, example, table
from kitaeru.recipe.read import read
from kitaeru.recipe.types import TrainSection
from kitaeru.recipe.yamltext import parse


@pytest.mark.parametrize("path", table())
def test_every_field_is_explained(path: str) -> None:
    it = explain(path)
    assert it.path == path
    assert it.description.endswith((".", "`)."))
    assert it.type
    assert bool(it.fields) == (table()[path].kind in ("section", "sources"))


@pytest.mark.parametrize("spec", [spec for spec in table().values() if not spec.item], ids=lambda spec: spec.path)
def test_every_example_is_a_valid_recipe(spec: FieldSpec) -> None:
    """Put where it belongs, the example reads, and it says something other than the default."""
    line = parse(example(spec), "").values
    section = spec.path.rpartition(".")[0]
    if spec.path == "data.train":
        section = ""
    if spec.path == "model.name":
        line, section = {"model": line}, ""
    values = {"model": "bundled", "data.train": "a.jsonl"}
    if spec.name == "early_stop":
        values["data.valid"] = "b.jsonl"
    if spec.name == "ds_config":
        values["strategy"] = "zero2"
    at = {f"{section}.{name}" if section else name: value for name, value in line.items()}
    if spec.path == "strategy":
        at = {"strategy": "single"}
    before = read(None, values=values).recipe
    after = read(None, values={**values, **at}).recipe
    assert after != before or spec.path in ("model", "data", "data.train", "strategy")


def test_a_field_in_full() -> None:
    it = explain("train.beta1")
    assert (it.type, it.default, it.example) == ("a number, ≥ 0, < 1", "0.9", "beta1: 0.95")
    assert explain("train.precision").type == "one of auto, bf16, fp16, fp32"
    assert explain("train.learning_rate").default == "left open: decided for you"
    assert explain("model.name").default == "none: it must be given"


def test_a_section_lists_its_fields_and_no_path_lists_all() -> None:
    assert [name for name, _ in explain("train").fields] == list(TrainSection.model_fields)
    assert [name for name, _ in explain().fields][:3] == ["model", "data", "method"]


def test_unknown_field() -> None:
    with pytest.raises(UsageError, match=r"Did you mean `train\.learning_rate`"):
        explain("train.learning_rat")
    with pytest.raises(UsageError, match="Here it is `seq_len` under `data`"):
        explain("max_seq_length")


def test_names_of_other_tools_lead_to_fields_that_exist() -> None:
    names = {spec.name for spec in table().values()}
    for alias, path in messages.ALIASES.items():
        assert path in table(), alias
        assert alias not in names or table()[path].item, f"{alias} is a name of ours"
