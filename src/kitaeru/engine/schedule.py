"""Learning-rate schedules: a pure function of the step, so a resumed run needs no schedule state."""

from __future__ import annotations

import math

from kitaeru.recipe.types import TrainSection


def rate(step: int, total: int, section: TrainSection) -> float:
    """The share of the peak learning rate used by optimizer step `step` (counted from 0) of a run of `total` steps.

    Warm-up rises as (step + 1)/warm-up, so the first step is never made at rate 0. What falls starts at 1 and would
    reach `final_rate` right after the last step, so the last step is not lost either.

        >>> [round(rate(s, 6, TrainSection(schedule="linear", warmup_steps=2)), 3) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]

    Returns:
        A number in (0, 1]; `final_rate` for steps past the end.

    Raises:
        ValueError: `step` is negative or `total` is below 1.
    """
    if step < 0 or total < 1:
        raise ValueError(f"step {step} of {total}")
    warmup = warmup_steps(total, section)
    if step < warmup:
        return (step + 1) / warmup
    if section.schedule == "constant":
        return 1.0
    begin = warmup
    if section.schedule == "wsd":
        begin = max(warmup, total - max(1, round(total * section.decay_fraction)))
    fallen = _fallen(step, begin, total)
    if section.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    # Written so that both ends are exact: 1 at fallen = 0 and final_rate at fallen = 1.
    return (1 - fallen) + fallen * section.final_rate


def warmup_steps(total: int, section: TrainSection) -> int:
    """Steps of warm-up in a run of `total` steps: `warmup_steps`, else `warmup_fraction` rounded to whole steps."""
    return section.warmup_steps if section.warmup_steps is not None else round(total * section.warmup_fraction)


def _fallen(step: int, begin: int, total: int) -> float:
    """How much of the way from `begin` to `total` lies behind `step`, from 0 to 1."""
    if step >= total:
        return 1.0
    return max(0, step - begin) / (total - begin)
