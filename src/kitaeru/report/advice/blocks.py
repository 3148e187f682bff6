"""What a page of advice is made of: blocks that are written as HTML and as Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kitaeru.report.advice.facts import Basis


@dataclass(frozen=True)
class Cell:
    """A text with where it comes from, where that is not said of the whole table."""

    text: str
    basis: Basis | None = None


@dataclass(frozen=True)
class Para:
    """A paragraph; a quiet one is an aside."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Card:
    """One figure with its name, what is beside it, and where it comes from."""

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """Figures side by side."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Table:
    """Rows under a head; columns in `numbers` are set to the right. `basis` holds for every figure in it."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Sequence[int] = ()
    basis: Basis | None = None


@dataclass(frozen=True)
class Item:
    """A finding or an action: a title, a word at its side, sentences, what to type, and its figures."""

    title: str
    mark: str = ""
    lines: Sequence[str] = ()
    code: str = ""
    facts: Sequence[Cell] = ()


@dataclass(frozen=True)
class Items:
    """A list of findings, or numbered actions from `first` on."""

    items: Sequence[Item]
    first: int = 0


@dataclass(frozen=True)
class Drawing:
    """A plot: its HTML, and the same as a table for a page without drawings."""

    title: str
    html: str
    table: Table
    note: str = ""


Block = Para | Cards | Table | Items | Drawing


@dataclass(frozen=True)
class Section:
    """A titled part."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """The whole page."""

    title: str
    sub: str
    sections: Sequence[Section]
    foot: str


@dataclass
class Sources:
    """The places figures come from, numbered as they are first named."""

    found: list[Basis] = field(default_factory=list)

    def number(self, basis: Basis) -> int:
        """The number of a place, from 1."""
        if basis not in self.found:
            self.found.append(basis)
        return self.found.index(basis) + 1
