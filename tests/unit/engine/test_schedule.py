import doctest

import pytest

from kitaeru.engine import schedule
from kitaeru.engine.schedule import rate, warmup_steps
from kitaeru.recipe.types import TrainSection


def rates(total, **fields):
    section = TrainSection(**fields)
    return [round(rate(step, total, section), 4) for step in range(total)]


def test_the_docstring_example():
    assert doctest.testmod(schedule).attempted > 0
    assert doctest.testmod(schedule).failed == 0


def test_linear_to_a_final_rate():
    assert rates(4, schedule="linear", warmup_steps=0, final_rate=0.2) == [1.0, 0.8, 0.6, 0.4]


def test_cosine_is_half_way_in_the_middle():
    assert rates(4, schedule="cosine", warmup_steps=0) == [1.0, 0.8536, 0.5, 0.1464]


def test_constant_with_warmup():
    assert rates(5, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_wsd_holds_and_then_falls_in_the_last_share_of_the_steps():
    assert rates(10, schedule="wsd", warmup_steps=2, decay_fraction=0.4) == [0.5, *[1.0] * 6, 0.75, 0.5, 0.25]


def test_warmup_steps_come_before_the_fraction():
    assert warmup_steps(200, TrainSection(warmup_fraction=0.1)) == 20
    assert warmup_steps(200, TrainSection(warmup_fraction=0.1, warmup_steps=3)) == 3
    assert warmup_steps(200, TrainSection(warmup_fraction=0.1, warmup_steps=0)) == 0


def test_a_run_shorter_than_its_warmup_stops_on_the_way_up():
    assert rates(2, warmup_steps=10) == [0.1, 0.2]


@pytest.mark.parametrize(("step", "total"), [(-1, 5), (0, 0)])
def test_nonsense_is_refused(step, total):
    with pytest.raises(ValueError, match="of"):
        rate(step, total, TrainSection())
