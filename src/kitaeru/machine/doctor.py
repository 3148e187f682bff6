"""The doctor: looks at this machine, tries what must be tried, and says what is wrong and what mends it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.machine.ailments import findings, unseen
from kitaeru.machine.facts import Facts, gather
from kitaeru.machine.findings import Finding, Unseen
from kitaeru.machine.probe import probe
from kitaeru.machine.trials import Trials, run_trials


@dataclass(frozen=True)
class Examined:
    """A machine that was looked at."""

    hardware: Hardware
    facts: Facts
    trials: Trials
    findings: tuple[Finding, ...]
    unseen: tuple[Unseen, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that makes training fail or its numbers wrong."""
        return not any(finding.level == "failure" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data. `Hardware.load` reads the file back, for a plan made on another machine."""
        facts = asdict(self.facts)
        facts["p2p"] = {f"{a}-{b}": status for (a, b), status in self.facts.p2p.items()}
        return {
            "healthy": self.healthy,
            "hardware": self.hardware.to_dict(),
            "findings": [asdict(finding) for finding in self.findings],
            "not_looked_at": [asdict(one) for one in self.unseen],
            "environment": self.trials.environment,
            "trials": asdict(self.trials),
            "facts": facts,
        }


def examine(*, quick: bool = False) -> Examined:
    """Look at this machine. Takes seconds on a CPU, up to a minute or two on several GPUs; never fails.

    `quick`: only look, in a fraction of a second, and leave the devices alone: for a health check beside a run.
    """
    hardware = probe()
    trials = Trials() if quick else run_trials()
    tried = not quick and not trials.error
    facts = gather(folders=folders(os.environ), torch=trials.torch if tried else None)
    versions = dict(hardware.versions) | {"nccl": trials.torch.nccl} if trials.torch.nccl else hardware.versions
    return Examined(
        hardware=replace(hardware, versions=versions),
        facts=facts,
        trials=trials,
        findings=tuple(findings(facts, trials)),
        unseen=(*unseen(facts, trials), *((_not_tried(),) if quick else ())),
    )


def _not_tried() -> Unseen:
    return Unseen(tr("torch, sums over processes, copies, links at load"), tr("nothing is tried with --quick"))


def folders(environment: Mapping[str, str]) -> dict[str, Path]:
    """Where a run writes to: runs, models from the Hub, kitaeru's own cache, temporary files."""
    home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "runs": Path.cwd(),
        "models": Path(environment.get("HF_HOME") or home / "huggingface"),
        "cache": Path(environment.get("KITAERU_CACHE") or home / "kitaeru"),
        "temporary": Path(tempfile.gettempdir()),
    }
