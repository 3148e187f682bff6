"""Reading a recipe: defaults, then a preset, then the file, then what the command line says; and where each came from.

Layers are merged before anything is validated, and everything that is wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kitaeru.errors import Problem, RecipeError
from kitaeru.i18n import tr
from kitaeru.recipe.checks import check
from kitaeru.recipe.fields import leaves
from kitaeru.recipe.layers import (
    Layer,
    Origin,
    OriginKind,
    file_layer,
    override_layer,
    place,
    place_sources,
    preset_layer,
    preset_name,
    values_layer,
)
from kitaeru.recipe.messages import describe
from kitaeru.recipe.types import Recipe
from kitaeru.recipe.yamltext import Key, dotted, to_yaml

__all__ = ["Effective", "Origin", "OriginKind", "read", "to_yaml"]

# Fields that name a file or folder which is there before the run; looked for beside the recipe first.
_PATHS = ("model.name", "model.tokenizer", "model.chat_template")
_SECTIONS = ("model", "data", "lora", "train", "limits", "track", "samples")

# Ways to say the same thing: one from a stronger layer takes the place of the others in weaker layers.
_ALTERNATIVES = (
    ("train.max_steps", "train.epochs"),
    ("train.global_batch_tokens", "train.global_batch_examples"),
    ("train.warmup_steps", "train.warmup_fraction"),
    ("data.valid", "data.valid_fraction"),
)


@dataclass(frozen=True)
class Effective:
    """A valid recipe and the origin of each of its fields by path (a list of sources is one field)."""

    recipe: Recipe
    origins: dict[str, Origin]

    @property
    def given(self) -> frozenset[str]:
        """Paths of the values a person wrote, in the file or on the command line."""
        return frozenset(path for path, origin in self.origins.items() if origin.kind in ("file", "flag"))


def read(
    path: Path | None,
    *,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> Effective:
    """Read the recipe in `path` (None: no file) under `values` and `overrides`, the later the stronger.

    `overrides` are texts like `train.seed=3`, the value in YAML, nothing after `=` to take a value back.
    `values` are those of the command line's own flags, by path (`{"data.train": "my.jsonl"}`) or nested; None is
    skipped. `source` says who gave them, if not the command line.

    In the file, data paths, model and tokenizer folders and `chat_template` are looked for beside the file first and
    are else relative to the current folder; `output` is always relative to the current folder.

    Raises:
        RecipeError: everything that is wrong with the recipe.
    """
    layers = [file_layer(path)] if path is not None else []
    layers += [values_layer(values or {}, source), *map(override_layer, overrides)]
    name, at = preset_name(layers)
    if name is not None:
        layers.insert(0, preset_layer(name, at))
    merged = _Merged()
    for layer in layers:
        merged.add(layer)
    return _validated(merged)


class _Merged:
    """The layers so far: values, the origin of every key, and the problems met."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[Key, Origin] = {}
        self.problems: list[Problem] = []
        self.torn = False  # a layer could not be read, so what is missing may stand there

    def add(self, layer: Layer) -> None:
        """Put `layer` on top."""
        self.problems += layer.tree.problems
        values = layer.tree.values
        if values is None:
            self.torn |= bool(layer.tree.problems)
            return
        if not isinstance(values, dict):
            self.torn = True
            example = "model: bundled\n    data: {train: my.jsonl}"
            what, remedy = (
                tr("this is not a recipe: no `name: value` lines"),
                tr("A recipe looks like this:\n    {example}", example=example),
            )
            self.problems.append(Problem("", what, remedy, layer.source, 1 if layer.kind == "file" else 0))
            return
        self._merge(self.values, values, (), layer)

    def _merge(self, below: dict[str, Any], above: dict[str, Any], at: Key, layer: Layer) -> None:
        for name, value in above.items():
            key = (*at, name)
            if key == ("model",) and isinstance(value, str):
                value = {"name": value}
                layer.tree.lines[("model", "name")] = layer.tree.lines.get(key, 0)
            if key in {(section,) for section in _SECTIONS} and (value is None or isinstance(value, dict)):
                inner = below.setdefault(name, {})
                self.origins.setdefault(key, Origin(layer.kind, layer.source, layer.tree.lines.get(key, 0)))
                if not isinstance(inner, dict):
                    inner = below[name] = {}
                self._merge(inner, value or {}, key, layer)
                continue
            self._forget(key)
            below.pop(name, None)
            self._note(key, layer)
            if value is not None:  # an empty value means: decide for me
                below[name] = self._placed(value, key, layer)
                self._displace(below, key, layer)

    def _displace(self, below: dict[str, Any], key: Key, layer: Layer) -> None:
        for group in _ALTERNATIVES:
            for other in group if dotted(key) in group else ():
                rival = tuple(other.split("."))
                if rival != key and rival in self.origins and self.origins[rival].kind != layer.kind:
                    self._forget(rival)
                    below.pop(str(rival[-1]), None)

    def _forget(self, key: Key) -> None:
        for known in [k for k in self.origins if k[: len(key)] == key]:
            del self.origins[known]

    def _note(self, key: Key, layer: Layer) -> None:
        """Note the origin of `key` and of all that lies inside its value."""
        self.origins[key] = Origin(layer.kind, layer.source, layer.tree.lines.get(key, 0))
        for inner, line in layer.tree.lines.items():
            if inner[: len(key)] == key:
                self.origins[inner] = Origin(layer.kind, layer.source, line)

    def _placed(self, value: Any, key: Key, layer: Layer) -> Any:
        """`value` with the paths in it looked for beside the recipe file."""
        if dotted(key) in _PATHS:
            return place(value, layer.folder)
        if dotted(key) in ("data.train", "data.valid"):
            return place_sources(value, layer.folder)
        return value


