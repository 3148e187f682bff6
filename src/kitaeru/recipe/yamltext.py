"""YAML 1.2 text to plain values that remember their lines, and a recipe back to YAML.

ruamel.yaml parses and resolves; the tree of nodes is walked here so that every key keeps its line, a key written twice
is noticed, and dates and unknown tags do not turn into objects.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kitaeru.errors import Problem
from kitaeru.i18n import tr
from kitaeru.recipe.fields import FieldSpec, names_under, table, value_at
from kitaeru.recipe.types import Recipe, SourceSection

Key = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"


@dataclass
class Tree:
    """Plain values (dict, list, str, int, float, bool, None), the line of every key, and what is wrong."""

    values: Any = None
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str, source: str) -> Tree:
    """Parse one YAML document. Never raises: what cannot be read is in `problems` of the result."""
    yaml = YAML(typ="safe", pure=True)
    reader = _Reader(yaml, source)
    try:
        node = yaml.compose(text)
        reader.tree.values = None if node is None else reader.value(node, ())
    except YAMLError as error:
        reader.tree.problems.append(_syntax_problem(error, text, source))
    return reader.tree


class _Reader:
    """Walks the nodes of one document."""

    def __init__(self, yaml: YAML, source: str) -> None:
        self._yaml, self._source, self.tree = yaml, source, Tree()
        self._open: set[int] = set()

    def value(self, node: Node, key: Key) -> Any:
        self.tree.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, ScalarNode):
            return self._scalar(node, key)
        if id(node) in self._open:
            return self._complain(key, node, tr("the alias contains itself"))
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
            return self._mapping(node, key) if isinstance(node, MappingNode) else None
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        seen: dict[str, int] = {}
        merged: dict[str, Any] = {}
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag == f"{_TAG}merge":
                merged |= self._merge(value_node, key)
                continue
            if not isinstance(name_node, ScalarNode):
                self._complain(key, name_node, tr("a key must be a plain name"))
                continue
            name = name_node.value
            if name in seen:
                again = tr("`{name}` is written twice; the first is on line {line}", name=name, line=seen[name])
                self._complain((*key, name), name_node, again, tr("Keep one of the two."))
                continue
            seen[name] = line
            self.tree.lines[(*key, name)] = line
            result[name] = self.value(value_node, (*key, name))
        return {**merged, **result}

    def _merge(self, node: Node, key: Key) -> dict[str, Any]:
        value = self.value(node, (*key, "<<"))
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            self._complain(key, node, tr("`<<` needs a section to take values from"))
            return {}
        taken: dict[str, Any] = {}
        for part in reversed(parts):
            taken |= part
        for name in taken:
            self.tree.lines.setdefault((*key, name), node.start_mark.line + 1)
        return taken

    def _scalar(self, node: ScalarNode, key: Key) -> Any:
        tag = str(node.tag)
        if tag == f"{_TAG}null":
            return None
        if tag in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}bool"):
            try:
                value = self._yaml.constructor.construct_object(node)
            except (ValueError, KeyError):  # `!!int x`
                return self._complain(key, node, tr("{value} is not what its tag says", value=quoted(node.value)))
            if isinstance(value, float) and not math.isfinite(value):
                return self._complain(key, node, tr("{value} is not a finite number", value=node.value))
            return value
        if not tag.startswith(_TAG):
            self._complain(key, node, tr("unknown tag {tag}", tag=tag), tr("Remove the tag."))
        return str(node.value)

    def _complain(self, key: Key, node: Node, what: str, remedy: str = "") -> None:
        self.tree.problems.append(Problem(dotted(key), what, remedy, self._source, node.start_mark.line + 1))


def _syntax_problem(error: YAMLError, text: str, source: str) -> Problem:
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    if isinstance(error, MarkedYAMLError) and any(w in str(error.context) for w in ("flow", "quoted", "simple key")):
        mark = error.context_mark or mark  # where the bracket, quote or key that never ends begins
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    detail = str(getattr(error, "problem", "") or getattr(error, "reason", "") or error).splitlines()[0]
    what = tr("this is not YAML (column {column}): {detail}", column=column, detail=detail)
    return Problem("", what, _syntax_remedy(text, line, detail), source, line)


def _syntax_remedy(text: str, line: int, detail: str) -> str:
    lines = text.splitlines()
    here = lines[line - 1] if 0 < line <= len(lines) else ""
    if "\t" in here:
        return tr("Indent with spaces, not with a tab.")
    if wide := next((c for c in "：　“”［］｛｝，" if c in here), None):
        return tr("The line has a full-width “{character}”; YAML needs the half-width one.", character=wide)
    before = lines[line - 2] if 1 < line <= len(lines) + 1 else ""
    if "：" in before and ":" not in before:  # a key without its colon is noticed a line later
        return tr("The line before has a full-width “：”; YAML needs the half-width one.")
    if "mapping values" in detail and here.count(": ") > 1:
        return tr('Put a text that contains ": " in quotes.')
    return tr("Check the quotes, brackets and indentation on this line and the one before.")


def dotted(key: Key) -> str:
    """`("data", "train", 0, "path")` as `data.train[0].path`."""
    out = ""
    for part in key:
        out += f"[{part}]" if isinstance(part, int) else (f".{part}" if out else part)
    return out


def quoted(value: Any) -> str:
    """A value the way it would be written in YAML, shortened for a message."""
    text = f'"{value}"' if isinstance(value, str) else inline(value) if not isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


# Writing


def to_yaml(recipe: Recipe, origins: Mapping[str, Any] | None = None) -> str:
    """The complete recipe as YAML that reads back as an equal recipe; with `origins`, where each value came from.

    An empty value (`null`) is written too, so that a preset cannot fill it in when the file is read again.
    """
    out: list[str] = []
    after_section = False
    for name in names_under(""):
        spec = table()[name]
        if spec.kind == "section":
            out += ["", f"{name}:"]
            after_section = True
            out += [line for child in names_under(name) for line in _lines(recipe, table()[f"{name}.{child}"], origins)]
        else:
            out += ["", *_lines(recipe, spec, origins)] if after_section else _lines(recipe, spec, origins)
            after_section = False
    return "\n".join(out).lstrip("\n") + "\n"


def _lines(recipe: Recipe, spec: FieldSpec, origins: Mapping[str, Any] | None) -> Iterator[str]:
    indent = "  " * spec.path.count(".")
    value = value_at(recipe, spec.path)
    origin = origins.get(spec.path) if origins else None
    told = origin is not None and origin.kind != "default" and str(origin).isprintable()
    comment = f"  # {origin}" if told else ""
    if spec.kind == "sources" and value:
        yield f"{indent}{spec.name}:{comment}"
        for source in value:
            yield f"{indent}  - {_source(source)}"
    else:
        yield f"{indent}{spec.name}: {inline(value)}{comment}"


def _source(source: SourceSection) -> str:
    changed = {k: v for k, v in source if v != SourceSection.model_fields[k].default}
    return inline(changed)


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(k))}: {inline(v)}" for k, v in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


_PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*")
# The second row would be true or false to a reader of YAML 1.1.
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
# Not printable in YAML, or a line break inside quotes: these are escaped.
_ESCAPED = re.compile("[^\t -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return _ESCAPED.sub(_escape, json.dumps(value, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"
