"""The plan of every known model on six machines, as tables a person can read: a change of the planner is a change here.

After a change that is meant: `python tests/golden/test_plans.py` writes the tables anew; `git diff` shows what it did.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from kitaeru.errors import PlanError
from kitaeru.hardware import parse_gpus
from kitaeru.plan.choose import survey
from kitaeru.plan.types import Candidate
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape, catalogue

MACHINES: dict[str, tuple[str, str]] = {
    "1x-rtx-3090": ("RTX 3090", "64GB"),
    "2x-rtx-a5000": ("2x RTX A5000", "128GB"),
    "4x-rtx-4090": ("4x RTX 4090", "256GB"),
    "1x-h100": ("H100", "256GB"),
    "8x-h100": ("8x H100, nvlink", "1TB"),
    "a6000-and-a4000": ("RTX A6000, RTX A4000", "96GB"),
}
# Beside each model's own best: whole training of the sizes that people ask for first.
FULL = ("meta-llama/Llama-2-7b-hf", "elyza/Llama-3-ELYZA-JP-8B")
HEAD = f"{'model':<50}{'best built':<38}{'GB':>6}{'tokens/s':>17}   {'best not built yet':<50}{'GB':>6}{'tokens/s':>17}"


def table(gpus: str, ram: str) -> str:
    """One line a model: the chosen way with its memory and range of speed, and a faster one that is not built."""
    hardware = parse_gpus(gpus, ram)
    lines = [f"{gpus}, {ram}: 2,048 tokens an example, 16,384 a step; GB on the fullest device", "", HEAD]
    shapes = [ModelShape.from_config(entry.config, entry.name) for entry in catalogue()]
    lines += [_line(shape.name, shape, hardware, "auto", 16384) for shape in shapes]
    lines += ["", "full, 131,072 tokens a step"]
    for name in FULL:
        shape = ModelShape.from_catalogue(name)
        assert shape is not None
        lines.append(_line(name, shape, hardware, "full", 131072))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _line(name: str, shape: ModelShape, hardware: object, method: str, batch: int) -> str:
    values = {"model": name, "data": {"train": "d"}, "method": method, "train": {"global_batch_tokens": batch}}
    try:
        found = survey(Recipe.model_validate(values), hardware, shape)  # type: ignore[arg-type]
    except PlanError as error:
        return f"{name:<50}— {str(error).splitlines()[-1].strip(' →')}"
    chosen = found.plan.chosen if found.plan else None
    others = [c for c in found.candidates if c.fits and not c.built]
    faster = [c for c in others if chosen is None or _rate(c) > 1.02 * _rate(chosen)]
    waiting = max(faster, key=_rate, default=None)
    return f"{name:<50}{_cells(chosen, 38)}   {_cells(waiting, 50)}"


def _rate(candidate: Candidate) -> float:
    assert candidate.speed is not None
    return candidate.speed.tokens_per_second


def _cells(candidate: Candidate | None, width: int) -> str:
    if candidate is None:
        return f"{'—':<{width + 23}}"
    speed = candidate.speed
    assert speed is not None
    rate = f"{float(f'{speed.low:.2g}'):,.0f}-{float(f'{speed.high:.2g}'):,.0f}"
    return f"{candidate.layout.name:<{width}}{max(candidate.device_peaks) / 1e9:>6.1f}{rate:>17}"


def file_of(name: str) -> Path:
    return Path(__file__).parent / f"{name}.txt"


@pytest.mark.parametrize("name", MACHINES)
def test_the_plans_are_the_kept_ones(name: str) -> None:
    kept = file_of(name).read_text(encoding="utf-8").splitlines()
    now = table(*MACHINES[name]).splitlines()
    changed = [f"- {a}\n+ {b}" for a, b in zip(kept, now, strict=False) if a != b]
    assert not changed, "\n".join([*changed, "If this is meant: python tests/golden/test_plans.py"])
    assert len(kept) == len(now)
    assert all(unicodedata.category(character)[0] != "C" for line in kept for character in line)


if __name__ == "__main__":
    for machine_name, words in MACHINES.items():
        file_of(machine_name).write_text(table(*words), encoding="utf-8")
