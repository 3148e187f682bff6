"""The JSON schema of a recipe (draft 2020-12), for editors: descriptions, choices, ranges and the short forms."""

from __future__ import annotations

from typing import Any

from kitaeru.i18n import tr
from kitaeru.recipe.fields import table
from kitaeru.recipe.presets import PRESETS
from kitaeru.recipe.types import Recipe, Section

_STRING = {"type": "string"}


def schema() -> dict[str, Any]:
    """The schema, descriptions in the language in force. Whatever `read` takes from a file, the schema takes too."""
    value = Recipe.model_json_schema()
    definitions = value["$defs"]
    sections = {spec.section.__name__: spec.section for spec in table().values() if spec.section is not None}
    for name, section in (("", value), *definitions.items()):
        del section["description"]  # the docstring; the field that holds the section says it in two languages
        _describe(section, sections.get(name, Recipe))
    _short_forms(value, definitions)
    _nullable(value, definitions)
    value["properties"]["preset"]["examples"] = list(PRESETS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **value, "title": "kitaeru recipe"}


def _describe(schema: dict[str, Any], section: type[Section]) -> None:
    for name, field in schema["properties"].items():
        field.pop("title", None)
        description = section.model_fields[name].description or ""
        if "$ref" in field:
            field.pop("default", None)  # a section's default is that of its fields
        field["description"] = tr(description)


def _short_forms(value: dict[str, Any], definitions: dict[str, Any]) -> None:
    """A name alone for a model or a source, one text for a list of texts."""
    model = value["properties"]["model"]
    model["anyOf"] = [_STRING, {"$ref": model.pop("$ref")}]
    source = {"anyOf": [_STRING, {"$ref": "#/$defs/SourceSection"}]}
    for name in ("train", "valid"):
        field = definitions["DataSection"]["properties"][name]
        many = {"type": "array", "items": source, **({"minItems": 1} if "minItems" in field else {})}
        for key in ("type", "items", "minItems"):
            field.pop(key, None)
        field["anyOf"] = [*source["anyOf"], many]
    for section, name in (
        ("LoraSection", "targets"),
        ("LoraSection", "modules_to_save"),
        ("SamplesSection", "prompts"),
    ):
        field = definitions[section]["properties"][name]
        array = {key: field.pop(key) for key in ("type", "items", "minItems") if key in field}
        field["anyOf"] = [_STRING, array]


def _nullable(value: dict[str, Any], definitions: dict[str, Any]) -> None:
    """An empty value takes the default, for every field that need not be given."""
    for section in (value, *(d for name, d in definitions.items() if name != "SourceSection")):
        for name, field in section["properties"].items():
            if name in section.get("required", ()) or _takes_null(field):
                continue
            outer = {key: field.pop(key) for key in ("description", "default", "examples") if key in field}
            inner = dict(field)
            field.clear()
            field |= {
                **outer,
                "anyOf": [*inner["anyOf"], {"type": "null"}] if set(inner) == {"anyOf"} else [inner, {"type": "null"}],
            }


def _takes_null(field: dict[str, Any]) -> bool:
    return any(arm.get("type") == "null" for arm in field.get("anyOf", ()))
