"""The documentation of a field or section, from its one description in the types."""

from __future__ import annotations

from dataclasses import dataclass

from kitaeru.errors import UsageError
from kitaeru.i18n import tr
from kitaeru.recipe.fields import FieldSpec, example, names_under, table, type_text
from kitaeru.recipe.messages import nearest, unknown_key
from kitaeru.recipe.yamltext import inline


@dataclass(frozen=True)
class Explanation:
    """What `kitaeru recipe explain` says of one path, translated. `fields` are (name, description) inside a section."""

    path: str
    type: str
    default: str
    description: str
    example: str
    fields: tuple[tuple[str, str], ...] = ()


def explain(path: str = "") -> Explanation:
    """Explain the field or section at `path`; "" is the whole recipe.

    Raises:
        UsageError: there is no such field; the remedy names the nearest one.
    """
    if not path:
        return Explanation(
            "",
            tr("a recipe"),
            "",
            tr("A whole recipe. Everything may be left out but model and data."),
            "model: bundled\ndata: {train: my.jsonl}",
            _inside(""),
        )
    spec = table().get(path)
    if spec is None:
        close = nearest(path, table()) if "." in path else None
        remedy = tr("Did you mean `{name}`?", name=close) if close else unknown_key(tuple(path.split(".")))[1]
        raise UsageError(tr("There is no field `{path}` in a recipe.", path=path), remedy=remedy)
    return Explanation(path, type_text(spec), _default(spec), tr(spec.description), example(spec), _inside(path))


def _inside(path: str) -> tuple[tuple[str, str], ...]:
    prefix = f"{path}." if path else ""
    return tuple((name, tr(table()[f"{prefix}{name}"].description)) for name in names_under(path))


def _default(spec: FieldSpec) -> str:
    if spec.required:
        return tr("none: it must be given")
    if spec.kind == "section":
        return ""
    if spec.default is None:
        return tr("left open: decided for you")
    return inline(spec.default)
