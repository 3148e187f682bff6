"""Triton where there is one: it comes with torch's CUDA builds and not with its CPU builds."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

triton: Any = None
tl: Any = None
if importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels compute for this tensor; else the reference does."""
    return triton is not None and tensor.is_cuda
