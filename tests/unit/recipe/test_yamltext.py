"""A recipe written out reads back equal, whatever is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitaeru.errors import RecipeError
from kitaeru.recipe.fields import FieldSpec, leaves, table
from kitaeru.recipe.read import read
from kitaeru.recipe.types import Recipe
from kitaeru.recipe.yamltext import inline, parse, to_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    [
        "null",
        "no",
        "1",
        "1e5",
        "~",
        "",
        "-",
        "a: b",
        "#x",
        ".5",
        "._1",
        "...",
        "---",
        "=",
        "<<",
        "あ　い",
        "a\nb",
        "\x85",
        "\ufeff",
        "😀",
    ]
)


def values(spec: FieldSpec) -> st.SearchStrategy[Any]:
    """Legal values of a field."""
    low = next((limit for sign, limit in spec.bounds if sign in (">", "≥")), None)
    high = next((limit for sign, limit in spec.bounds if sign in ("<", "≤")), None)
    signs = {sign for sign, _ in spec.bounds}
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "text": TEXTS,
        "whole": st.integers(int(low or 0), int(high) if high is not None else 10**12),
        "flag": st.booleans(),
        "choice": st.sampled_from(spec.choices or ("",)),
        "list": st.lists(TEXTS, min_size=1, max_size=3),
        "mapping": st.dictionaries(TEXTS, TEXTS, max_size=3),
        "number": st.floats(
            low, high, allow_nan=False, allow_infinity=False, exclude_min=">" in signs, exclude_max="<" in signs
        ),
    }
    return (st.none() | kinds[spec.kind]) if spec.nullable else kinds[spec.kind]


def sources() -> st.SearchStrategy[list[dict[str, Any]]]:
    fields = {spec.name: values(spec) for path, spec in table().items() if path.startswith("data.train.")}
    optional = {name: fields[name] for name in fields if name != "path"}
    return st.lists(st.fixed_dictionaries({"path": fields["path"]}, optional=optional), min_size=1, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    out: dict[str, Any] = {"model": {"name": draw(TEXTS)}, "data": {"train": draw(sources())}}
    for spec in draw(st.lists(st.sampled_from(leaves()), unique=True, max_size=12)):
        if spec.path == "preset":
            value: Any = draw(st.sampled_from([None, "quick", "thorough", "low-memory"]))
        else:
            value = draw(sources() if spec.kind == "sources" else values(spec))
        *sections, name = spec.path.split(".")
        inner = out
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return Recipe.model_validate(out)


@settings(max_examples=150)
@given(recipe=recipes())
def test_round_trip(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round", numbered=True)
    path = folder / "recipe.yaml"
    (folder / "plan.json").touch()  # a run folder: paths are taken as they stand
    path.write_text(to_yaml(recipe), encoding="utf-8", newline="")
    try:
        back = read(path).recipe
    except RecipeError as error:
        # The property is about writing: a combination that `checks` refuses may be refused, a value that came back
        # wrong may not.
        tree = parse(path.read_text(encoding="utf-8"), "")
        if tree.problems:
            raise AssertionError(tree.problems) from error
        back = Recipe.model_validate(_without_nulls(tree.values))
    assert _plain(back) == _plain(recipe)


def _without_nulls(value: Any) -> Any:
    return {k: _without_nulls(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _plain(recipe: Recipe) -> Recipe:
    """`~` in front of a path is the home folder once it has been read."""
    return Recipe.model_validate(_expanded(recipe.model_dump()))


def _expanded(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _expanded(v, k) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_expanded(v, name) for v in value]
    paths = name in ("path", "name", "tokenizer", "chat_template")
    return (
        str(Path(value).expanduser())
        if paths and isinstance(value, str) and (value == "~" or value.startswith("~/"))
        else value
    )


SCALARS = TEXTS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    value=st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
    )
)
def test_inline_is_yaml_of_the_same_value(value: Any) -> None:
    tree = parse(inline(value), "")
    assert not tree.problems
    assert tree.values == value
    assert type(tree.values) is type(value)


def test_origins_stand_beside_the_values(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: bundled\ndata: {train: a.jsonl}\npreset: quick\n")
    effective = read(path, overrides=["train.seed=3"])
    text = to_yaml(effective.recipe, effective.origins)
    assert "  seed: 3  # --set\n" in text
    assert "  count: 2  # preset quick\n" in text
    assert f"  name: bundled  # {path}:1\n" in text
    assert "  beta1: 0.9\n" in text
    path.write_text(text)
    assert read(path).recipe == effective.recipe
