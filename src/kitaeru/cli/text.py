"""How the command line prints: one console, errors in red on stderr, hanging indents that hold in Japanese too."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kitaeru.errors import KitaeruError
from kitaeru.report.prose import Prose


def console(*, stderr: bool = False) -> Console:
    """A console that prints texts as they are: no markup, no emoji codes, no guessed colours."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_error(error: KitaeruError) -> None:
    """What happened in red, what to do about it below, on stderr."""
    out = console(stderr=True)
    for number, line in enumerate(str(error).splitlines()):
        print_hanging(out, line, style="bold red" if number == 0 else "")


def print_hanging(out: Console, line: str, *, style: str = "") -> None:
    """One line; where it is too long for a terminal it goes on below its own first character (or after its arrow)."""
    body = line.lstrip(" ")
    indent = len(line) - len(body)
    head = "→ " if body.startswith("→ ") else ""
    if not out.is_terminal:
        out.print(Text(line), soft_wrap=True)
        return
    text = Prose(body.removeprefix(head), style)
    out.print(hanging(" " * indent + head, text) if indent or head else text)


def hanging(head: str, text: Prose) -> Table:
    """`text` after `head`; its further lines begin below its first one."""
    grid = Table.grid()
    grid.add_column(width=len(head), no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(head, style="green"), text)
    return grid
