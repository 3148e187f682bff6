"""Advice as Markdown, for a wiki, an issue or a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kitaeru.i18n import tr
from kitaeru.report.advice.blocks import Block, Cards, Cell, Document, Drawing, Item, Items, Para, Sources, Table
from kitaeru.report.advice.facts import Basis
from kitaeru.report.advice.html import kind_text


def to_markdown(document: Document) -> str:
    """The page as Markdown (CommonMark with tables)."""
    sources = Sources()
    parts = [f"# {_plain(document.title)}", _plain(document.sub)]
    for section in document.sections:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            parts += _block(block, sources)
    if sources.found:
        parts.append(f"## {tr('Where the figures come from')}")
        rows = [f"{n}. **{kind_text(b.kind)}**: {_plain(b.source)}" for n, b in enumerate(sources.found, 1)]
        parts.append("\n".join(rows))
    parts.append(f"---\n\n{_plain(document.foot)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block, sources: Sources) -> Iterator[str]:
    match block:
        case Para():
            yield _plain(block.text)
        case Cards():
            rows = [
                f"- **{_plain(card.label)}**: {_cell(card.value, sources)}"
                + (f" · {_plain(card.note)}" if card.note else "")
                for card in block.cards
            ]
            yield "\n".join(rows)
        case Table():
            yield from _table(block, sources)
        case Items():
            yield "\n\n".join(_item(item, block.first + n if block.first else 0, sources)
                              for n, item in enumerate(block.items))  # fmt: skip
        case Drawing():
            yield f"### {_plain(block.title)}"
            yield from _table(block.table, sources)
            yield _plain(block.note)


def _table(table: Table, sources: Sources) -> Iterator[str]:
    rule = ["---:" if i in table.numbers else "---" for i in range(len(table.head))]
    rows = [[_plain(text) for text in table.head], rule]
    rows += [[_cell(cell, sources) for cell in row] for row in table.rows]
    yield "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    if table.basis is not None:
        yield _mark(table.basis, sources)


def _item(item: Item, number: int, sources: Sources) -> str:
    head = f"{number}. " if number else "- "
    indent = " " * len(head)
    mark = f" ({_plain(item.mark)})" if item.mark else ""
    lines = [f"{head}**{_plain(item.title)}**{mark}"]
    lines += [f"{indent}{_plain(line)}" for line in item.lines]
    if item.facts:
        lines.append(indent + " · ".join(_cell(cell, sources) for cell in item.facts))
    if item.code:
        fence = [f"{indent}{line}" for line in ("```bash", *item.code.splitlines(), "```")]
        lines += ["", *fence]
    return "\n".join(lines)


def _cell(cell: Cell, sources: Sources) -> str:
    text = _plain(cell.text)
    return text if cell.basis is None else f"{text} {_mark(cell.basis, sources)}"


def _mark(basis: Basis, sources: Sources) -> str:
    return f"({kind_text(basis.kind)} [{sources.number(basis)}])"


def _plain(text: str) -> str:
    """Text that Markdown takes as it is: names with underscores or stars do not become emphasis."""
    return re.sub(r"([\\*_<>#\[\]])", r"\\\1", text)
