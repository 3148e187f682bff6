"""`kitaeru recipe`: show, explain, schema, presets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kitaeru.cli.planned import Settled, recorded, settle, work_out
from kitaeru.cli.text import console
from kitaeru.files import write_atomic
from kitaeru.i18n import N_, tr
from kitaeru.recipe import explain as explaining
from kitaeru.recipe import presets as packaged
from kitaeru.recipe import schema as schemas
from kitaeru.recipe.fields import leaves, table, value_at
from kitaeru.recipe.read import Origin, read
from kitaeru.recipe.yamltext import inline
from kitaeru.report.prose import Prose

SetOption = Annotated[
    list[str] | None, Parameter(name="--set", help=N_("Override one value of the recipe: a.b=c. Repeatable."))
]
JsonOption = Annotated[bool, Parameter(name="--json", negative="", help=N_("Print JSON, for a program."))]


def show(
    recipe: Annotated[Path, Parameter(help=N_("A recipe, or the folder of a run."))],
    *,
    set_: SetOption = None,
    plan: Annotated[
        bool, Parameter(negative="", help=N_("Read the data and show what the planner decides, too. Takes seconds."))
    ] = False,
    json_: JsonOption = False,
) -> int:
    """Every value in force and where it came from."""
    path = recipe / "recipe.yaml" if (recipe / "recipe.yaml").is_file() else recipe
    effective = read(path, overrides=set_ or ())
    made = work_out(effective.recipe) if plan else None if set_ else recorded(path)
    settled = settle(effective, made)
    if json_:
        print(json.dumps(_as_json(settled), ensure_ascii=False, indent=2))
        return 0
    out = console()
    _show_table(out, settled)
    if settled.why:
        out.print()
        out.print(Text(tr("Why the planner chose so"), style="bold"))
        out.print(_grid(list(settled.why.items())))
    if not settled.complete:
        out.print()
        out.print(Prose(tr("The planner decides when it has read the data; `--plan` shows it now."), "dim"))
    return 0


def explain(field: Annotated[str, Parameter(help=N_("A field or section, for example train.epochs."))] = "", /) -> int:
    """Documentation of a field or section."""
    out = console()
    it = explaining.explain(field)
    if field:
        out.print(Text(it.path, style="bold"))
    out.print(Prose(it.description))
    rows = [(tr("type"), it.type), (tr("default"), it.default), (tr("example"), it.example)]
    out.print()
    out.print(_grid([row for row in rows if row[1]]))
    if it.fields:
        out.print()
        out.print(_grid(list(it.fields)))
        out.print()
        inner = f"{field}.{it.fields[0][0]}" if field else it.fields[0][0]
        out.print(Prose(tr("More of each: `kitaeru recipe explain {path}`", path=inner), "dim"))
    return 0


def schema(
    *, output: Annotated[Path | None, Parameter(name=("--output", "-o"), help=N_("Write it to this file."))] = None
) -> int:
    """The JSON schema of recipes."""
    text = json.dumps(schemas.schema(), ensure_ascii=False, indent=2) + "\n"
    if output is None:
        print(text, end="")
        return 0
    write_atomic(output, text)
    first = f"# yaml-language-server: $schema={output}"
    console().print(
        Text(tr("Written. As the first line of a recipe, editors take: {line}", line=first)), soft_wrap=True
    )
    return 0


def presets() -> int:
    """The presets and what they set."""
    out = console()
    for name, description in packaged.PRESETS.items():
        out.print(Text(name, style="bold"))
        out.print(Padding(Prose(tr(description)), (0, 0, 0, 2)))
        out.print(Padding(Text(packaged.text(name).strip(), style="dim"), (0, 0, 1, 4)))
    out.print(Prose(tr("Use one with `preset: NAME` in a recipe or `--set preset=NAME`.")))
    return 0


def _as_json(settled: Settled) -> dict[str, Any]:
    plain = settled.recipe.model_dump(mode="json")

    def origin(value: Origin) -> dict[str, Any]:
        return {"kind": value.kind, "source": value.source, "line": value.line}

    origins = {path: origin(value) for path, value in settled.origins.items()}
    return {"recipe": plain, "origins": origins, "why": settled.why}


def _show_table(out: Console, settled: Settled) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold", ratio=1)
    grid.add_column(overflow="fold", max_width=max(20, out.width // 3))
    section = ""
    for spec in leaves():
        head, dot, _ = spec.path.rpartition(".")
        if head and head != section:
            grid.add_row(Text(head, style="bold"))
        section = head
        origin = settled.origins[spec.path]
        style = "dim" if origin.kind == "default" else ""
        value = _shown(value_at(settled.recipe, spec.path))
        grid.add_row(
            Text(("  " if dot else "") + spec.name, style), Text(value, style), Text(_place(origin), style or "cyan")
        )
    out.print(grid)


def _place(origin: Origin) -> str:
    """The origin in few columns: a file by its name alone."""
    return str(replace(origin, source=Path(origin.source).name) if origin.kind == "file" else origin)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, tuple) and value and hasattr(value[0], "path"):
        return "\n".join(_source(source) for source in value)
    if isinstance(value, str):
        return value
    line = inline(value)
    return "\n".join(map(str, value)) if isinstance(value, tuple) and len(line) > 40 else line


def _source(source: Any) -> str:
    changed = {k: v for k, v in source if k != "path" and v != table()[f"data.train.{k}"].default}
    return f"{source.path} {inline(changed)}" if changed else str(source.path)


def _grid(rows: list[tuple[str, str]]) -> Padding:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(name), Prose(text))
    return Padding(grid, (0, 0, 0, 2))
