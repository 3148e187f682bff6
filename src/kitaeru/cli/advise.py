"""`kitaeru advise`: the optimisation report of a machine, from a run, a recipe, a model, or none of them."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.padding import Padding

from kitaeru.cli.machine import GpusOption, RamOption, machine
from kitaeru.cli.plan import NO_DATA, measured_facts
from kitaeru.cli.text import console
from kitaeru.errors import UsageError
from kitaeru.files import write_atomic
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, tr
from kitaeru.recipe.read import read
from kitaeru.report.advice import Advice, Facts, Figure, Today, advise, from_model, from_recipe, from_run, pages, ran_in
from kitaeru.report.advice.assemble import WORTH
from kitaeru.report.prose import Prose
from kitaeru.report.wording import bytes_text, count_text, round_two
from kitaeru.shape import find_shape

# What most people begin with, where nothing else is said.
USUAL_MODEL = "elyza/Llama-3-ELYZA-JP-8B"


def run(
    *targets: Annotated[
        str,
        Parameter(
            help=N_("Runs (the first is today, the last the newest), a recipe, or models; default: a stated baseline.")
        ),
    ],
    gpus: GpusOption = None,
    ram: RamOption = None,
    data: Annotated[
        list[str] | None, Parameter(help=N_("Take the lengths of the examples from this data. Repeatable."))
    ] = None,
    seq_len: Annotated[int | None, Parameter(help=N_("The longest example in tokens."))] = None,
    speed: Annotated[float | None, Parameter(help=N_("Tokens/s that you have today, for a baseline."))] = None,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help=N_("The page to write; its Markdown twin lies beside it."))
    ] = None,
    json_: Annotated[
        bool, Parameter(name="--json", negative="", help=N_("Print the advice as JSON, with the path of the page."))
    ] = False,
    open_: Annotated[bool, Parameter(name="--open", negative="", help=N_("Show it in the browser."))] = False,
) -> int:
    """Write the page and its twin, and print the most important lines."""
    runs = [Path(target) for target in targets if (Path(target) / "events.jsonl").is_file()]
    others = [target for target in targets if Path(target) not in runs]
    recipes = [target for target in others if _is_recipe(target)]
    if (runs and others) or (recipes and len(others) > 1):
        raise UsageError(
            tr("Runs, a recipe and models cannot be mixed."),
            remedy=tr("Give one or more runs, or one recipe, or one or more models."),
        )
    today, hardware = _today(runs, others, gpus, ram, data or [], seq_len, speed)
    ran = [ran_in(folder) for folder in runs]
    models = [] if runs or _is_recipe(others[0] if others else "") else others
    words = [*(("--gpus", gpus) if gpus else ()), *(("--ram", ram) if ram else ())]
    advice = advise(Facts(today, hardware, tuple(words)), ran, models)
    page = _write(advice, output or (runs[0] / "advice.html" if runs else Path("advice.html")))
    if json_:
        print(json.dumps(as_json(advice, page), ensure_ascii=False, indent=2))
        return 0
    _summary(advice, page)
    if open_ and not webbrowser.open(page.resolve().as_uri()):
        print(tr("No browser was found; open the file by hand."))
    return 0


def _is_recipe(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _today(
    runs: list[Path],
    others: list[str],
    gpus: str | None,
    ram: str | None,
    data: list[str],
    seq_len: int | None,
    speed: float | None,
) -> tuple[Today, Hardware]:
    """How training goes now, and the machine that advice is for."""
    if runs:
        today = from_run(runs[0])
        return today, machine(gpus, ram) if gpus or ram else today.hardware
    hardware = machine(gpus, ram)
    if others and _is_recipe(others[0]):
        values = {"data.seq_len": seq_len, "data.train": data or None}
        recipe = read(Path(others[0]), values=values).recipe
        facts = measured_facts(recipe, find_shape(recipe.model.name), data)
        return from_recipe(others[0], recipe, hardware, facts), hardware
    model = others[0] if others else USUAL_MODEL
    wish = read(None, values={"model": model, "data.train": data or [NO_DATA], "data.seq_len": seq_len}).recipe
    return from_model(model, hardware, seq_len, measured_facts(wish, find_shape(model), data), speed), hardware


def _write(advice: Advice, path: Path) -> Path:
    html, markdown = pages(advice)
    path = path if path.suffix in (".html", ".htm") else path.with_name(path.name + ".html")
    write_atomic(path, html)
    write_atomic(path.with_suffix(".md"), markdown)
    return path


def as_json(advice: Advice, page: Path) -> dict[str, Any]:
    """What the page says first, for programs. Sizes are bytes, speeds tokens/s; each figure has its basis."""
    facts, best = advice.facts, advice.facts.best
    return {
        "page": str(page),
        "markdown": str(page.with_suffix(".md")),
        "model": facts.today.recipe.model.name,
        "hardware": facts.hardware.to_dict(),
        "today": {
            "kind": facts.today.kind,
            "name": facts.today.name,
            "devices": facts.today.devices if facts.today.on_gpus else 0,
            "tokens_per_second": _figure(facts.today.rate),
            "peak_bytes": _figure(facts.today.peak),
            "largest_model": advice.largest_today.name if advice.largest_today else None,
        },
        "possible": {
            "name": best.layout.name if best else None,
            "peak_bytes": list(best.device_peaks) if best else [],
            "tokens_per_second": _figure(facts.promise(best) if best else None),
            "largest_model": advice.largest.name if advice.largest else None,
        },
        "findings": [
            {"name": p.finding.name, "what": p.finding.what, "why": p.finding.why, "change": dict(p.finding.change),
             "gain": p.gain}
            for p in advice.findings
        ],
        "actions": [
            {"title": a.title, "phase": a.phase, "commands": list(a.commands), "gain": a.gain,
             "tokens_per_second": _figure(a.promise)}
            for a in advice.actions
        ],
    }  # fmt: skip


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    basis = {"kind": figure.basis.kind, "source": figure.basis.source}
    return {"value": figure.value, "low": figure.low, "high": figure.high, "basis": basis}


def _summary(advice: Advice, page: Path) -> None:
    """Today, the findings in a line each, and the first actions."""
    out = console()
    today, best = advice.facts.today, advice.facts.best
    out.print(Prose(f"{today.recipe.model.name}, {today.name}", "bold"))
    out.print(Prose(advice.facts.hardware.summary(), "dim"))
    out.print()
    for found in advice.findings:
        gain = f" (×{found.gain:.2f})" if found.gain and abs(found.gain - 1) >= 0.02 else ""
        out.print(Padding(Prose(f"· {found.finding.what}{gain}"), (0, 0, 0, 2)))
    if not advice.findings:
        out.print(Prose(tr("None of the rules found anything: today's way is the one the planner would take.")))
    promise = advice.facts.promise(best) if best else None
    gains = promise is not None and today.rate is not None and promise.value > WORTH * today.rate.value
    if gains and best is not None and promise is not None and today.rate is not None:
        out.print()
        line = tr(
            "{before} → {after} tokens/s ({times:.2f} times) with {name}, {size}",
            before=count_text(round_two(today.rate.value)),
            after=count_text(round_two(promise.value)),
            times=promise.value / today.rate.value if today.rate.value else 0.0,
            name=best.layout.name,
            size=bytes_text(max(best.device_peaks)),
        )
        out.print(Prose(line, "bold"))
    for action in advice.actions:
        if action.phase == "now":
            for command in action.commands:
                out.print(f"  {command}", soft_wrap=True)
    out.print()
    out.print(tr("Written: {path}", path=page), soft_wrap=True)
    out.print(tr("Written: {path}", path=page.with_suffix(".md")), soft_wrap=True)
