"""Advice as one HTML page, with the style and the script of a run's report."""

from __future__ import annotations

from html import escape

from kitaeru.i18n import tr
from kitaeru.report.advice.blocks import Block, Cards, Cell, Document, Drawing, Item, Items, Para, Sources, Table
from kitaeru.report.advice.facts import Basis, Kind
from kitaeru.report.document import html_document
from kitaeru.report.markup import section, table


def kind_text(kind: Kind) -> str:
    """How a figure is known, in a word."""
    return {"measured": tr("measured"), "predicted": tr("predicted"), "stated": tr("stated")}[kind]


def to_html(document: Document) -> str:
    """The whole page."""
    sources = Sources()
    parts = [
        f'<header><p class="brand">kitaeru</p><h1>{escape(document.title)}</h1>'
        f'<p class="sub">{escape(document.sub)}</p></header>'
    ]
    parts += [section(part.title, "".join(block(b, sources) for b in part.blocks)) for part in document.sections]
    if sources.found:
        rows = "".join(
            f'<li id="source-{n}"><b class="{b.kind}">{escape(kind_text(b.kind))}</b>: {escape(b.source)}</li>'
            for n, b in enumerate(sources.found, 1)
        )
        parts.append(section(tr("Where the figures come from"), f'<ol class="sources">{rows}</ol>'))
    body = "".join(parts)
    return html_document(f"{document.title} · kitaeru", f"<main>{body}<footer>{escape(document.foot)}</footer></main>")


def block(item: Block, sources: Sources) -> str:
    """One block."""
    match item:
        case Para():
            return f"<p{' class=soft' if item.quiet else ''}>{escape(item.text)}</p>"
        case Cards():
            cards = "".join(
                f'<div class="card"><div class="label">{escape(card.label)}</div>'
                f'<div class="value">{_cell(card.value, sources)}</div>'
                f'<div class="note">{escape(card.note)}</div></div>'
                for card in item.cards
            )
            return f'<div class="cards">{cards}</div>'
        case Table():
            rows = [[_cell(cell, sources) for cell in row] for row in item.rows]
            drawn = table(item.head, rows, numbers=item.numbers, raw=True, stack=True, labelled=True)
            return drawn + (f'<p class="caption">{_mark(item.basis, sources)}</p>' if item.basis else "")
        case Items():
            return "".join(_item(one, item.first + n if item.first else 0, sources) for n, one in enumerate(item.items))
        case Drawing():
            basis = _mark(item.table.basis, sources) if item.table.basis else ""
            note = f'<p class="caption">{escape(item.note)}</p>' if item.note else ""
            return (
                f'<figure class="lanes-box"><figcaption><b>{escape(item.title)}</b>{basis}</figcaption>'
                f"{item.html}{note}</figure>"
            )


def _item(item: Item, number: int, sources: Sources) -> str:
    mark = f'<span class="gain">{escape(item.mark)}</span>' if item.mark else ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in item.lines)
    facts = " · ".join(_cell(cell, sources) for cell in item.facts)
    facts = f'<p class="soft">{facts}</p>' if facts else ""
    code = ""
    if item.code:
        copy, copied = escape(tr("Copy")), escape(tr("Copied"))
        code = f'<div class="recipe" data-copy="{copy}" data-copied="{copied}"><pre>{escape(item.code)}</pre></div>'
    head = f'<span class="number">{number}</span>' if number else ""
    return f'<div class="item"><h3>{head}{escape(item.title)}{mark}</h3>{lines}{facts}{code}</div>'


def _cell(cell: Cell, sources: Sources) -> str:
    text = escape(cell.text)
    return text if cell.basis is None else f"{text} {_mark(cell.basis, sources)}"


def _mark(basis: Basis, sources: Sources) -> str:
    number = sources.number(basis)
    return (
        f'<a class="basis {basis.kind}" href="#source-{number}" title="{escape(basis.source)}">'
        f"{escape(kind_text(basis.kind))}<sup>{number}</sup></a>"
    )
