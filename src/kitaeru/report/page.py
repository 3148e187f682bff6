"""The report: one self-contained page of a run, made from its folder and nothing else.

Everything is inside (styles, script, drawings); the page asks the network for nothing, and its own policy forbids it.
"""

from __future__ import annotations

from datetime import datetime
from html import escape
from pathlib import Path

from kitaeru import __version__
from kitaeru.errors import PlanError
from kitaeru.files import write_atomic
from kitaeru.i18n import tr
from kitaeru.plan.types import Plan
from kitaeru.report import sections
from kitaeru.report.document import html_document
from kitaeru.report.history import History
from kitaeru.report.usage_page import usage
from kitaeru.report.wording import outcome_text, run_name

_BADGES = {"finished": "good", "stopped_early": "good", "interrupted": "warn", "failed": "bad", None: "warn"}


def write_page(run_dir: Path) -> Path:
    """Write `run_dir/report.html` in the language in force, and return its path.

    Works for a run that is still going or was killed: it shows what there is.

    Raises:
        UsageError: `run_dir` is not the folder of a run.
    """
    past = History.load(run_dir)
    try:
        plan = Plan.load(run_dir / "plan.json")
    except PlanError:  # missing, or written by another version: the facts are shown all the same
        plan = None
    recipe = run_dir / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    path = run_dir / "report.html"
    write_atomic(path, page(past, plan, text, run_dir))
    return path


def page(past: History, plan: Plan | None, recipe: str, run_dir: Path) -> str:
    """The whole page as HTML."""
    from kitaeru.report.advice.next import next_change  # the planner, which only a page needs

    body = "".join(
        (
            _head_of_run(past, run_dir),
            sections.result(past, plan),
            sections.curves(past, plan),
            usage(past, plan),
            sections.samples(past),
            sections.data(past, plan),
            sections.plan(past, plan),
            next_change(run_dir),
            sections.notices(past),
            sections.checkpoints(past),
            sections.environment(past),
            sections.recipe(recipe),
        )
    )
    made = tr("Made by kitaeru {version} on {date}.", version=__version__, date=_date(datetime.now().timestamp()))
    return html_document(_title(past, run_dir), f"<main>{body}<footer>{escape(made)}</footer></main>")


def _name(past: History, run_dir: Path) -> str:
    return run_name(past.started) if past.started else run_dir.resolve().name


def _title(past: History, run_dir: Path) -> str:
    return f"{_name(past, run_dir)} · kitaeru"


def _head_of_run(past: History, run_dir: Path) -> str:
    started = past.started
    outcome = past.finished.outcome if past.finished else None
    parts = [f'<header><p class="brand">kitaeru</p><h1>{escape(_name(past, run_dir))}</h1>']
    if started:
        facts = " · ".join((started.model, started.method, started.strategy, started.device))
        parts.append(f'<p class="sub">{escape(facts)}</p>')
    parts.append(f'<span class="badge {_BADGES.get(outcome, "warn")}">{escape(outcome_text(outcome))}</span>')
    if past.events:
        first, last = _date(past.events[0].time), _date(past.events[-1].time)
        last = last.removeprefix(first[:11])  # the day once, when it is the same
        parts.append(f'<span class="when">{first} – {last}</span>')
    if past.finished and past.finished.reason:
        parts.append(f'<p class="notice error">{escape(past.finished.reason)}</p>')
    return "".join(parts) + "</header>"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
