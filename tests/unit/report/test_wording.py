from __future__ import annotations

import doctest
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitaeru.report import curve, metrics, wording


@pytest.mark.parametrize("module", [wording, curve, metrics])
def test_examples_in_the_documentation_are_true(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@given(st.floats(0, 1e7))
def test_durations_have_no_sixty_seconds_or_minutes(seconds: float) -> None:
    assert ":60" not in wording.clock_text(seconds)
    words = wording.duration_text(seconds).split()
    assert "60" not in words or words[1] == "h" or words == ["60", "s"]


@given(st.text())
def test_cleaned_text_cannot_steer_a_terminal(text: str) -> None:
    assert not set(wording.clean(text)) & {chr(c) for c in (*range(9), *range(11, 32), 127, *range(128, 160))}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(value: float) -> None:
    for write in (wording.loss_text, wording.rate_text, wording.number_text):
        assert write(value) == str(value)
    assert wording.clock_text(value) == "—"
