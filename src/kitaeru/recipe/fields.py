"""The fields of a recipe as a table, read off the types: for messages, `explain`, the schema and the YAML writer.

A path is what a person types: `train.learning_rate`. The keys of one source are listed under `data.train` and
`data.valid` with `item=True`; they belong to the elements of a list.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from kitaeru.i18n import tr
from kitaeru.recipe.types import Recipe, Section

Kind = Literal["section", "sources", "text", "whole", "number", "flag", "choice", "list", "mapping"]
_PLAIN: dict[Any, Kind] = {str: "text", int: "whole", float: "number", bool: "flag", dict: "mapping"}


@dataclass(frozen=True)
class FieldSpec:
    """What is known of one field or section. `bounds` are like `(">", 0)`; `section` is set for kind "section"."""

    path: str
    kind: Kind
    description: str
    required: bool
    nullable: bool
    default: Any
    choices: tuple[str, ...] = ()
    bounds: tuple[tuple[str, float], ...] = ()
    section: type[Section] | None = None
    item: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


@cache
def table() -> dict[str, FieldSpec]:
    """Every section and field by path, in the order of the types."""
    return {spec.path: spec for spec in _walk(Recipe, "", item=False)}


@cache
def leaves() -> tuple[FieldSpec, ...]:
    """The fields that hold a value (a list of sources counts as one)."""
    return tuple(spec for spec in table().values() if spec.kind != "section" and not spec.item)


def names_under(path: str) -> tuple[str, ...]:
    """The valid keys inside the section (or the source) at `path`; "" is the top of the recipe."""
    prefix = f"{path}." if path else ""
    rest = (key.removeprefix(prefix) for key in table() if key.startswith(prefix))
    return tuple(name for name in rest if "." not in name)


def value_at(recipe: Recipe, path: str) -> Any:
    """The value of the field at `path`."""
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def type_text(spec: FieldSpec) -> str:
    """The type in words a person knows, with choices and range, for example "a number, > 0"."""
    words = {
        "section": tr("a section"),
        "sources": tr("a source or a list of sources"),
        "text": tr("text"),
        "whole": tr("a whole number"),
        "number": tr("a number"),
        "flag": tr("true or false"),
        "choice": tr("one of {choices}", choices=", ".join(spec.choices)),
        "list": tr("a list of texts"),
        "mapping": tr("names and values"),
    }
    return ", ".join([words[spec.kind], *(f"{sign} {limit:g}" for sign, limit in spec.bounds)])


def _walk(section: type[Section], prefix: str, *, item: bool) -> Iterator[FieldSpec]:
    for name, info in section.model_fields.items():
        spec = _spec(f"{prefix}{name}", info, item=item)
        yield spec
        if spec.section is not None:
            yield from _walk(spec.section, f"{spec.path}.", item=item or spec.kind == "sources")


def _spec(path: str, info: FieldInfo, *, item: bool) -> FieldSpec:
    bare, nullable = _without_none(info.annotation)
    kind, section = _kind(bare)
    return FieldSpec(
        path=path,
        kind=kind,
        description=info.description or "",
        required=info.is_required(),
        nullable=nullable,
        default=None if info.is_required() else info.default,
        choices=tuple(map(str, get_args(bare))) if kind == "choice" else (),
        bounds=tuple(_bounds(info)),
        section=section,
        item=item,
    )


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arm for arm in get_args(annotation) if arm is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


def _kind(bare: Any) -> tuple[Kind, type[Section] | None]:
    origin = get_origin(bare)
    if origin is Literal:
        return "choice", None
    if origin is tuple:
        element = get_args(bare)[0]
        return ("sources", element) if isinstance(element, type) and issubclass(element, Section) else ("list", None)
    if isinstance(bare, type) and issubclass(bare, Section):
        return "section", bare
    return _PLAIN[origin or bare], None


def _bounds(info: FieldInfo) -> Iterator[tuple[str, float]]:
    for rule in info.metadata:
        if isinstance(rule, Gt):
            yield ">", float(rule.gt)  # type: ignore[arg-type]
        elif isinstance(rule, Ge):
            yield "≥", float(rule.ge)  # type: ignore[arg-type]
        elif isinstance(rule, Lt):
            yield "<", float(rule.lt)  # type: ignore[arg-type]
        elif isinstance(rule, Le):
            yield "≤", float(rule.le)  # type: ignore[arg-type]


# Where the value made up from the type would not help.
_EXAMPLES = {
    "limits.ds_config": "ds_config: ds_config.json",
    "track.prometheus_port": "prometheus_port: 9400",
    "track.prometheus_address": "prometheus_address: 0.0.0.0",
    "track.device_seconds": "device_seconds: 1",
    "track.power_price": "power_price: 31",
    "track.currency": "currency: EUR",
    "track.machine_watts": "machine_watts: 120",
    "model": "model: bundled",
    "model.name": "{name: elyza/Llama-3-ELYZA-JP-8B}",
    "data": "data: {train: my.jsonl}",
    "data.train": "data: {train: my.jsonl}",
    "data.valid": "valid: valid.jsonl",
    "data.valid_fraction": "valid_fraction: 0.05",
    "data.seq_len": "seq_len: 2048",
    "data.train.path": "{path: my.jsonl, weight: 2.0}",
    "data.valid.path": "{path: valid.jsonl}",
    "data.train.columns": "columns: {instruction: question, output: answer}",
    "data.valid.columns": "columns: {instruction: question, output: answer}",
    "data.system": "system: あなたは親切な助手です。",
    "model.tokenizer": "tokenizer: elyza/Llama-3-ELYZA-JP-8B",
    "model.chat_template": "chat_template: chat.jinja",
    "model.revision": "revision: main",
    "preset": "preset: quick",
    "lora.r": "r: 8",
    "lora.alpha": "alpha: 16",
    "lora.dropout": "dropout: 0.05",
    "lora.targets": "targets: [q_proj, v_proj]",
    "lora.modules_to_save": "modules_to_save: [embed_tokens, lm_head]",
    "lora.plus_ratio": "plus_ratio: 16",
    "train.max_steps": "max_steps: 100",
    "train.learning_rate": "learning_rate: 2e-4",
    "train.global_batch_tokens": "global_batch_tokens: 16384",
    "train.global_batch_examples": "global_batch_examples: 32",
    "train.beta1": "beta1: 0.95",
    "train.beta2": "beta2: 0.95",
    "train.epsilon": "epsilon: 1e-6",
    "train.weight_decay": "weight_decay: 0.01",
    "train.warmup_fraction": "warmup_fraction: 0.1",
    "train.decay_fraction": "decay_fraction: 0.1",
    "train.final_rate": "final_rate: 0.1",
    "train.max_grad_norm": "max_grad_norm: 0.5",
    "train.step_in_backward": "step_in_backward: false",
    "train.z_loss": "z_loss: 0.0001",
    "train.seed": "seed: 1",
    "limits.devices": "devices: 2",
    "limits.max_restarts": "max_restarts: 3",
    "train.keep_checkpoints": "keep_checkpoints: 3",
    "train.spike_factor": "spike_factor: 2.0",
    "train.neftune_alpha": "neftune_alpha: 5",
    "train.epochs": "epochs: 3",
    "limits.micro_batch_tokens": "micro_batch_tokens: 4096",
    "limits.memory_gb": "memory_gb: 22",
    "output": "output: runs/my-first",
    "samples.count": "count: 5",
    "samples.max_new_tokens": "max_new_tokens: 256",
    "samples.prompts": "prompts: [日本の首都はどこですか。]",
    "samples.system": "system: あなたは親切な助手です。",
}


def example(spec: FieldSpec) -> str:
    """A line of YAML that sets the field."""
    if spec.path in _EXAMPLES:
        return _EXAMPLES[spec.path]
    if spec.kind == "section":
        first = next(leaf for leaf in leaves() if leaf.path.startswith(f"{spec.path}."))
        return f"{spec.name}: {{{example(first)}}}"
    value = spec.default
    if spec.kind == "choice":
        value = next(choice for choice in spec.choices if choice != spec.default)
    elif spec.kind == "flag":
        value = not spec.default
    elif value is None:
        value = {"whole": 100, "number": 1.0}.get(spec.kind, "name")
    return f"{spec.name}: {str(value).lower() if isinstance(value, bool) else value}"
