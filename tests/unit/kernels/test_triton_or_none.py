from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from kitaeru.kernels.triton_or_none import cdiv, launch, power_of_two

CODE = "from kitaeru.kernels.triton_or_none import tl, triton; print(triton.__name__, tl.__name__)"


def test_both_names_are_there_where_triton_is(tmp_path: Path) -> None:
    # A linter once took the second import for unused; a machine without Triton does not notice.
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    (tmp_path / "triton" / "language.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout.split() == ["triton", "triton.language"], done.stderr


class Recorder:
    """What `launch` needs of a Triton kernel: it is asked for a grid and called, and gives what it has compiled."""

    arg_names = ("x", "size", "scale", "WIDE", "BLOCK")

    def __init__(self) -> None:
        self.slow: list[tuple[object, ...]] = []
        self.fast: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def call(*arguments: object, **constants: object) -> Compiled:
            self.slow.append((grid, arguments, constants))
            return Compiled(self, len(self.slow))

        return call


@dataclass
class Compiled:
    kernel: Recorder
    number: int

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.kernel.fast.append((self.number, grid, arguments))


def test_a_kernel_is_looked_up_once_for_each_kind_of_arguments() -> None:
    kernel, x, options = Recorder(), torch.zeros(64), {"BLOCK": 16, "WIDE": True, "num_warps": 4}
    calls = [
        (x, 16, 0.5), (x[4:], 16, 0.25),  # alike: both addresses are multiples of 16
        (x[1:], 16, 0.5), (x, 1, 0.5), (x, 17, 0.5), (x.int(), 16, 0.5), (None, 16, 0.5),
    ]  # fmt: skip
    for _ in range(2):
        for number, call in enumerate(calls):
            launch(kernel, (number + 1,), *call, **options)
    assert [call[1] for call in kernel.slow] == [calls[0], *calls[2:]]
    assert [call[0] for call in kernel.fast] == [1, 1, 1, 2, 3, 4, 5, 6]
    # What is compiled takes a whole grid, and the constants in the order of the signature.
    assert kernel.fast[0] == (1, (2, 1, 1), (*calls[1], True, 16))


def test_other_constants_are_another_kernel() -> None:
    kernel, x = Recorder(), torch.zeros(64)
    for block in (16, 32, 16):
        launch(kernel, (1,), x, 16, 0.5, WIDE=False, BLOCK=block)
    assert (len(kernel.slow), len(kernel.fast)) == (2, 1)


@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_sizes_round_up(a: int, b: int) -> None:
    assert (cdiv(a, b) - 1) * b < a <= cdiv(a, b) * b
    assert a <= power_of_two(a) < 2 * a
    assert power_of_two(a).bit_count() == 1
