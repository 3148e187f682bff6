"""What to change next, for the page of a run: the best of what `kitaeru advise` would say."""

from __future__ import annotations

from html import escape
from pathlib import Path

from kitaeru.errors import KitaeruError
from kitaeru.i18n import tr
from kitaeru.report.advice.assemble import next_changes
from kitaeru.report.advice.blocks import Item, Items, Sources
from kitaeru.report.advice.facts import Facts, from_run
from kitaeru.report.advice.html import block
from kitaeru.report.advice.page import gain_text
from kitaeru.report.markup import section


def next_change(run_dir: Path) -> str:
    """The section as HTML; nothing for a run that the rules cannot judge (no step, another version's plan)."""
    try:
        today = from_run(run_dir)
        actions = next_changes(Facts(today, today.hardware))
    except KitaeruError:
        return ""
    items = [Item(a.title, gain_text(a.gain), a.why, "\n".join(a.commands)) for a in actions]
    none = escape(tr("No rule found anything to change: the plan is the best known for this machine."))
    body = block(Items(items, 1), Sources()) if items else f"<p>{none}</p>"
    more = tr("Factors of speed are predicted. The whole report: kitaeru advise {run}", run=run_dir)
    return section(tr("Next best change"), f'{body}<p class="soft">{escape(more)}</p>')
