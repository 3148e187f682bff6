"""Model cards: what a folder of weights is, where it comes from, how it was checked. README.md as the Hub reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kitaeru import __version__
from kitaeru.files import write_atomic
from kitaeru.i18n import tr


def write_card(
    folder: Path, *, title: str, base: str, tags: Sequence[str], library: str, facts: Mapping[str, str]
) -> None:
    """Write README.md into `folder`: the Hub's header, and `facts` as a table, in the language in force."""
    head = ["---", f"base_model: {json.dumps(base, ensure_ascii=False)}", f"library_name: {library}"]
    head += [
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(("kitaeru", *tags))),
        "---",
    ]
    rows = [f"| {name} | {value.replace('|', chr(0xFF5C))} |" for name, value in facts.items()]
    note = tr("The licence of the base holds for what is made from it: read it on the base's page.")
    made = tr("Made with kitaeru {version}.", version=__version__)
    text = "\n".join([*head, "", f"# {title}", "", "| | |", "| --- | --- |", *rows, "", note, "", made, ""])
    write_atomic(folder / "README.md", text)
