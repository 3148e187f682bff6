"""Errors on a terminal: what happened stands out, and long lines hang below their own beginning."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from kitaeru.cli.text import print_hanging


def printed(line: str, *, width: int) -> list[str]:
    out = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    print_hanging(out, line)
    assert isinstance(out.file, io.StringIO)
    return [text.rstrip() for text in out.file.getvalue().splitlines()]


def test_a_long_remedy_hangs_after_its_arrow() -> None:
    assert printed("  → Write this and that, then more.", width=20) == ["  → Write this and", "    that, then more."]


def test_japanese_is_measured_in_columns() -> None:
    lines = printed("  → " + "日本語の長い文を折り返す", width=16)
    assert lines == ["  → 日本語の長い", "    文を折り返す"]
    assert max(Text(line).cell_len for line in lines) <= 16


def test_brackets_are_no_markup() -> None:
    assert printed("data.train[0]: [red]", width=80) == ["data.train[0]: [red]"]


def test_lines_stay_whole_for_a_program() -> None:
    out = Console(file=io.StringIO(), width=20)
    print_hanging(out, "x " * 40)
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue() == "x " * 40 + "\n"
