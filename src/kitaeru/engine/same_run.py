"""Is this still the run the checkpoint was written by? One rule: a change is allowed when the steps already made would
have been the same with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kitaeru.errors import CheckpointError
from kitaeru.i18n import tr

_ABSENT = object()
_Flat = dict[str, Any]

# What never reaches the weights: where things are written, how often one looks, and how the work is cut into pieces.
_FREE = re.compile(
    r"recipe\.("
    r"output|preset|strategy|limits\..*|track\..*|samples\..*|data\.workers"
    r"|train\.(save_every|eval_every|keep_checkpoints|step_in_backward)"
    r")"
)
_PATH_OF_DATA = re.compile(r"recipe\.data\.(train|valid)\.\d+\.path")


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume when something changed that the steps already made depend on.

    Both are nested mappings: "recipe" holds the effective recipe as JSON values (validate an old one first, so that
    fields it did not know get their defaults), and every other key holds fingerprints of contents, for example
    `{"recipe": recipe.model_dump(mode="json"), "data": {"train": "3f…", "valid": "77…"}, "model": "c0…"}`.
    A data file may move when "data" is given and equal.

    Raises:
        CheckpointError: names each change, old → new.
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    same_data = bool(saved.get("data")) and saved.get("data") == now.get("data")
    changes = [
        _line(path, before.get(path, _ABSENT), after.get(path, _ABSENT))
        for path in [*before, *(path for path in after if path not in before)]
        if before.get(path, _ABSENT) != after.get(path, _ABSENT) and not _allowed(path, before, after, same_data)
    ]
    if changes:
        head = tr("The checkpoint belongs to another run than the recipe now asks for. What changed:")
        raise CheckpointError(
            "\n".join([head, *("  - " + change for change in changes)]),
            remedy=tr("Undo these changes to go on with this run, or start a new run with another `output`."),
        )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield path, value
        return
    for key, item in items:
        yield from _flat(item, f"{path}.{key}" if path else key)


def _allowed(path: str, before: _Flat, after: _Flat, same_data: bool) -> bool:
    if _FREE.fullmatch(path) or (same_data and _PATH_OF_DATA.fullmatch(path)):
        return True
    rule = _RULES.get(path)
    return rule is not None and path in before and path in after and rule(before, after)


def _length_is_free(before: _Flat, after: _Flat) -> bool:
    """The rate of a step depends on the run's length, except with a constant rate after a warm-up given in steps."""
    return all(
        flat["recipe.train.schedule"] == "constant"
        and (flat["recipe.train.warmup_steps"] is not None or flat["recipe.train.warmup_fraction"] == 0)
        for flat in (before, after)
    )


def _was_stop(path: str) -> Callable[[_Flat, _Flat], bool]:
    # A run that stops at the first such step and yet has a checkpoint has met none before it.
    return lambda before, after: before[path] == "stop"


def _more_patient(before: _Flat, after: _Flat) -> bool:
    old, new = before["recipe.train.early_stop"], after["recipe.train.early_stop"]
    return new is None or (old is not None and bool(new >= old))


def _spike_is_free(before: _Flat, after: _Flat) -> bool:
    # Only said aloud, or stopped at: then a higher limit would not have been met either.
    if before["recipe.train.on_spike"] == "stop":
        return bool(after["recipe.train.spike_factor"] >= before["recipe.train.spike_factor"])
    return bool(before["recipe.train.on_spike"] == after["recipe.train.on_spike"] == "ignore")


_OPTIMIZER = "recipe.train.optimizer"
_SAME_OPTIMIZER = {"auto", "adamw", "adamw_16bit"}
_RULES: dict[str, Callable[[_Flat, _Flat], bool]] = {
    "recipe.train.max_steps": _length_is_free,
    "recipe.train.epochs": _length_is_free,
    "recipe.train.early_stop": _more_patient,
    # The moments go on in 16 bits or in 32, as the machine's RAM has it.
    _OPTIMIZER: lambda before, after: {before[_OPTIMIZER], after[_OPTIMIZER]} <= _SAME_OPTIMIZER,
    "recipe.train.keep_best": lambda before, after: bool(before["recipe.train.keep_best"]),
    "recipe.train.on_nan": _was_stop("recipe.train.on_nan"),
    "recipe.train.on_spike": _was_stop("recipe.train.on_spike"),
    "recipe.train.spike_factor": _spike_is_free,
}


def _line(path: str, old: Any, new: Any) -> str:
    if not path.startswith("recipe."):
        return tr("{name}: the content changed ({old} → {new})", name=path, old=_short(old), new=_short(new))
    name = path.removeprefix("recipe.")
    if path in ("recipe.train.max_steps", "recipe.train.epochs"):
        return tr(
            "{name}: {old} → {new} (the learning rate of the steps already made depends on the run's length)",
            name=name,
            old=_show(old),
            new=_show(new),
        )
    return f"{name}: {_show(old)} → {_show(new)}"


def _show(value: Any) -> str:
    if value is _ABSENT:
        return tr("not there")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: Any) -> str:
    text = _show(value)
    return text if len(text) <= 16 else text[:12] + "…"
