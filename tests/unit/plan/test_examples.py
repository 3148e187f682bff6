"""The formulas' worked examples in the docstrings are run."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("hardware", "shape", "machine.probe", "plan.stored", "plan.activations", "plan.memory", "plan.decide",
           "plan.problem", "plan.ranks", "plan.host", "plan.rates", "plan.work", "plan.pipeline",
           "plan.what_if", "plan.fused", "plan.calibrate")  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(f"kitaeru.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
