"""The command line: one file per verb."""

from __future__ import annotations


def main() -> int:
    """Run the command line and return the exit code."""
    raise NotImplementedError
