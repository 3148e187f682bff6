"""`kitaeru report`: the page of a run."""

from __future__ import annotations

import json
import math
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kitaeru.i18n import tr
from kitaeru.report.history import History
from kitaeru.report.page import write_page


def run(
    folder: Annotated[Path, Parameter(name="run", help=tr("The run folder, for example runs/NAME."))],
    *,
    open_: Annotated[bool, Parameter(name="--open", negative="--no-open", help=tr("Show it in the browser."))] = False,
    json_: Annotated[
        bool, Parameter(name="--json", negative="", help=tr("Print the figures as JSON, with the path of the page."))
    ] = False,
) -> int:
    """Write the report of a run, finished or not, and print its path."""
    page = write_page(folder)
    if json_:
        print(json.dumps(figures(History.load(folder), page), ensure_ascii=False, indent=2))
    else:
        print(page)
    if open_ and not webbrowser.open(page.resolve().as_uri()):
        print(tr("No browser was found; open the file by hand."), file=sys.stderr)
    return 0


def figures(past: History, page: Path) -> dict[str, Any]:
    """What the page's headline says, for programs. Sizes are bytes; a number that is not finite is null."""
    started, finished, before, after, best = past.started, past.finished, past.before, past.after, past.best
    return {
        "report": str(page),
        "run": started.run if started else None,
        "model": started.model if started else None,
        "method": started.method if started else None,
        "outcome": finished.outcome if finished else None,
        "result": finished.result if finished else None,
        "steps": past.steps[-1].step if past.steps else 0,
        "max_steps": started.max_steps if started else None,
        "tokens": past.tokens,
        "seconds": past.seconds,
        "tokens_per_second": past.tokens_per_second,
        "peak_bytes": past.peak_bytes,
        "validation_loss": {
            "before": _finite(before.loss if before else None),
            "after": _finite(after.loss if after else None),
            "best": _finite(best.loss if best else None),
            "best_step": best.step if best else None,
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
