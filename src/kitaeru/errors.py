"""Every error a person can meet: what happened, where, what to do about it, and the exit code.

Exit codes: 2 = the request was wrong (recipe, data, arguments), 1 = the request was right and could not be carried
out, 130 = interrupted by the user after saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kitaeru.i18n import tr


class KitaeruError(Exception):
    """An error with a message for a person.

    `what` happened (one sentence), `where` (a file and line, a device, a step), and the `remedy` (what to type or
    change). All three are already translated.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.remedy:
            lines.append("  → " + self.remedy)
        return "\n".join(lines)


class UsageError(KitaeruError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe. `line` counts from 1; 0 when the value did not come from a file."""

    path: str
    what: str
    remedy: str = ""
    source: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line else self.source
        head = ": ".join(part for part in (place, self.path, self.what) if part)
        return f"{head}\n  → {self.remedy}" if self.remedy else head


class RecipeError(KitaeruError):
    """A recipe with unknown keys, wrong types or impossible combinations: all of them at once in `problems`."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(
            tr("The recipe has one problem:") if count == 1 else tr("The recipe has {count} problems:", count=count)
        )

    def __str__(self) -> str:
        return "\n".join([self.what, *(str(problem) for problem in self.problems)])


class DataError(KitaeruError):
    """Data that cannot be read, or that would teach nothing; names file, line and key."""

    exit_code = 2


class ModelError(KitaeruError):
    """A model that cannot be found, loaded or used as asked."""


class PlanError(KitaeruError):
    """No layout of this recipe fits this machine; `remedy` names the nearest one that does."""


class TrainingError(KitaeruError):
    """Training cannot go on: a non-finite loss, a gradient that never arrives, a worker that died."""


class RankLostError(TrainingError):
    """A process of a run died or is cut off: started again from the last checkpoint, the run may well go on."""


class SteppedDownError(TrainingError):
    """Memory ran out: whoever started the run must start it again from its last checkpoint, a rung lower."""


class CheckpointError(KitaeruError):
    """A checkpoint that is missing, damaged, or belongs to another recipe or data set."""


class MissingLibraryError(KitaeruError):
    """An optional library is needed for what was asked."""

    exit_code = 2

    def __init__(self, library: str, purpose: str, install: str) -> None:
        super().__init__(
            tr("{purpose} needs the library {library}, which is not installed.", purpose=purpose, library=library),
            remedy=tr("Install it with: {command}", command=install),
        )


class Interrupted(KitaeruError):  # noqa: N818 - not a fault: the user asked
    """The user asked to stop; the run was saved and can be resumed."""

    exit_code = 130
