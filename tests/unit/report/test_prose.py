"""Sentences on a terminal: Japanese fills its lines and keeps the rules of punctuation; English breaks at spaces."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kitaeru.report.prose import Prose, breaks


def lines(text: str | Text, width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width, color_system=None)
    out.print(Prose(text))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


def test_japanese_fills_the_line_after_a_number() -> None:
    text = "データソース 1 つ、またはそのリスト。"
    assert lines(text, 20) == ["データソース 1 つ、", "またはそのリスト。"]


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [("これは終わりです。次", 16, ["これは終わりで", "す。次"]), ("これを（中）に", 8, ["これを", "（中）に"])],
)
def test_punctuation_stays_where_it_belongs(text: str, width: int, expected: list[str]) -> None:
    assert lines(text, width) == expected


def test_english_words_and_names_stay_whole() -> None:
    assert lines("Leave `strategy` out of it.", 12) == ["Leave", "`strategy`", "out of it."]
    assert lines("値は `data.seq_len` です", 14) == ["値は", "`data.seq_len`", "です"]


def test_styles_and_given_line_ends_stay() -> None:
    text = Text.assemble(("赤い", "red"), "文字\n二行目")
    assert lines(text, 6) == ["赤い文", "字", "二行目"]
    out = Console(file=io.StringIO(), width=6, force_terminal=True, color_system="standard")
    out.print(Prose(text))
    assert isinstance(out.file, io.StringIO)
    assert "\x1b[31m赤い\x1b[0m文" in out.file.getvalue()


def test_a_column_of_a_table() -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    grid.add_row("valid", Prose("`valid` がない場合に、学習データからこの割合を取り分けます。"))
    out = Console(file=io.StringIO(), width=40, color_system=None)
    out.print(grid)
    assert isinstance(out.file, io.StringIO)
    rows = [row.rstrip() for row in out.file.getvalue().splitlines()]
    assert rows == ["valid  `valid` がない場合に、学習データ", "       からこの割合を取り分けます。"]


@given(st.text(alphabet="あ漢ア、。（）「」ab `.1", max_size=60), st.integers(6, 40))
def test_nothing_is_lost_and_nothing_is_too_wide(text: str, width: int) -> None:
    found = lines(text, width)
    assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text)
    assert all(cell_len(line) <= width for line in found)


@given(st.text(alphabet="あ漢ア、。（）「」ab `.1", max_size=60), st.integers(6, 40))
def test_breaks_rise(text: str, width: int) -> None:
    found = breaks(text, width)
    assert found == sorted(set(found))
    assert all(0 < offset < len(text) for offset in found)
