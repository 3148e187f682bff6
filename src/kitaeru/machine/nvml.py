"""Questions to the NVIDIA driver through its own library, answered with a default where it cannot answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class NoDriver(Exception):  # noqa: N818 - a fact about the machine, no fault
    """The driver cannot be asked; the text is its own reason."""


@contextmanager
def opened() -> Iterator[Any]:
    """The library (`pynvml`), ready for questions.

    Raises:
        NoDriver: no library, no driver, no permission.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:
        raise NoDriver(str(error) or type(error).__name__) from error
    try:
        yield nvml
    finally:
        with suppress(Exception):
            nvml.nvmlShutdown()


def ask(nvml: Any, function: str, *arguments: Any, default: Any) -> Any:
    """One question to the driver; `default` where this driver or card cannot answer it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return default


def text(value: Any) -> str:
    """What the library says, which in its older versions are bytes.

    >>> text(b"GPU-1"), text("GPU-1"), text(None)
    ('GPU-1', 'GPU-1', '')
    """
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
