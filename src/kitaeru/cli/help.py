"""Help pages in the language in force: plain tables that hold in 80 columns, whatever the width of the letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cyclopts.help import HelpEntry, HelpPanel, InlineText
from rich.console import Console, ConsoleOptions
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kitaeru.i18n import tr
from kitaeru.report.prose import Prose


class Formatter:
    """Renders what cyclopts knows of a command. Texts that are still ids of the catalogue are translated here."""

    show_metavar = True

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        """The first line."""
        line = str(usage).strip() if usage else ""
        words = {"COMMAND": tr("COMMAND"), "[OPTIONS]": tr("[OPTIONS]"), "[ARGS]": tr("[ARGS]")}
        shown = " ".join(words.get(word, word) for word in line.split(" "))
        console.print(Text(tr("Usage: {line}", line=shown), style="bold"))

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """What the command does."""
        if text := _plain(description):
            console.print()
            console.print(Prose(tr(text)))

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """One table of commands or parameters; parameters without a name come first, in a table of their own."""
        bare = [entry for entry in panel.entries if entry.positional_label]
        named = [entry for entry in panel.entries if not entry.positional_label]
        for title, entries in ((tr("Arguments"), bare), (_plain(panel.title), named)):
            if entries:
                self._table(console, title, entries)

    def _table(self, console: Console, title: str, entries: Sequence[HelpEntry]) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="cyan", overflow="fold", max_width=max(24, console.width * 2 // 5))
        table.add_column(overflow="fold")
        for entry in entries:
            table.add_row(_names(entry), Prose(_what(entry)))
        console.print()
        console.print(Text(title, style="bold"))
        console.print(Padding(table, (0, 0, 0, 2)))


def _names(entry: HelpEntry) -> str:
    if entry.positional_label:
        return entry.positional_label
    return ", ".join(entry.display_labels_with_metavar)


def _what(entry: HelpEntry) -> Text:
    description = _plain(entry.description)
    text = Text(tr(description))
    notes = []
    if entry.choices:
        notes.append(tr("choices: {choices}", choices=", ".join(entry.choices)))
    if entry.default is not None and entry.default not in ("None", "False"):
        notes.append(tr("default: {value}", value=entry.default))
    if entry.required and not entry.positional_label:
        notes.append(tr("required"))
    for note in notes:
        text.append(f" [{note}]", style="dim")
    return text


def _plain(value: Any) -> str:
    """The text inside what cyclopts hands over."""
    if isinstance(value, InlineText):
        value = value.primary_renderable
    text = value.plain if isinstance(value, Text) else str(value or "")
    return text.strip()
