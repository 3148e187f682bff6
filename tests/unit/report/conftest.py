"""A run folder as training would leave it: real events through the real log, a real plan and recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """The module that makes runs."""
    return _load("synthetic")


@pytest.fixture
def run_dir(made: ModuleType, tmp_path: Path) -> Path:
    """A finished run of 60 steps."""
    return made.finished(tmp_path / "quickstart")


@pytest.fixture
def make(made: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """`make("resumed")` and so on: the makers of synthetic.py in a folder of this test."""
    return lambda name, **kwargs: getattr(made, name)(tmp_path / name, **kwargs)
