"""Every way to use the devices of this machine, measured: each a real run of the command line, beside its own plan.

A wish (a recipe, or a model's shape with random weights) is planned on one device and on all of them. What the planner
can run becomes a run of a few steps in processes of its own, with that way pinned; what was measured comes from the
run's events.jsonl, what was predicted from its plan.json. A way that fails, does not fit or is not legal is a row that
says why.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from kitaeru.errors import KitaeruError, UsageError
from kitaeru.events import Devices, Event, RunStarted, Step, read
from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.plan.choose import make_plan, survey
from kitaeru.plan.types import Candidate, Layout, Plan
from kitaeru.recipe.read import to_yaml
from kitaeru.recipe.types import Recipe
from kitaeru.shape import catalogue, find_shape

T = TypeVar("T", bound=Event)

GIB = 1 << 30
# The first steps are not like the others: memory is found, kernels are compiled.
WARM_STEPS = 3
# Shapes that are measured with random weights: a known model's name and the methods it is measured with.
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "8b": ("elyza/Llama-3-ELYZA-JP-8B", ("qlora", "lora", "full")),
    "13b": ("meta-llama/Llama-2-13b-hf", ("lora",)),
    "34b": ("codellama/CodeLlama-34b-hf", ("qlora",)),
    "mixtral": ("mistralai/Mixtral-8x7B-v0.1", ("qlora",)),
}


@dataclass(frozen=True)
class Bench:
    """How to measure. `only` are strategies (all, if empty), `cap_gib` what each device may take, `layers` the depth
    shapes are cut to, `seconds` the most that one run may take.
    """

    work: Path
    steps: int = 12
    devices: int = 1
    only: tuple[str, ...] = ()
    cap_gib: float | None = None
    layers: int | None = None
    seq_len: int = 2048
    batch: int = 64
    seconds: float = 600.0
    on_cpu: bool = False


@dataclass(frozen=True)
class Subject:
    """What is trained: a name for the table, and the wish without any way pinned."""

    name: str
    wish: Recipe


@dataclass
class Row:
    """One way: what came out, and what was planned. `scaling` is against the same subject's run on one device, `idle`
    each device's share of the steps outside of its own passes, `utilisation` what the driver says of it.
    """

    subject: str
    method: str
    way: str
    devices: int
    layout: str = ""
    outcome: str = ""
    tokens_per_second: float = 0.0
    predicted: float = 0.0
    low: float = 0.0
    high: float = 0.0
    scaling: float = 0.0
    idle: tuple[float, ...] = ()
    predicted_idle: tuple[float, ...] = ()
    peak_gib: tuple[float, ...] = ()
    predicted_gib: tuple[float, ...] = ()
    steps: int = 0
    tokens_per_step: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0
    utilisation: tuple[float, ...] = ()
    device: str = ""


def subject_of(recipe: Recipe, bench: Bench) -> Subject:
    """A recipe, to be measured: only its length and what it leaves behind change."""
    model = recipe.model.name.rstrip("/").rpartition("/")[2]
    return Subject(model, _short(recipe, bench))


def shape_subjects(name: str, bench: Bench) -> Iterator[Subject]:
    """A shape of `SHAPES`, with random weights made in the working folder, once for each method.

    Raises:
        UsageError: there is no such shape.
    """
    from kitaeru.model.random_weights import write_random  # imports torch: seconds

    if name not in SHAPES:
        raise UsageError(
            tr("There is no shape `{name}`.", name=name), remedy=tr("Shapes: {names}.", names=", ".join(SHAPES))
        )
    known, methods = SHAPES[name]
    config = dict(next(entry for entry in catalogue() if entry.name == known).config)
    label = name
    if bench.layers is not None and bench.layers < config["num_hidden_layers"]:
        config["num_hidden_layers"] = bench.layers
        label = f"{name}-{bench.layers}"
    folder = bench.work / "models" / label
    write_random(config, folder)
    data = write_text(bench.work / "text.jsonl", bench.seq_len)
    for method in methods:
        values = {
            "model": {"name": str(folder)},
            "data": {"train": str(data), "seq_len": bench.seq_len, "long": "split"},
            "method": method,
            "train": {"global_batch_tokens": bench.batch * bench.seq_len, "learning_rate": 1e-5},
        }
        yield Subject(label, _short(Recipe.model_validate(values), bench))


def write_text(path: Path, seq_len: int) -> Path:
    """Long rows of the packaged Japanese text, so that nearly every example is as long as it may be."""
    source = Path(__file__).parent.parent / "assets" / "quickstart" / "train.jsonl"
    words = "\n".join(
        turn["content"] for line in source.open(encoding="utf-8") for turn in json.loads(line)["messages"]
    )
    texts = [words[start:] + words[:start] for start in range(0, len(words), max(1, len(words) // 16))]
    size = 64 * seq_len
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": (text * -(-size // len(text)))[:size]}, ensure_ascii=False) + "\n")
    return path


def _short(recipe: Recipe, bench: Bench) -> Recipe:
    """A few steps that leave nothing behind."""
    limits: dict[str, Any] = {"max_restarts": 0}
    if bench.cap_gib is not None:
        limits["memory_gb"] = bench.cap_gib * GIB / 1e9
    if bench.on_cpu:
        limits["device"] = "cpu"
    changes: dict[str, Any] = {
        "train": {"max_steps": bench.steps, "eval_every": 10**6, "save_every": 10**6, "keep_best": False},
        "samples": {"count": 0, "prompts": ()},
        "track": {
            "tensorboard": False,
            "wandb": None,
            "mlflow": None,
            "trackio": None,
            "prometheus_port": None,
            "device_seconds": 1.0,
        },
        "limits": limits,
    }
    return _changed(recipe, changes)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    updates = {
        name: getattr(recipe, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return recipe.model_copy(update=updates)


def measure(subject: Subject, hardware: Hardware, bench: Bench, tell: Callable[[Row], None]) -> list[Row]:
    """A row for every way, told as soon as it is there; one device first."""
    rows: list[Row] = []
    for devices in dict.fromkeys((1, bench.devices)):
        for row, wish in ways(subject, hardware, bench, devices):
            if wish is not None:
                run_row(row, wish, bench)
            alone = [r for r in (*rows, row) if (r.devices, r.method, r.outcome) == (1, row.method, "ok")]
            if alone and row.outcome == "ok":
                row.scaling = round(row.tokens_per_second / alone[0].tokens_per_second, 3)
            rows.append(row)
            tell(row)
    return rows


def ways(subject: Subject, hardware: Hardware, bench: Bench, devices: int) -> Iterator[tuple[Row, Recipe | None]]:
    """The ways to use so many devices, each with the recipe that pins it; without one it cannot run, and says why."""
    wish, shape = _changed(subject.wish, {"limits": {"devices": devices}}), find_shape(subject.wish.model.name)
    candidates: list[Candidate] = []
    impossible: dict[str, str] = {}
    for strategy in ("single",) if devices == 1 else bench.only or ("auto",):
        try:
            found = survey(wish.model_copy(update={"strategy": strategy}), hardware, shape, None)
            candidates += found.candidates
            impossible |= found.impossible
        except KitaeruError as error:
            yield Row(subject.name, wish.method, strategy, devices, outcome=_line(str(error))), None
    done: set[tuple[str, str]] = set()
    for candidate in candidates:  # the planner's own choice comes first
        layout = candidate.layout
        if layout.devices != devices or (layout.way, layout.method) in done:
            continue
        done.add((layout.way, layout.method))
        row = Row(subject.name, layout.method, layout.way, devices, layout.name)
        pinned = None
        if not candidate.built:
            row.outcome = tr("not built")
        elif not candidate.fits:
            row.outcome = tr("does not fit: {size:.1f} GiB at the peak", size=candidate.peak_bytes / GIB)
            row.predicted_gib = _gib(candidate.device_peaks)
        else:
            pinned = _pinned(wish, layout)
            taken = make_plan(pinned, hardware, shape).layout.way
            if taken != layout.way:  # a variant without a name cannot be asked for
                row.outcome, pinned = tr("the planner takes {way}, which is faster", way=taken), None
        yield row, pinned
    for name, why in impossible.items():
        way, _, method = name.partition("/")
        yield Row(subject.name, method or wish.method, way, devices, outcome=_line(why)), None


def _pinned(wish: Recipe, layout: Layout) -> Recipe:
    """The wish with one way pinned."""
    limits: dict[str, Any] = {"variant": layout.variant or None}
    group = layout.shards or layout.ranks_per_replica
    if layout.strategy in ("pipeline", "tensor") or layout.shards:
        limits["split_over"] = group
    return _changed(wish, {"method": layout.method, "strategy": layout.strategy, "limits": limits})


def run_row(row: Row, wish: Recipe, bench: Bench) -> None:
    """Run a recipe in processes of its own and write into the row what came out."""
    folder = bench.work / "runs" / "-".join((row.subject, row.method, row.way, str(row.devices)))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "wish.yaml"
    recipe.write_text(to_yaml(wish.model_copy(update={"output": str(folder / "run")})), encoding="utf-8")
    words = [sys.executable, "-m", "kitaeru", "train", str(recipe), "--plain"]
    began = time.monotonic()
    row.outcome = until_last_step(words, folder, bench.steps, bench.seconds)
    row.seconds = round(time.monotonic() - began, 1)
    fill(row, folder / "run")
    if row.outcome == "ok" and not row.steps:
        row.outcome = tr("no step was finished")


def until_last_step(words: Sequence[str], folder: Path, steps: int, seconds: float) -> str:
    """Run a command that trains into `folder`/run until its last step: saving gigabytes of random weights says nothing.

    "ok", or what went wrong. What it says goes to `folder`/said.txt; nothing that it started is left.
    """
    end, path = time.monotonic() + seconds, folder / "run" / "events.jsonl"
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None:
            if any(event.step >= steps for event in events_of(path, Step)):
                return "ok"
            if time.monotonic() > end:
                return tr("no end within {seconds:.0f} s", seconds=seconds)
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode == 0:
        return "ok"
    return why_failed((folder / "said.txt").read_text(encoding="utf-8", errors="replace"), process.returncode)


def why_failed(said: str, code: int) -> str:
    """What a run that ended badly said last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return _line(tr("exit {code}: {said}", code=code, said=" ".join(lines[-4:])))


