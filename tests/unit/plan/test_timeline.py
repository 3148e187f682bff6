"""What is drawn of a step is the step that was priced: every device's spans, in order, as long as it works."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kitaeru.hardware import parse_gpus
from kitaeru.plan.choose import Pricing
from kitaeru.plan.problem import state
from kitaeru.plan.timeline import day
from kitaeru.plan.types import Candidate
from kitaeru.recipe.read import read
from kitaeru.shape import find_shape

MODEL = "elyza/Llama-3-ELYZA-JP-8B"


def fitting(gpus: str, **values: object) -> tuple[Pricing, dict[str, Candidate]]:
    recipe = read(None, values={"model": MODEL, "data.train": ["-"], "method": "qlora", **values}).recipe
    pricing = Pricing(state(recipe, parse_gpus(gpus, "128GB"), find_shape(MODEL), None))
    found = sorted((c for c in pricing.price() if c.fits), key=lambda c: -c.speed.step_seconds if c.speed else 0.0)
    return pricing, {c.layout.way: c for c in found}


@pytest.mark.parametrize("gpus", ["RTX A5000", "2x RTX A5000", "RTX A6000, RTX A4000"])
def test_spans_are_the_step(gpus: str) -> None:
    pricing, ways = fitting(gpus)
    assert len(ways) >= (1 if gpus == "RTX A5000" else 6)
    for way, candidate in ways.items():
        layout = candidate.layout
        found = day(layout, find_shape(MODEL), *pricing.work(layout))
        assert candidate.speed is not None
        assert found.seconds == pytest.approx(candidate.speed.step_seconds, rel=1e-6), way
        assert found.micro_batches == candidate.speed.micro_batches
        working = []
        for rank in range(layout.devices):
            spans = [span for span in found.spans if span.rank == rank]
            assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans)), way
            assert spans[-1].end <= found.seconds * (1 + 1e-6)
            assert sum(span.kind == "forward" for span in spans) == found.micro_batches * layout.chunks
            working.append(sum(s.end - s.start for s in spans if s.kind != "waiting"))
        assert max(working) <= found.seconds * (1 + 1e-6)


def test_stages_overlap() -> None:
    pricing, ways = fitting("2x RTX A5000")

    def overlap(way: str) -> float:
        found = day(ways[way].layout, find_shape(MODEL), *pricing.work(ways[way].layout))
        passes = [[s for s in found.spans if s.rank == rank and s.kind in ("forward", "backward")] for rank in (0, 1)]
        return sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in passes[0] for b in passes[1])

    for way in ("pipeline-1f1b", "model_parallel"):
        assert overlap(way) > 0.5 * day(ways[way].layout, find_shape(MODEL), *pricing.work(ways[way].layout)).seconds
