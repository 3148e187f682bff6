"""Presets: every file is listed, reads, and says nothing a preset must not say."""

from __future__ import annotations

from pathlib import Path

import pytest

import kitaeru.recipe
from kitaeru.recipe import presets
from kitaeru.recipe.fields import table
from kitaeru.recipe.yamltext import parse


def test_files_and_descriptions_are_the_same_set() -> None:
    folder = Path(kitaeru.recipe.__file__).parent / "presets"
    assert {path.stem for path in folder.iterdir()} == set(presets.PRESETS)
    with pytest.raises(KeyError):
        presets.text("../types")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_values(name: str) -> None:
    tree = parse(presets.text(name), name)
    assert not tree.problems
    assert not {"model", "preset", "output", "lora"} & set(tree.values), "these are the person's own"
    for section, values in tree.values.items():
        for field, value in values.items() if isinstance(values, dict) else [("", values)]:
            spec = table()[f"{section}.{field}".rstrip(".")]
            assert value != spec.default, f"{spec.path} is the default"