def events_of(path: Path, kind: type[T]) -> list[T]:
    """The events of one kind that a run has written so far."""
    return [event for event in read(path) if isinstance(event, kind)] if path.exists() else []


def fill(row: Row, run: Path) -> None:
    """What the run's own files say: the plan, and the steps after the first few."""
    if not (run / "plan.json").exists():
        return
    plan = Plan.load(run / "plan.json")
    chosen, speed = plan.chosen, plan.chosen.speed
    row.layout, row.predicted_gib = chosen.layout.name, _gib(chosen.device_peaks)
    if speed is not None:
        row.predicted, row.low, row.high = (round(x, 1) for x in (speed.tokens_per_second, speed.low, speed.high))
        row.predicted_idle = tuple(round(share, 4) for share in speed.idle)
    all_steps = events_of(run / "events.jsonl", Step)
    started = events_of(run / "events.jsonl", RunStarted)
    if not all_steps or not started:
        return
    steps = all_steps[min(WARM_STEPS, len(all_steps) // 2) :]
    seconds = [step.seconds for step in steps]
    row.steps, row.device = len(steps), started[0].device
    row.tokens_per_step = round(statistics.mean(step.tokens for step in steps))
    row.tokens_per_second = round(sum(step.tokens for step in steps) / sum(seconds), 1)
    row.first_loss, row.last_loss = round(all_steps[0].loss, 5), round(all_steps[-1].loss, 5)
    row.peak_gib = _gib(steps[-1].device_peaks or (steps[-1].peak_bytes,))
    shares = [[1 - own / step.seconds for own in step.rank_seconds] for step in steps if step.rank_seconds]
    row.idle = tuple(round(max(0.0, statistics.mean(each)), 4) for each in zip(*shares, strict=True))
    looks = [look for look in events_of(run / "events.jsonl", Devices) if look.step >= all_steps[-len(steps)].step]
    row.utilisation = _utilisation(looks)


def _utilisation(looks: Sequence[Devices]) -> tuple[float, ...]:
    """What the driver says of each GPU that is used: the share of the time in which any kernel ran on it."""
    found: dict[str, list[float]] = {}
    for look in looks:
        for reading in look.readings:
            if reading.used and reading.device != "host" and reading.utilisation is not None:
                found.setdefault(reading.device, []).append(reading.utilisation)
    return tuple(round(statistics.mean(shares), 3) for shares in found.values())


def write_rows(path: Path, rows: Sequence[Row], cap_gib: float | None) -> None:
    """The rows as CSV, written anew."""
    same = {
        "cap_gib": "" if cap_gib is None else cap_gib,
        "p2p_disabled": os.environ.get("NCCL_P2P_DISABLE", ""),
        "torch": version("torch"),
        "kitaeru": version("kitaeru"),
        "date": time.strftime("%Y-%m-%d"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)] + list(same))
        writer.writeheader()
        for row in rows:
            cells = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in asdict(row).items()}
            writer.writerow(cells | same)


def _gib(sizes: Sequence[int]) -> tuple[float, ...]:
    return tuple(round(size / GIB, 2) for size in sizes)


def _line(text: str) -> str:
    return " ".join(text.split())[:400]
