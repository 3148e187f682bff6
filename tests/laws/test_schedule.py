"""What every schedule keeps, whatever the recipe."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from kitaeru.engine.schedule import rate, warmup_steps
from kitaeru.recipe.types import TrainSection

SCHEDULES = ("linear", "cosine", "constant", "wsd")
TOTALS = st.integers(1, 300)


@st.composite
def sections(draw, schedules=SCHEDULES):
    return TrainSection(
        schedule=draw(st.sampled_from(schedules)),
        warmup_steps=draw(st.none() | st.integers(0, 50)),
        warmup_fraction=draw(st.floats(0, 0.99)),
        decay_fraction=draw(st.floats(0.01, 1)),
        final_rate=draw(st.floats(0, 1)),
    )


def curve(total, section):
    return [rate(step, total, section) for step in range(total)]


@given(TOTALS, sections())
def test_every_step_is_made_at_a_rate_above_zero_and_at_most_one(total, section):
    rates = curve(total, section)
    assert all(0 < value <= 1 for value in rates)
    warmup = warmup_steps(total, section)
    if warmup < total:
        assert max(rates) == 1.0
        assert min(rates[warmup:]) >= section.final_rate - 1e-12


@given(TOTALS, sections())
def test_it_rises_in_warmup_and_never_after(total, section):
    rates = curve(total, section)
    warmup = min(warmup_steps(total, section), total)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b - 1e-15 for a, b in itertools.pairwise(rates[max(0, warmup - 1) :]))  # but for rounding


@given(TOTALS, sections(("linear", "cosine")), st.floats(0, 0.9))
def test_linear_and_cosine_fall_with_every_step_after_the_peak(total, section, final):
    section = section.model_copy(update={"final_rate": final})
    after = curve(total, section)[warmup_steps(total, section) :]
    assert all(a > b for a, b in itertools.pairwise(after))


@given(TOTALS, sections())
def test_no_jump_is_larger_than_the_steepest_slope(total, section):
    warmup = warmup_steps(total, section)
    falling = total - warmup
    if section.schedule == "wsd":
        falling = min(falling, max(1, round(total * section.decay_fraction)))
    steepest = math.pi / 2 / max(1, falling)  # the middle of a cosine; a line is 1
    for step, (a, b) in enumerate(itertools.pairwise([*curve(total, section), rate(total, total, section)])):
        assert abs(b - a) <= (1 / warmup if step + 1 < warmup else steepest) + 1e-12


@given(TOTALS, sections(("linear", "cosine", "wsd")))
def test_it_arrives_at_the_final_rate_right_after_the_last_step(total, section):
    section = section.model_copy(update={"warmup_steps": 0})
    assert rate(total, total, section) == section.final_rate
    assert rate(total + 7, total, section) == section.final_rate


@given(TOTALS, sections(("wsd",)))
def test_wsd_that_decays_all_the_time_is_linear(total, section):
    whole = section.model_copy(update={"decay_fraction": 1.0})
    assert curve(total, whole) == curve(total, section.model_copy(update={"schedule": "linear"}))


@given(sections())
def test_a_run_of_one_step_makes_it(section):
    assert 0 < rate(0, 1, section) <= 1
