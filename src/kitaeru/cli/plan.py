"""`kitaeru plan`: every way to train a model on a machine, ranked, with reasons. Without torch, in under a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kitaeru.cli.machine import GpusOption, RamOption, machine
from kitaeru.cli.plan_view import show_change, show_explanation, show_survey
from kitaeru.cli.text import console
from kitaeru.errors import UsageError
from kitaeru.files import write_atomic
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, tr
from kitaeru.plan.choose import Survey, default_seq_len, survey
from kitaeru.plan.types import Candidate, DataFacts
from kitaeru.plan.what_if import what_if
from kitaeru.recipe.messages import nearest
from kitaeru.recipe.read import Effective, read, to_yaml
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape, find_shape

# The data of a plan for a model alone, until -o writes a recipe that a person completes.
NO_DATA = "my.jsonl"


def run(
    target: Annotated[str, Parameter(help=N_("A recipe, a run folder, a known model, a folder, or `bundled`."))],
    *,
    data: Annotated[
        list[str] | None, Parameter(help=N_("Take the lengths of the examples from this data. Repeatable."))
    ] = None,
    seq_len: Annotated[int | None, Parameter(help=N_("The longest example in tokens."))] = None,
    gpus: GpusOption = None,
    ram: RamOption = None,
    set_: Annotated[
        list[str] | None, Parameter(name="--set", help=N_("Override one value of the recipe: a.b=c. Repeatable."))
    ] = None,
    what_if_: Annotated[
        list[str] | None,
        Parameter(
            name="--what-if", help=N_('Compare: "add 1 GPU", "nvlink", "ram=256GB", "seq-len=8192". Repeatable.')
        ),
    ] = None,
    explain: Annotated[
        str | None, Parameter(help=N_("Show every number of one way, by its name in the table, and its formula."))
    ] = None,
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help=N_("Write the recipe of the chosen way to this file."))
    ] = None,
    json_: Annotated[bool, Parameter(name="--json", negative="", help=N_("Print JSON, for a program."))] = False,
) -> int:
    """Plan and print."""
    recipe = _recipe(target, data or [], seq_len, set_ or [])
    hardware = machine(gpus, ram)
    shape = find_shape(recipe.model.name)
    before = None
    if what_if_:
        before = survey(recipe, hardware, shape, measured_facts(recipe, shape, data))
        for text in what_if_:
            recipe, hardware = what_if(text, recipe, hardware)
    found = survey(recipe, hardware, shape, measured_facts(recipe, shape, data))
    if output is not None:
        _write(output, found)
    if json_:
        print(json.dumps(as_json(found, recipe.model.name, hardware), ensure_ascii=False, indent=2))
        return 0
    out = console()
    if explain is not None:
        show_explanation(out, found, _named(found, explain))
        return 0
    show_survey(out, found, hardware, shape)
    if before is not None:
        show_change(out, before, found, what_if_ or [])
    if output is not None:
        out.print(tr("Written: {path}", path=output), soft_wrap=True)
    return 0


def _recipe(target: str, data: list[str], seq_len: int | None, overrides: list[str]) -> Recipe:
    path = Path(target)
    values: dict[str, Any] = {"data.seq_len": seq_len}
    if data:
        values["data.train"] = data
    effective: Effective
    if path.suffix in (".yaml", ".yml"):
        effective = read(path, overrides=overrides, values=values)
    elif (path / "recipe.yaml").is_file():
        effective = read(path / "recipe.yaml", overrides=overrides, values=values)
    else:
        effective = read(None, overrides=overrides, values={"model": target, "data.train": [NO_DATA]} | values)
    return effective.recipe


def measured_facts(recipe: Recipe, shape: ModelShape, data: list[str] | None) -> DataFacts | None:
    """Lengths of the data where `--data` names some; a recipe's own is not waited for."""
    if not data:
        return None
    from kitaeru.data.estimate import estimate_facts

    name = recipe.model.tokenizer or recipe.model.name
    folder = Path(__file__).parent.parent / "assets" / "bundled" if name == "bundled" else Path(name)
    file = folder / "tokenizer.json"
    return estimate_facts(recipe, default_seq_len(recipe, shape), file if file.is_file() else None)


def _named(found: Survey, name: str) -> Candidate:
    names = [candidate.layout.name for candidate in found.candidates]
    for candidate in found.candidates:
        if candidate.layout.name == name or candidate.layout.way == name:
            return candidate
    close = nearest(name, names)
    raise UsageError(
        tr("The plan has no way `{name}`.", name=name),
        remedy=tr("Did you mean `{name}`?", name=close) if close else tr("Ways: {names}.", names=", ".join(names[:8])),
    )


def _write(path: Path, found: Survey) -> None:
    if found.plan is None:
        raise found.refusal
    write_atomic(path, to_yaml(found.plan.recipe))


def as_json(found: Survey, model: str, hardware: Hardware) -> dict[str, Any]:
    """What `--json` prints; `chosen` is null when only ways that are not built yet would fit."""
    chosen = next((i for i, c in enumerate(found.candidates) if found.plan and c is found.plan.chosen), None)
    return {
        "model": model,
        "hardware": hardware.to_dict(),
        "chosen": chosen,
        "candidates": [_candidate_json(candidate) for candidate in found.candidates],
        "impossible": [{"name": name, "why": why} for name, why in found.impossible.items()],
        "refusal": None if found.plan else str(found.refusal),
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    layout, speed = candidate.layout, candidate.speed
    assert speed is not None
    return {
        "name": layout.name,
        "strategy": layout.strategy,
        "method": layout.method,
        "fits": candidate.fits,
        "built": candidate.built,
        "peak_bytes": list(candidate.device_peaks),
        "memory": candidate.memory,
        "memory_by_device": list(candidate.devices),
        "phases": candidate.phases,
        "host_bytes": candidate.host_bytes,
        "host": candidate.host,
        "step_seconds": speed.step_seconds,
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_low": speed.low,
        "tokens_per_second_high": speed.high,
        "rates": speed.source,
        "mfu": speed.mfu,
        "idle": list(speed.idle),
        "seconds": speed.parts,
        "trained_parameters": candidate.trained_parameters,
        "micro_batch_tokens": layout.micro_batch_tokens,
        "micro_batches": speed.micro_batches,
        "global_batch_tokens": candidate.global_batch_tokens,
        "activations": layout.activations,
        "cuts": list(layout.cuts),
        "why": list(candidate.why),
    }
