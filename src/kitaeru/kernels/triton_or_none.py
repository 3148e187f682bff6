"""Triton where there is one: it comes with torch's CUDA builds and not with its CPU builds."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
if importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels compute for this tensor; else the reference does."""
    return triton is not None and tensor.is_cuda


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes ten times as long on the host.

    >>> cdiv(129, 64)
    3
    """
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest that is not below n >= 1.

    >>> power_of_two(1), power_of_two(48)
    (1, 64)
    """
    return 1 << (n - 1).bit_length()


# Kernels as compiled, and their constants in order, by everything that they were compiled for.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, where only the first call for arguments of such kinds lets Triton look
    at all of them: it takes a fifth of the host's time afterwards. Constants come last in the kernel's signature.

    Numbers are told apart by value and tensors by dtype and whether their address is a multiple of 16, which is finer
    than what Triton compiles for.
    """
    kinds = tuple([_kind(argument) for argument in arguments])
    key = (id(kernel), _device(), kinds, *constants.values())
    found = _compiled.get(key)
    if found is None:
        made = kernel[grid](*arguments, **constants)
        if made is not None:  # Triton's interpreter gives nothing
            _compiled[key] = made, tuple(constants[name] for name in kernel.arg_names if name in constants)
        return
    made, rest = found
    made[(*grid, 1, 1)](*arguments, *rest)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() & 15
    return float if isinstance(argument, float) else argument


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1
