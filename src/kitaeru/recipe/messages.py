"""What pydantic found wrong with a recipe, as problems a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any

from pydantic_core import ErrorDetails

from kitaeru.i18n import tr
from kitaeru.recipe.fields import FieldSpec, example, leaves, names_under, table, type_text
from kitaeru.recipe.yamltext import Key, quoted

# Names that other tools use for our fields.
ALIASES = {
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "attn_implementation": "model.attention",
    "datasets": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "validation_file": "data.valid",
    "eval": "data.valid",
    "val": "data.valid",
    "validation": "data.valid",
    "test_size": "data.valid_fraction",
    "val_set_size": "data.valid_fraction",
    "max_seq_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_length": "data.seq_len",
    "sequence_len": "data.seq_len",
    "cutoff_len": "data.seq_len",
    "sample_packing": "data.packing",
    "adapter": "method",
    "finetuning_type": "method",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lora_target": "lora.targets",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "init_lora_weights": "lora.init",
    "loraplus_lr_ratio": "lora.plus_ratio",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "steps": "train.max_steps",
    "batch_size": "train.global_batch_examples",
    "per_device_train_batch_size": "limits.micro_batch_tokens",
    "micro_batch_size": "limits.micro_batch_tokens",
    "gradient_accumulation_steps": "train.global_batch_examples",
    "optim": "train.optimizer",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_fraction",
    "max_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "adam_epsilon": "train.epsilon",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "load_best_model_at_end": "train.keep_best",
    "early_stopping_patience": "train.early_stop",
    "neftune_noise_alpha": "train.neftune_alpha",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "gradient_checkpointing": "limits.checkpointing",
    "activation_checkpointing": "limits.checkpointing",
    "output_dir": "output",
    "report_to": "track",
    "wandb_project": "track.wandb",
    "type": "data.train.kind",
    "format": "data.train.kind",
}


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that looks most like `name`, if any does."""
    folded = {other.lower().replace("-", "_"): other for other in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def spec_at(key: Key) -> FieldSpec | None:
    """The field a key leads to; elements of a list and values of a mapping share its field."""
    path = ".".join(part for part in key if isinstance(part, str))
    outer = table().get(path.rpartition(".")[0])
    return table().get(path) or (outer if outer is not None and outer.kind == "mapping" else None)


def describe(error: ErrorDetails, key: Key) -> tuple[str, str]:
    """What is wrong and what to do, for one error of pydantic at `key`."""
    kind, value, spec = error["type"], error["input"], spec_at(key)
    if kind == "extra_forbidden":
        return unknown_key(key)
    if spec is None:
        return error["msg"], ""
    if kind == "missing":
        return _missing(spec)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        limits = tr(" and ").join(f"{sign} {limit:g}" for sign, limit in spec.bounds)
        return tr("{value} is out of range", value=quoted(value)), tr("It must be {limits}.", limits=limits)
    if kind == "too_short":
        return tr("the list is empty"), tr("For example: {example}", example=example(spec))
    if kind == "string_unicode":
        return tr("the text has characters that are not Unicode"), tr("Save the file as UTF-8.")
    return _WRONG_TYPE[_expected(spec, key)](value, spec)


def unknown_key(key: Key) -> tuple[str, str]:
    """An unknown key: the name that was probably meant, here or in another section."""
    parts = [part for part in key if isinstance(part, str)]
    section, name = ".".join(parts[:-1]), parts[-1]
    what = tr("unknown key `{name}`", name=name)
    here = names_under(section)
    if "." in name and name in table() and not section:
        home, _, leaf = name.rpartition(".")
        return what, tr("Write `{name}` under `{section}:`, indented.", name=leaf, section=home)
    if name.lower() in here:
        return what, tr("Did you mean `{name}`?", name=name.lower())
    if meant := _elsewhere(name, section):
        return what, meant
    if close := nearest(name, here):
        return what, tr("Did you mean `{name}`?", name=close)
    if far := nearest(name, {spec.name for spec in leaves()}):
        return what, _elsewhere(far, section) or ""
    return what, tr("Valid here: {names}.", names=", ".join(here))


def _elsewhere(name: str, section: str) -> str | None:
    plain = name.lower().replace("-", "_")
    paths = [spec.path for spec in leaves() if spec.name == plain]
    path = paths[0] if paths else ALIASES.get(plain)
    if path is None:
        return None
    home, _, leaf = path.rpartition(".")
    if home == section or (table()[path].item and table().get(section, table()["data"]).kind == "sources"):
        return tr("Here it is called `{name}`.", name=leaf)
    if not home:
        return tr("`{name}` belongs at the top of the recipe, not in a section.", name=leaf)
    if leaf == plain:
        return tr("`{name}` belongs under `{section}`.", name=leaf, section=home)
    return tr("Here it is `{name}` under `{section}`.", name=leaf, section=home)


def _missing(spec: FieldSpec) -> tuple[str, str]:
    what = {
        "model": tr("the recipe does not say which model to start from"),
        "data": tr("the recipe does not say what to train on"),
        "data.train": tr("the recipe does not say what to train on"),
    }.get(spec.path) or tr("`{name}` is missing", name=spec.name)
    return what, tr("For example: {example}", example=example(spec))


def _expected(spec: FieldSpec, key: Key) -> str:
    inside = isinstance(key[-1], int)  # an element of a list
    if spec.kind == "list" and inside:
        return "text"
    if spec.kind == "sources":
        return "source" if inside else "sources"
    if spec.kind == "mapping" and key[-1] != spec.name:
        return "text"
    return spec.kind


def _text(value: Any, spec: FieldSpec) -> tuple[str, str]:
    if isinstance(value, list | dict):
        return tr("{value} is not one text", value=quoted(value)), _example_remedy(spec)
    return tr("{value} is not text", value=quoted(value)), tr('Put it in quotes: "{value}".', value=quoted(value))


def _whole(value: Any, spec: FieldSpec) -> tuple[str, str]:
    what = tr("{value} is not a whole number", value=quoted(value))
    if isinstance(value, float) and value.is_integer():
        return what, tr("Write {value}.", value=int(value))
    return what, _example_remedy(spec)


def _number(value: Any, spec: FieldSpec) -> tuple[str, str]:
    return tr("{value} is not a number", value=quoted(value)), _example_remedy(spec)


def _flag(value: Any, spec: FieldSpec) -> tuple[str, str]:
    meant = {"no": "false", "off": "false", "n": "false", "yes": "true", "on": "true", "y": "true"}
    meant |= {"0": "false", "1": "true", "false": "false", "true": "true"}
    if plain := meant.get(str(value).lower()):
        if isinstance(value, str):
            return tr("{value} is text", value=quoted(value)), tr("Write {value}.", value=plain)
        return tr("{value} is a number", value=quoted(value)), tr("Write {value}.", value=plain)
    return tr("{value} is neither true nor false", value=quoted(value)), _example_remedy(spec)


def _choice(value: Any, spec: FieldSpec) -> tuple[str, str]:
    what = tr("{value} is not one of {choices}", value=quoted(value), choices=", ".join(spec.choices))
    if isinstance(value, str) and (close := nearest(value, spec.choices)):
        return what, tr("Did you mean `{name}`?", name=close)
    return what, tr("Take one of these, or leave `{name}` out.", name=spec.name)


def _section(value: Any, spec: FieldSpec) -> tuple[str, str]:
    what = tr("{value} stands where a section is expected", value=quoted(value))
    return what, _example_remedy(spec)


def _list(value: Any, spec: FieldSpec) -> tuple[str, str]:
    return tr("{value} is not a list of texts", value=quoted(value)), _example_remedy(spec)


def _sources(value: Any, spec: FieldSpec) -> tuple[str, str]:
    return tr("{value} is not a source of examples", value=quoted(value)), _example_remedy(spec)


def _mapping(value: Any, spec: FieldSpec) -> tuple[str, str]:
    return tr("{value} is not a table of names", value=quoted(value)), _example_remedy(spec)


_WRONG_TYPE: dict[str, Callable[[Any, FieldSpec], tuple[str, str]]] = {
    "text": _text,
    "whole": _whole,
    "number": _number,
    "flag": _flag,
    "choice": _choice,
    "section": _section,
    "list": _list,
    "sources": _sources,
    "source": _sources,
    "mapping": _mapping,
}


def _example_remedy(spec: FieldSpec) -> str:
    return tr("It is {type}, for example: {example}", type=type_text(spec), example=example(spec))
