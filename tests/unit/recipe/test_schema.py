"""The JSON schema takes what `read` takes and refuses what it refuses, judged by a small validator of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitaeru.errors import RecipeError
from kitaeru.recipe.fields import table
from kitaeru.recipe.read import read
from kitaeru.recipe.schema import schema
from kitaeru.recipe.yamltext import parse

TYPES: dict[str, Any] = {"string": str, "object": dict, "array": list, "null": type(None), "boolean": bool}
JUDGED = {"$ref", "anyOf", "enum", "type", "properties", "required", "additionalProperties", "items", "minItems"}
JUDGED |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KNOWN = JUDGED | {"description", "default", "examples", "title", "$schema", "$defs"}


def accepts(value: Any, rule: dict[str, Any], whole: dict[str, Any]) -> bool:
    assert set(rule) <= KNOWN, set(rule) - KNOWN
    if "$ref" in rule:
        return accepts(value, whole["$defs"][rule["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in rule:
        return any(accepts(value, arm, whole) for arm in rule["anyOf"])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = rule.get("type")
    if kind in ("number", "integer"):
        fits = number and (kind == "number" or float(value).is_integer())
    else:
        fits = kind is None or isinstance(value, TYPES[kind])
    if not fits or ("enum" in rule and value not in rule["enum"]):
        return False
    if number:
        return (
            rule.get("minimum", value) <= value <= rule.get("maximum", value)
            and not value <= rule.get("exclusiveMinimum", value - 1)
            and not value >= rule.get("exclusiveMaximum", value + 1)
        )
    if isinstance(value, list):
        return len(value) >= rule.get("minItems", 0) and all(accepts(v, rule["items"], whole) for v in value)
    if isinstance(value, dict):
        fields, more = rule.get("properties", {}), rule.get("additionalProperties", True)
        return set(rule.get("required", ())) <= set(value) and all(
            accepts(v, fields[k], whole) if k in fields else more and accepts(v, more, whole) for k, v in value.items()
        )
    return True


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("{model: bundled, data: {train: a}}", True),
        ("{model: {name: x, quantize: nf4}, data: {train: [a, {path: b, weight: 2, columns: {output: x}}]}}", True),
        ("{model: x, data: {train: {path: a}, valid: [b]}, lora: {targets: q, dora: true}}", True),
        ("{model: x, data: {train: a}, lora: , train: {seed: , max_steps: 3}, limits: {device: cpu}}", True),
        ("{model: x, data: {train: a}, samples: {prompts: [a, b]}, preset: quick}", True),
        ("{data: {train: a}}", False),
        ("{model: x, data: {}}", False),
        ("{model: x, data: {train: []}}", False),
        ("{model: x, data: {train: a}, sed: 3}", False),
        ("{model: x, data: {train: a}, train: {seed: -1}}", False),
        ("{model: x, data: {train: a}, train: {beta1: 1}}", False),
        ("{model: x, data: {train: a}, method: qlor}", False),
        ("{model: x, data: {train: a}, lora: {dora: no}}", False),
        ("{model: x, data: {train: [{path: a, colour: b}]}}", False),
    ],
)
def test_schema_and_reader_agree(text: str, right: bool, tmp_path: Path) -> None:
    whole = schema()
    assert accepts(parse(text, "").values, whole, whole) == right
    path = tmp_path / "r.yaml"
    path.write_text(text)
    if right:
        read(path)
    else:
        with pytest.raises(RecipeError):
            read(path)


def test_every_field_is_there_with_its_description() -> None:
    whole = json.loads(json.dumps(schema()))
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    sections = {"": whole} | {
        spec.path: whole["$defs"][spec.section.__name__] for spec in table().values() if spec.section is not None
    }
    for path, spec in table().items():
        section, _, name = path.rpartition(".")
        assert sections[section]["properties"][name]["description"] == spec.description
        assert sections[section]["additionalProperties"] is False
