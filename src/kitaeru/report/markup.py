"""The building blocks of the page. Every text is escaped here, unless it says that it is HTML already."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

from kitaeru.report.wording import count_text

_JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


def section(title: str, body: str) -> str:
    """A titled section; `body` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Iterable[int] = (),
    raw: bool = False,
    stack: bool = False,
    labelled: bool = False,
) -> str:
    """A table; columns in `numbers` are set to the right, `raw` cells are HTML already, `stack` folds on a phone, where
    `labelled` cells say the name of their column.
    """
    right = set(numbers)

    def look(tag: str, column: int) -> str:
        label = f' data-label="{escape(head[column])}"' if labelled and tag == "td" and column else ""
        return (' class="n"' if column in right else "") + label

    def cells(tag: str, texts: Sequence[str], done: bool) -> str:
        looks = (look(tag, i) for i in range(len(texts)))
        return "".join(
            f"<{tag}{attributes}>{text if done else escape(text)}</{tag}>"
            for attributes, text in zip(looks, texts, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row, raw)}</tr>" for row in rows)
    folds = ' class="stack"' if stack else ""
    return (
        f'<div class="scroll"><table{folds}><thead><tr>{cells("th", head, False)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    rows = "".join(f'<tr><td class="key-cell">{escape(k)}</td><td>{escape(v)}</td></tr>' for k, v in items)
    return f"<table><tbody>{rows}</tbody></table>"


def bars(title: str, counts: dict[str, int], write: Callable[[float], str] = count_text) -> str:
    """Horizontal bars with their counts; empty without any count."""
    if not counts or not any(counts.values()):
        return ""
    most = max(counts.values())
    rows = "".join(
        f'<span class="name">{escape(name)}</span><span><span class="bar" style="display:block;width:'
        f'{100 * count / most:.1f}%"></span></span><span class="count">{escape(write(count))}</span>'
        for name, count in counts.items()
    )
    return f'<div><h3>{escape(title)}</h3><div class="bars">{rows}</div></div>'


def card(label: str, value: str, note: str) -> str:
    """One figure of the headline."""
    return (
        f'<div class="card"><div class="label">{escape(label)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def lang(text: str) -> str:
    """Japanese text says so, so that its characters get their Japanese shapes in an English page too."""
    return ' lang="ja"' if _JAPANESE.search(text) else ""
