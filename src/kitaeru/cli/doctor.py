"""`kitaeru doctor`: what this machine is, what is wrong with it, what to type to mend it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kitaeru.api.proofs import CHECKS, Proof, prove
from kitaeru.cli.text import console, hanging
from kitaeru.errors import UsageError
from kitaeru.i18n import N_, tr
from kitaeru.machine.doctor import Examined, examine
from kitaeru.machine.findings import Finding
from kitaeru.machine.trials import Copy, Sum
from kitaeru.report.prose import Prose

_MARKS = {"failure": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "dim")}


def run(
    *,
    json_: Annotated[
        bool, Parameter(name="--json", negative="", help=N_("Print JSON: all facts, trials and findings."))
    ] = False,
    quick: Annotated[
        bool, Parameter(negative="", help=N_("Only look, try nothing: for a health check beside a run."))
    ] = False,
    train: Annotated[
        bool, Parameter(negative="", help=N_("Also train: six checks with the bundled model, a minute or two."))
    ] = False,
    only: Annotated[
        list[int] | None, Parameter(help=N_("With --train: only the check of this number. Repeatable."))
    ] = None,
) -> int:
    """Examine this machine; 0 when it is healthy, 1 when something would make training fail."""
    out = console()
    wrong = [number for number in only or () if not 1 <= number <= len(CHECKS)]
    if wrong or (only and not train):
        raise UsageError(
            tr("`--only` takes numbers from 1 to {count}, with `--train`.", count=len(CHECKS)),
            remedy="kitaeru doctor --train --only 4",
        )
    if json_:
        examined, proofs = examine(quick=quick), list(prove(only or ())) if train else []
        answer = examined.to_dict() | ({"checks": [asdict(proof) for proof in proofs]} if train else {})
        print(json.dumps(answer, ensure_ascii=False, indent=2))
    else:
        with console(stderr=True).status(tr("Looking at this machine, and trying what must be tried …")):
            examined = examine(quick=quick)
        show(out, examined)
        proofs = show_proofs(out, only or ()) if train else []
    failed = any(proof.passed is False for proof in proofs)
    return 0 if examined.healthy and not failed else 1


def show_proofs(out: Console, only: Sequence[int] = ()) -> list[Proof]:
    """The six checks, each printed when it is done."""
    out.print()
    out.print(Prose(tr("Six checks, with the bundled model"), "bold"))
    proofs = []
    with console(stderr=True).status(tr("Training …")):
        for proof in prove(only):
            proofs.append(proof)
            mark, style = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("–", "dim")}[proof.passed]
            head = Text.assemble((f"{mark} {proof.number} {proof.title}", style), (f"  {proof.seconds:.1f} s", "dim"))
            out.print(head)
            out.print(Padding(Prose(proof.detail, "dim"), (0, 0, 0, 4)))
    out.print()
    failed = sum(1 for proof in proofs if proof.passed is False)
    passed, seconds = sum(1 for p in proofs if p.passed), sum(p.seconds for p in proofs)
    text = tr("{passed} passed, {failed} failed, {skipped} could not be made here, in {seconds:.0f} s.", passed=passed,
              failed=failed, skipped=len(proofs) - passed - failed, seconds=seconds)  # fmt: skip
    out.print(Prose(text, "bold red" if failed else "bold green"))
    return proofs


def show(out: Console, examined: Examined) -> None:
    """The examination for a person."""
    out.print(Prose(examined.hardware.summary(), "bold"))
    out.print(Prose(_software(examined), "dim"))
    for finding in examined.findings:
        _finding(out, finding)
    rows = _measured(examined)
    if rows:
        _titled(out, tr("Measured"), rows)
    environment = examined.trials.environment
    if environment:
        rows = [(f"export {name}={value}", "") for name, value in environment.items()]
        _titled(out, tr("The environment that proved fastest"), rows)
    if examined.unseen:
        _titled(out, tr("Not looked at"), [(one.what, one.why) for one in examined.unseen])
    out.print()
    out.print(Prose(_verdict(examined), "bold green" if examined.healthy else "bold red"))


def _software(examined: Examined) -> str:
    facts, torch = examined.facts, examined.trials.torch
    parts = [tr("container: {name}", name=facts.container)] if facts.container else []
    if facts.driver:
        parts.append(
            tr("driver {version}, CUDA {cuda}", version=facts.driver, cuda=".".join(map(str, facts.driver_cuda)))
        )
    if torch.version:
        with_ = ", ".join(f"{name} {v}" for name, v in (("CUDA", torch.cuda), ("NCCL", torch.nccl)) if v)
        parts.append(f"torch {torch.version}" + (f" ({with_})" if with_ else ""))
    parts += [f"{name} {v}" for name, v in facts.versions.items() if name in ("transformers", "peft", "bitsandbytes")]
    return " · ".join([*parts, f"Python {'.'.join(map(str, facts.python))}"])


def _finding(out: Console, finding: Finding) -> None:
    mark, style = _MARKS[finding.level]
    out.print()
    head = Text(finding.what, style)
    out.print(hanging(f"{mark} ", Prose(head)))
    out.print(Padding(Prose(finding.why), (0, 0, 0, 2)))
    # Whole, so that it can be copied.
    out.print(Text(f"  → {finding.mend}", "cyan"), soft_wrap=True)


def _measured(examined: Examined) -> list[tuple[str, str]]:
    rows = []
    for load in examined.trials.loads:
        if not load.error:
            link = f"{load.generation}.0 x{load.width}" if load.width else "?"
            rows.append(
                (
                    tr("GPU {gpu} and the host", gpu=load.gpu),
                    tr("PCIe {link}, {to:.1f} GB/s to it, {back:.1f} GB/s back", link=link, to=load.to_gb_s,
                       back=load.from_gb_s),
                )
            )  # fmt: skip
    rows += [(f"GPU {c.a} → GPU {c.b}, {_way(c)}", f"{c.gb_s:.1f} GB/s") for c in examined.trials.copies if c.gb_s]
    rows += [(_sum_title(s), _sum_text(s)) for s in examined.trials.sums]
    return rows


def _way(copy: Copy) -> str:
    return tr("direct") if copy.direct else tr("through the host")


def _sum_title(tried: Sum) -> str:
    carried = f", {tried.used}" if tried.used else ""
    return tr("all-reduce of {count} processes", count=tried.ranks) + f" ({tried.backend}, {tried.transport}{carried})"


def _sum_text(tried: Sum) -> str:
    if tried.good:
        return tr("{rate:.2f} GB/s, content right", rate=tried.gb_s)
    return tr("does not end") if tried.hung else tr("wrong content") if tried.wrong else tr("fails")


def _titled(out: Console, title: str, rows: list[tuple[str, str]]) -> None:
    out.print()
    out.print(Prose(title, "bold"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold", style="dim")
    for left, right in rows:
        grid.add_row(Prose(left), Prose(right))
    out.print(Padding(grid, (0, 0, 0, 2)))


def _verdict(examined: Examined) -> str:
    counts = {level: sum(1 for f in examined.findings if f.level == level) for level in _MARKS}
    if not examined.healthy:
        return tr(
            "{failures} failure(s), {warnings} warning(s): training would fail here.",
            failures=counts["failure"],
            warnings=counts["warning"],
        )
    if counts["warning"]:
        return tr("Healthy, with {count} warning(s).", count=counts["warning"])
    return tr("Healthy.")
