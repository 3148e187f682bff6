"""Sentences for a terminal that wrap in Japanese as well as in English.

rich breaks lines at spaces alone. Japanese has few, beside numbers and names, so that lines would end far too early.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len, get_character_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

# 禁則: what must not begin a line, and what must not end one.
_NOT_FIRST = frozenset(
    "、。，．・：；？！…ー々）」』】〕］｝〉》”’％ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ.,:;!?%)]}⟧"
)
_NOT_LAST = frozenset("（「『【〔［｛〈《“‘([{⟦")


class Prose:
    """A text that may break at spaces and between Japanese letters, but not before 「。」 or after 「（」."""

    def __init__(self, text: Text | str, style: str = "") -> None:
        self._text = text if isinstance(text, Text) else Text(text, style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._text.split(allow_blank=True):
            for piece in line.divide(breaks(line.plain, options.max_width)):
                piece.rstrip()
                yield piece

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        lines = self._text.plain.splitlines() or [""]
        narrowest = max(cell_len(part.rstrip()) for line in lines for part in _parts(line))
        widest = max(cell_len(line) for line in lines)
        return Measurement(narrowest, widest).with_maximum(options.max_width)


def breaks(line: str, width: int) -> list[int]:
    """Where `line` breaks to fit into `width` columns.

    >>> breaks("4 ビットのベース、短い文。", 12)
    [6, 12]
    >>> breaks("Leave `strategy` out.", 12)
    [6, 17]
    """
    found: list[int] = []
    start = last = used = 0
    for index, character in enumerate(line):
        if _may_break(line, index):
            last = index
        used += get_character_cell_size(character)
        if used > width and character != " " and index > start:
            start = last if last > start else index
            found.append(start)
            used = cell_len(line[start : index + 1])
    return found


def _may_break(line: str, index: int) -> bool:
    if index == 0 or line[index] == " ":
        return False
    before, after = line[index - 1], line[index]
    if before == " ":
        return True
    wide = get_character_cell_size(before) == 2 or get_character_cell_size(after) == 2
    return wide and before not in _NOT_LAST and after not in _NOT_FIRST


def _parts(line: str) -> Iterator[str]:
    start = 0
    for index in range(1, len(line)):
        if _may_break(line, index):
            yield line[start:index]
            start = index
    yield line[start:]
