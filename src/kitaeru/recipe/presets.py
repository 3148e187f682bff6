"""Presets: named sets of values that lie under those of a recipe file. Each is a YAML file in `presets/`.

The comment at the top of the file is not its description: descriptions are shown in two languages, so they stand here.
"""

from __future__ import annotations

from importlib.resources import files

from kitaeru.i18n import N_

# name: what it is for. The file presets/NAME.yaml holds the values.
PRESETS = {
    "quick": N_("A trial of a few minutes: few short examples and steps, to see that everything works."),
    "thorough": N_(
        "More passes over the data with a gentle start and some regularisation; takes several times as long."
    ),
    "low-memory": N_("Fits a large model into little memory: 4-bit base, activation checkpointing, short examples."),
}


def text(name: str) -> str:
    """The YAML of the preset `name`.

    Raises:
        KeyError: there is no such preset.
    """
    if name not in PRESETS:
        raise KeyError(name)
    return (files("kitaeru.recipe") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
