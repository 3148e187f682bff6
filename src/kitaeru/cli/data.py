"""`kitaeru data check`: what the trainer will see, and what is odd about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kitaeru.cli.text import console, hanging
from kitaeru.i18n import tr
from kitaeru.report.prose import Prose
from kitaeru.report.wording import clean, count_text, percent_text

if TYPE_CHECKING:
    from kitaeru.data.check import Check, Lengths, Shown
    from kitaeru.data.findings import Finding
    from kitaeru.data.read import Reading
    from kitaeru.data.tokenise import Tokenised

_BAR_WIDTH = 36
_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_OPEN, _CLOSE = "⟦", "⟧"
# A run of text longer than this is shown by its two ends.
_LONGEST_RUN = 480


def check(
    files: Annotated[list[str], Parameter(help=tr("Files, folders or Hub data set ids."), negative="")],
    *,
    model: Annotated[str, Parameter(help=tr("Whose tokenizer and chat template: `bundled`, a folder or a Hub id."))] = (
        "bundled"
    ),
    kind: Annotated[
        Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"],
        Parameter(help=tr("The form of the rows.")),
    ] = "auto",
    columns: Annotated[
        dict[str, str] | None,
        Parameter(help=tr("Columns with other names, for example --columns.output response."), negative=""),
    ] = None,
    split: Annotated[str, Parameter(help=tr("The split of a Hub data set."))] = "train",
    seq_len: Annotated[int | None, Parameter(help=tr("The longest example in tokens: say which are longer."))] = None,
    rows: Annotated[int, Parameter(help=tr("How many rows to show."))] = 3,
    max_examples: Annotated[int | None, Parameter(help=tr("Read at most so many rows of each source."))] = None,
    train_on: Annotated[
        Literal["assistant", "all"], Parameter(help=tr("Which turns of a conversation are trained."))
    ] = "assistant",
    system: Annotated[str | None, Parameter(help=tr("A system message for conversations that have none."))] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="", help=tr("Print one JSON object."))] = False,
) -> int:
    """Show rows as the trainer sees them with the mask in colour, and statistics.

    Returns the exit code: 1 when a row is bad or a mask would stop a run.
    """
    from kitaeru.data.check import check as inspect  # imports torch: seconds
    from kitaeru.data.read import gather
    from kitaeru.model.tokenizer import load_tokenizer
    from kitaeru.recipe.types import ModelSection, SourceSection

    sources = [SourceSection(path=file, kind=kind, columns=columns, split=split) for file in files]
    reading = gather(sources, max_examples=max_examples, system=system)
    tokenizer = load_tokenizer(ModelSection(name=model))
    tokenised = _tokenise(reading, tokenizer, train_on)
    found = inspect(reading, tokenised, tokenizer, train_on=train_on, seq_len=seq_len, shown=rows)
    if json_:
        print(json.dumps(asdict(found), ensure_ascii=False, indent=2))
    else:
        print_check(console(), found)
    return 0 if found.ok else 1


def _tokenise(reading: Reading, tokenizer: object, train_on: Literal["assistant", "all"]) -> Tokenised:
    from kitaeru.data.tokenise import cache_folder, tokenise

    columns = (TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), MofNCompleteColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(tr("Tokenising"), total=len(reading.rows))
        return tokenise(
            reading.rows,
            tokenizer,
            train_on=train_on,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            cache=cache_folder(),
        )


def print_check(out: Console, found: Check) -> None:
    """Print `found` for a person: colours on a terminal, brackets round trained text elsewhere."""
    _print_sources(out, found)
    coloured = out.is_terminal and not out.no_color
    if found.examples:
        legend = tr("Rows as the trainer sees them; what it learns to write is {mark}", mark="")
        mark = Text(tr("in this colour"), "green") if coloured else Text(f"{_OPEN}{tr('in brackets')}{_CLOSE}")
        out.print(Rule(style="dim"))
        out.print(Prose(Text(legend) + mark))
    for shown in found.examples:
        _print_row(out, shown, coloured)
    out.print(Rule(style="dim"))
    _print_numbers(out, found)
    if found.lengths:
        _print_lengths(out, found.lengths)
    for finding in found.findings:
        _print_finding(out, finding)
    _print_verdict(out, found)


def _print_sources(out: Console, found: Check) -> None:
    for source in found.sources:
        out.print(Text(clean(source.path), "bold"))
        kind = source.kind or "—"
        line = tr("kind {kind}: {reason}", kind=kind, reason=source.recognised) if source.recognised else kind
        counts = tr("rows: {rows} in {files} files", rows=count_text(source.rows), files=len(source.files))
        if len(source.files) == 1:
            counts = tr("rows: {rows}", rows=count_text(source.rows))
        if source.skipped:
            counts += ", " + tr("bad: {skipped}", skipped=count_text(source.skipped))
        _indented(out, Prose(clean(line)))
        _indented(out, Text(counts))
    for problem in found.bad:
        _indented(out, Prose("✗ " + clean(problem), "red"))
    if found.bad_rows > len(found.bad):
        _indented(out, Text(tr("… and {count} more", count=found.bad_rows - len(found.bad)), "red"))


def _print_row(out: Console, shown: Shown, coloured: bool) -> None:
    share = percent_text(shown.trained_tokens / max(shown.tokens, 1))
    head = tr("{origin} · {tokens} tokens, {share} trained", origin=shown.origin, tokens=shown.tokens, share=share)
    out.print(Text("\n" + clean(head), "bold"))
    body = Text()
    for text, trained in shown.segments:
        run = _shortened(clean(text))
        if coloured:
            body.append(run, "green" if trained else "dim")
        else:
            body.append(f"{_OPEN}{run}{_CLOSE}" if trained else run)
    _indented(out, body)


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_RUN:
        return text
    half = _LONGEST_RUN // 2
    left_out = tr("[… {count} characters …]", count=count_text(len(text) - 2 * half))
    return f"{text[:half]} {left_out} {text[-half:]}"


def _print_numbers(out: Console, found: Check) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    trained = tr("{count} of them", count=count_text(found.trained_tokens))
    table.add_row(tr("Rows"), count_text(found.rows), "")
    table.add_row(tr("Tokens"), count_text(found.tokens), "")
    table.add_row(tr("Trained tokens"), percent_text(found.trained_share), trained)
    better = Prose(tr("more is better: fewer tokens for one text"))
    table.add_row(tr("Characters per token"), f"{found.characters_per_token:.2f}", better)
    pieces = Prose(tr("tokens that are a byte or a piece of a character"))
    table.add_row(tr("Byte fallback"), percent_text(found.fallback_share), pieces)
    if found.unknown_tokens:
        unknown = Prose(tr("characters the model cannot write"))
        table.add_row(tr("Unknown tokens"), count_text(found.unknown_tokens), unknown)
    out.print(table)


def _print_lengths(out: Console, lengths: Lengths) -> None:
    marks = {
        tr("shortest"): lengths.shortest,
        tr("median"): lengths.median,
        "p90": lengths.p90,
        "p99": lengths.p99,
        tr("longest"): lengths.longest,
    }
    numbers = " · ".join(f"{name} {count_text(value)}" for name, value in marks.items())
    out.print(Text("\n" + tr("Length in tokens"), "bold"))
    _indented(out, Text(numbers))
    most = max(count for _, _, count in lengths.histogram)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="green")
    table.add_column(justify="right", no_wrap=True)
    for first, last, count in lengths.histogram:
        bar = "█" * max(1, round(_BAR_WIDTH * count / most))
        table.add_row(f"{count_text(first)}–{count_text(last)}", bar, count_text(count))
    _indented(out, table)


def _print_finding(out: Console, finding: Finding) -> None:
    words = {"error": tr("error"), "warning": tr("warning"), "note": tr("note")}
    style = _LEVEL_STYLES[finding.level]
    out.print()
    out.print(Prose(Text(f"{words[finding.level]}: ", style) + Text(clean(finding.what))))
    if finding.rows:
        more = " …" if finding.rows > len(finding.places) else ""
        places = ", ".join(finding.places) + more
        _indented(out, Prose(tr("rows: {count} ({places})", count=count_text(finding.rows), places=clean(places))))
    if finding.sample:
        _indented(out, Text(clean(finding.sample), "dim"))
    out.print(hanging("  → ", Prose(clean(finding.remedy))))


def _print_verdict(out: Console, found: Check) -> None:
    out.print()
    warnings = sum(finding.level == "warning" for finding in found.findings)
    if not found.ok:
        out.print(Text("✗ " + tr("A run would stop at this data."), "bold red"))
    elif warnings:
        out.print(Text("✓ " + tr("This data can be trained. Warnings: {count}.", count=warnings), "yellow"))
    else:
        out.print(Text("✓ " + tr("This data can be trained."), "bold green"))


def _indented(out: Console, content: Text | Prose | Table) -> None:
    out.print(Padding(content, (0, 0, 0, 2), expand=False))