def _validated(merged: _Merged) -> Effective:
    problems = list(merged.problems)
    known = {(p.path, p.line) for p in problems}
    wrong: set[Key] = set()
    recipe, errors = _attempt(merged.values)
    for error in errors:
        key = tuple(error["loc"])
        wrong.add(key)
        problem = _problem(merged.origins, key, *describe(error, key))
        if (error["type"] != "missing" or not merged.torn) and (problem.path, problem.line) not in known:
            problems.append(problem)
    if recipe is None:  # look for clashes among the values that are right
        recipe, _ = _attempt(_without(merged.values, wrong))
    origins = _leaf_origins(merged.origins)
    if recipe is not None:
        given = Effective(recipe, origins).given
        spoilt = {dotted(tuple(p for p in key if isinstance(p, str))) for key in wrong}
        problems += [
            _clash_problem(merged.origins, clash.paths, clash.what, clash.remedy)
            for clash in check(recipe, given)
            if not any(_touches(path, bad) for path in clash.paths for bad in spoilt)
        ]
    if problems or recipe is None:
        raise RecipeError(sorted(_unique(problems), key=lambda p: (p.line == 0, p.line)))
    return Effective(recipe, origins)


def _attempt(values: dict[str, Any]) -> tuple[Recipe | None, list[ErrorDetails]]:
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # pydantic counts only the right elements of a list: with a wrong one it is "too short" as well.
        inner = {tuple(e["loc"][:-1]) for e in errors} | {tuple(e["loc"][:-2]) for e in errors}
        return None, [e for e in errors if e["type"] != "too_short" or tuple(e["loc"]) not in inner]


def _without(values: dict[str, Any], wrong: set[Key]) -> dict[str, Any]:
    """A copy without the wrong values, and with something in the place of a model or data that is missing."""
    whole = {spec.path for spec in leaves()}

    def copy(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {k: copy(v, (*key, k)) for k, v in value.items() if not spoils((*key, k))}
        return value

    def spoils(key: Key) -> bool:
        return any(bad == key or (bad[: len(key)] == key and dotted(key) in whole) for bad in wrong)

    kept: dict[str, Any] = copy(values, ())
    for section, name in (("model", "name"), ("data", "train")):
        inner = kept.setdefault(section, {})
        if isinstance(inner, dict):
            inner.setdefault(name, "?")
    return kept


def _touches(path: str, bad: str) -> bool:
    return path == bad or path.startswith(f"{bad}.") or bad.startswith(f"{path}.")


def _origin_of(origins: Mapping[Key, Origin], key: Key) -> Origin | None:
    """The origin of `key`, or of the nearest thing around it."""
    for length in range(len(key), 0, -1):
        if (found := origins.get(key[:length])) is not None:
            return found
    return None


def _problem(origins: Mapping[Key, Origin], key: Key, what: str, remedy: str) -> Problem:
    origin = _origin_of(origins, key)
    path = dotted(key)
    if origin is None:
        return Problem(path, what, remedy)
    source = tr("preset {name}", name=origin.source) if origin.kind == "preset" else origin.source
    return Problem(path, what, remedy, source, origin.line)


def _clash_problem(origins: Mapping[Key, Origin], paths: tuple[str, ...], what: str, remedy: str) -> Problem:
    """The clash at its first path that a person wrote, with the places of the others."""
    keys = [tuple(path.split(".")) for path in paths]
    written = [key for key in keys if key in origins and origins[key].kind in ("file", "flag")]
    first = (written or keys)[0]
    others = [f"`{dotted(key)}`: {origins[key]}" for key in keys if key != first and key in origins]
    if others:
        what = tr("{what} ({places})", what=what, places="; ".join(others))
    return _problem(origins, first, what, remedy)


def _unique(problems: Sequence[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _leaf_origins(origins: Mapping[Key, Origin]) -> dict[str, Origin]:
    return {spec.path: origins.get(tuple(spec.path.split(".")), Origin("default")) for spec in leaves()}
