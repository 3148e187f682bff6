"""`kitaeru chat`: talk to a run's result or to any model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kitaeru.i18n import tr

if TYPE_CHECKING:
    from kitaeru.export.chat import Chat


def run(
    target: Annotated[str, Parameter(help=tr("A run folder, a model folder, a Hub id, or `bundled`."))],
    *,
    system: Annotated[str | None, Parameter(help=tr("A system message."))] = None,
    ask: Annotated[
        list[str] | None, Parameter(help=tr("Ask this and leave, instead of a conversation. Repeatable."))
    ] = None,
    compare: Annotated[
        bool, Parameter(negative="", help=tr("Show the run's base model beside the tuned one."))
    ] = False,
    max_new_tokens: Annotated[int, Parameter(help=tr("Longest answer, in tokens."))] = 256,
    temperature: Annotated[float, Parameter(help=tr("0 always takes the likeliest token."))] = 0.0,
    top_p: Annotated[
        float, Parameter(help=tr("With a temperature: choose among the likeliest tokens up to this share."))
    ] = 0.95,
    repetition_penalty: Annotated[
        float | None, Parameter(help=tr("Above 1, tokens said before become less likely. Default: the model's own."))
    ] = None,
    quantize: Annotated[
        Literal["none", "nf4", "int8"] | None, Parameter(help=tr("How the base is stored. Default: as it was trained."))
    ] = None,
) -> int:
    """Talk to it. `/reset` forgets, `/system TEXT` sets the system message, `/quit` (or Ctrl-D) leaves."""
    console = Console(highlight=False)
    console.print(tr("Loading {target} …", target=target), style="dim")
    from kitaeru.export.chat import open_chat  # imports torch: seconds
    from kitaeru.model.generate import Sampling

    chat = open_chat(target, compare=compare, quantize=quantize)
    chat.system = system
    chat.sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty)
    for text in ask if ask is not None else _typed(console, chat):
        if ask is not None:
            console.print("> " + text, style="bold", markup=False)
        _answer(console, chat, text)
    return 0


def _answer(console: Console, chat: Chat, text: str) -> None:
    """Print what each voice says as it comes: plainly for one, in columns for two."""
    if len(chat.voices) > 1 and console.is_terminal:
        _side_by_side(console, chat, text)
        return
    for voice in chat.voices:
        if len(chat.voices) > 1:
            console.print(f"[{voice.name}]", style="cyan", markup=False)
        try:
            for piece in chat.say(voice, text):
                console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" …", end="")
        console.print()


def _side_by_side(console: Console, chat: Chat, text: str) -> None:
    said = {voice.name: "" for voice in chat.voices}

    def columns() -> Table:
        table = Table(box=SIMPLE_HEAD, expand=True, padding=(0, 1))
        for name in said:
            table.add_column(name, header_style="cyan", ratio=1)
        table.add_row(*(Text(answer) for answer in said.values()))
        return table

    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live, suppress(KeyboardInterrupt):
        for voice in chat.voices:
            for piece in chat.say(voice, text):
                said[voice.name] += piece
                live.update(columns(), refresh=True)


def _typed(console: Console, chat: Chat) -> Iterator[str]:
    """Lines a person types, commands carried out, until they leave."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # line editing and history, where Python has them
            import readline  # noqa: F401
        console.print(tr("/reset forgets · /system TEXT sets the system message · /quit leaves"), style="dim")
    while True:
        try:
            line = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            chat.reset()
            console.print(tr("Forgotten."), style="dim")
        elif line.startswith("/system"):
            chat.system = line.removeprefix("/system").strip() or None
            chat.reset()
            console.print(tr("System message: {text}", text=chat.system or tr("none")), style="dim")
        elif line.startswith("/"):
            console.print(tr("Known commands: /reset, /system TEXT, /quit"), style="dim")
        elif line:
            yield line
