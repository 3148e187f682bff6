"""The layers of a recipe (a preset, a file, flags, `--set`), each a tree of values that knows where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import Problem, RecipeError
from kitaeru.i18n import tr
from kitaeru.recipe import presets
from kitaeru.recipe.fields import table
from kitaeru.recipe.messages import nearest
from kitaeru.recipe.yamltext import Tree, parse, quoted

OriginKind = Literal["file", "flag", "preset", "default", "planner"]


@dataclass(frozen=True)
class Origin:
    """Where a value came from; `source` is a file, a flag or the name of a preset, `line` counts from 1 (0 = none)."""

    kind: OriginKind
    source: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.source}:{self.line}"
        if self.kind == "preset":
            return tr("preset {name}", name=self.source)
        return self.source or {"default": tr("default"), "planner": tr("planner")}.get(self.kind, self.kind)


@dataclass
class Layer:
    """One layer. `folder` is where relative paths in it are looked for first; None: only from the current folder."""

    tree: Tree
    kind: OriginKind
    source: str
    folder: Path | None = None


def file_layer(path: Path) -> Layer:
    """The recipe file at `path`.

    Raises:
        RecipeError: it cannot be opened.
    """
    source = str(path)
    try:
        tree = parse(path.read_text(encoding="utf-8-sig"), source)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        problem = Problem("", tr("the file is not UTF-8"), tr("Save it as UTF-8."), source, line)
        tree = Tree(problems=[problem])
    except OSError as error:
        what = tr("the recipe cannot be read: {reason}", reason=error.strerror or str(error))
        if isinstance(error, FileNotFoundError):
            what = tr("there is no such file")
        raise RecipeError([Problem("", what, _file_remedy(path), source)]) from error
    # The recipe in a run folder was read once: its paths are settled, and `model/` beside it is the run's result.
    in_run = (path.parent / "plan.json").exists()
    return Layer(tree, "file", source, None if in_run else path.parent)


def _file_remedy(path: Path) -> str:
    if path.is_dir():
        return tr("Name a file in it, for example {path}.", path=path / "recipe.yaml")
    try:
        near = nearest(path.name, [item.name for item in path.parent.iterdir()])
    except OSError:
        near = None
    if near and not path.exists():
        return tr("Did you mean {path}?", path=path.parent / near)
    return tr("Check the path and its permissions.")


def values_layer(values: Mapping[str, Any], source: str | None = None) -> Layer:
    """Values by dotted path, or nested; None is skipped. `source` names them: by default the command line's flags."""
    tree = Tree(values={})
    for path, value in values.items():
        if value is not None:
            plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            _nest(tree.values, path.split("."), plain)
    return Layer(tree, "flag", tr("command line") if source is None else source)


def _nest(into: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = into.setdefault(part, {})
        if not isinstance(inner, dict):  # model=NAME, then model.revision=x
            inner = into[part] = {"name": inner}
        into = inner
    if isinstance(value, Mapping):
        inner = into.setdefault(parts[-1], {})
        for name, below in value.items():
            if below is not None:
                _nest(inner, [str(name)], below)
    else:
        into[parts[-1]] = value


def override_layer(text: str) -> Layer:
    """One `--set a.b=c`."""
    path, equals, raw = text.partition("=")
    path, source = path.strip(), "--set"
    parts = path.split(".")
    if not equals or not all(parts):
        what = tr("{text} does not say what to set", text=quoted(text))
        return Layer(Tree(problems=[Problem("", what, tr("Write `--set train.seed=3`."), source)]), "flag", source)
    value_tree = parse(raw, source)
    spec = table().get(path)
    if (
        spec is not None
        and spec.kind == "text"
        and not _is_quoted(raw)
        and (value_tree.problems or value_tree.values is not None)
    ):
        value_tree = Tree(values=raw.strip())  # `: `, `#`, digits: all of it is the text
    problems = [Problem(path, p.what, p.remedy, source) for p in value_tree.problems]
    value = value_tree.values
    for part in reversed(parts):
        value = {part: value}
    return Layer(Tree(values=value if not problems else None, problems=problems), "flag", source)


def _is_quoted(raw: str) -> bool:
    return raw.strip()[:1] in ('"', "'")


def preset_name(layers: Sequence[Layer]) -> tuple[str | None, Problem]:
    """The preset the strongest layer names, and a problem at that place to complain with."""
    name, at = None, Problem("preset", "")
    for layer in layers:
        if isinstance(layer.tree.values, dict) and "preset" in layer.tree.values:
            name = layer.tree.values["preset"]
            at = Problem("preset", "", "", layer.source, layer.tree.lines.get(("preset",), 0))
    return (name if isinstance(name, str) else None), at


def preset_layer(name: str, at: Problem) -> Layer:
    """The preset `name`; `at` is where it was named."""
    if name not in presets.PRESETS:
        known = ", ".join(presets.PRESETS)
        close = nearest(name, presets.PRESETS)
        remedy = tr("Did you mean `{name}`?", name=close) if close else tr("Presets: {names}.", names=known)
        problem = Problem("preset", tr("there is no preset {name}", name=quoted(name)), remedy, at.source, at.line)
        return Layer(Tree(problems=[problem]), "preset", name)
    return Layer(parse(presets.text(name), name), "preset", name)


def place_sources(value: Any, folder: Path | None) -> Any:
    """The sources of data with their paths looked for in `folder` first."""
    if isinstance(value, list):
        return [place_sources(item, folder) for item in value]
    if isinstance(value, dict):
        return {k: place(v, folder) if k == "path" else v for k, v in value.items() if v is not None}
    return place(value, folder)


def place(value: Any, folder: Path | None) -> Any:
    """A path (or an id) as a path in `folder` if it exists there, else as it is."""
    if not isinstance(value, str) or value == "bundled":
        return value
    if value == "~" or value.startswith("~/"):
        with suppress(RuntimeError):  # a user without a home
            return str(Path(value).expanduser())
    if folder is None or not value:
        return value
    try:
        beside = folder / value
        return str(beside) if folder != Path() and beside.exists() else value
    except (OSError, ValueError):  # a name no file can have
        return value
