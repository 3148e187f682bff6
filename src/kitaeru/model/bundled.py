"""The model inside the package."""

from __future__ import annotations

from pathlib import Path

NAME = "bundled"


def bundled_folder() -> Path:
    """The folder of the bundled model and its tokenizer, in the form `from_pretrained` takes."""
    return Path(__file__).parent.parent / "assets" / "bundled"
