"""The table of known models is what `kitaeru plan` would choose for each, found by a shorter way."""

from __future__ import annotations

import pytest

from kitaeru.errors import PlanError
from kitaeru.hardware import parse_gpus
from kitaeru.plan.choose import survey
from kitaeru.plan.known import models
from kitaeru.recipe.read import read
from kitaeru.shape import ModelShape, catalogue

# Small and large, a mixture, one that fits only in ways that are not built, one that fits in none.
NAMES = ("llm-jp/llm-jp-3-1.8b", "elyza/Llama-3-ELYZA-JP-8B", "tokyotech-llm/Swallow-13b-hf",
         "codellama/CodeLlama-34b-hf", "mistralai/Mixtral-8x7B-v0.1", "meta-llama/Llama-3.1-405B")  # fmt: skip


@pytest.mark.parametrize("gpus", ["RTX 3090", "2x RTX A5000", "RTX A6000, RTX A4000"])
def test_the_same_choice(gpus: str) -> None:
    hardware = parse_gpus(gpus, "128GB")
    entries = [entry for entry in catalogue() if entry.name in NAMES]
    assert len(entries) == len(NAMES)
    for entry, known in zip(entries, models(hardware, entries=entries), strict=True):
        recipe = read(None, values={"model": entry.name, "data.train": ["-"]}).recipe
        try:
            found = survey(recipe, hardware, ModelShape.from_config(entry.config, entry.name))
        except PlanError:
            assert known.best is None
            continue
        wanted = found.plan.chosen if found.plan else next(c for c in found.candidates if c.fits)
        assert known.best is not None
        assert (known.best.layout, known.best.speed, known.best.memory) == (wanted.layout, wanted.speed, wanted.memory)
