"""Estimated lengths against those that are really trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kitaeru.data.estimate import LOOKED_AT, estimate_facts
from kitaeru.recipe.types import Recipe

ASSETS = Path(__file__).parents[3] / "src" / "kitaeru" / "assets"


def recipe(*sources: object, **data: object) -> Recipe:
    return Recipe.model_validate({"model": "bundled", "data": {"train": list(sources), **data}})


def test_the_quickstart_s_data_as_it_is_tokenised() -> None:
    from kitaeru.data.prepare import prepare
    from kitaeru.model.tokenizer import load_tokenizer

    wish = recipe(str(ASSETS / "quickstart" / "train.jsonl"))
    exact = prepare(wish, load_tokenizer(wish.model), seq_len=512, bad_rows=None).facts
    found = estimate_facts(wish, 512, ASSETS / "bundled" / "tokenizer.json")
    assert found.examples == exact.examples
    assert found.tokens == pytest.approx(exact.tokens, rel=0.1)
    assert found.longest == pytest.approx(exact.longest, rel=0.1)
    guessed = estimate_facts(wish, 512)
    assert guessed.tokens == pytest.approx(exact.tokens, rel=0.8)


def test_a_long_file_is_looked_at_and_scaled(tmp_path: Path) -> None:
    rows = 3 * LOOKED_AT
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 40}) + "\n" for _ in range(rows)))
    found = estimate_facts(recipe(str(path)), 2048)
    assert found.examples == pytest.approx(rows, rel=0.01)
    assert found.tokens == pytest.approx(rows * found.longest, rel=0.01)
    assert estimate_facts(recipe(str(path), max_examples=100), 2048).examples == 100
    half = estimate_facts(recipe({"path": str(path), "weight": 0.5}, valid_fraction=0.1), 2048)
    assert half.examples == pytest.approx(rows * 0.45, rel=0.01)
    assert half.valid_examples == pytest.approx(rows * 0.05, rel=0.01)


def test_long_examples_count_as_cut(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("あ" * 5000 + "\n")
    assert estimate_facts(recipe(str(path)), 256).longest == 256
