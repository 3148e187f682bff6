"""A whole run, from an effective recipe to an adapter or a model on disk.

`prepare` does everything that needs no weights (hardware, shape, data, plan) and writes the run folder; `train` does
the rest. Between the two a caller can show the plan and set up its listeners.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kitaeru.data.prepare import Prepared
from kitaeru.data.prepare import prepare as prepare_data
from kitaeru.engine import checkpoint, ladder
from kitaeru.engine.build import Trainee, build
from kitaeru.engine.eight_bits import settle_eight_bits
from kitaeru.engine.loop import Loop
from kitaeru.engine.observe import looking, mfu_of_rate, observed
from kitaeru.engine.preflight import preflight
from kitaeru.engine.result import write_result
from kitaeru.engine.samples import Question, questions
from kitaeru.errors import Interrupted, KitaeruError, SteppedDownError, TrainingError, UsageError
from kitaeru.events import Event, EventLog, Listener, Notice, RunFinished, RunStarted, Sample, Step
from kitaeru.files import write_atomic, write_json
from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.machine.probe import probe
from kitaeru.model.generate import Sampling, answer
from kitaeru.model.load import config_dict, load_config
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.parallel import zero
from kitaeru.parallel.start import hash_frozen
from kitaeru.parallel.world import World, lost_contact
from kitaeru.plan.choose import default_seq_len, make_plan
from kitaeru.plan.deepspeed import FILE as DS_CONFIG
from kitaeru.plan.layouts import ZERO
from kitaeru.plan.types import Plan
from kitaeru.recipe.read import read, to_yaml
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

Phase = Callable[[str, int, int], None]


@dataclass
class Run:
    """A prepared run. `wish` is the recipe as asked for; the plan holds the effective one."""

    folder: Path
    wish: Recipe
    plan: Plan
    data: Prepared
    tokenizer: PreTrainedTokenizerBase
    resume_from: Path | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    folder: Path
    outcome: str
    step: int
    result: Path | None


def prepare(wish: Recipe, *, resume: bool = False, phase: Phase | None = None, hardware: Hardware | None = None) -> Run:
    """Read the data, make the plan (for `hardware`; without it, this machine), open the run folder.

    Raises:
        KitaeruError: the subclass says what is wrong; nothing is written but the token cache and skipped rows.
    """
    if wish.strategy in ZERO:
        zero.need(wish.strategy)
    quiet_libraries()
    folder = run_folder(wish)
    earlier = _earlier(folder, wish, resume)
    config = load_config(wish.model)
    shape = ModelShape.from_config(config_dict(config))
    tokenizer = load_tokenizer(wish.model)
    seq_len = default_seq_len(wish, shape)
    data = prepare_data(wish, tokenizer, seq_len=seq_len, bad_rows=folder / "bad_rows.jsonl", progress=phase)
    notices: list[str] = []
    resume_from = _resume_point(folder, wish, data, notices) if resume else None
    plan = make_plan(wish, _hardware(earlier, hardware or probe()), shape, data.facts)
    deepspeed = zero.configuration(plan) if plan.layout.strategy in ZERO else None
    _write_down(folder, wish, plan, deepspeed)
    if resume:
        plan = ladder.resumed(folder, plan)
    else:
        ladder.forget(folder)
    return Run(folder, wish, plan, data, tokenizer, resume_from, tuple(notices))


def reopen(folder: Path, *, resume: bool, main: bool, phase: Phase | None = None) -> Run:
    """A prepared run in another process: from the wish, the plan and the token cache alone.

    Only the `main` one of several processes says where a resumed run goes on.

    Raises:
        KitaeruError: as `prepare`.
    """
    quiet_libraries()
    plan = Plan.load(folder / "plan.json")
    wish = read(folder / "recipe.yaml").recipe
    tokenizer = load_tokenizer(wish.model)
    seq_len = plan.recipe.data.seq_len
    assert seq_len is not None
    data = prepare_data(wish, tokenizer, seq_len=seq_len, bad_rows=None, progress=phase)
    notices: list[str] = []
    resume_from = _resume_point(folder, wish, data, notices) if resume and main else None
    plan = ladder.resumed(folder, plan) if resume else plan
    return Run(folder, wish, plan, data, tokenizer, resume_from, tuple(notices))


def _resume_point(folder: Path, wish: Recipe, data: Prepared, notices: list[str]) -> Path | None:
    """The newest good checkpoint; None where there is none yet, which a notice says.

    Raises:
        CheckpointError: it belongs to another recipe or data set.
    """
    found = checkpoint.newest_good(
        folder / "checkpoints",
        damaged=lambda path, why: notices.append(
            tr("Checkpoint {name} is damaged ({why}); an earlier one is used.", name=path.name, why=why)
        ),
    )
    if found is None:
        notices.append(tr("There is no checkpoint to go on from yet: training starts at the beginning."))
        return None
    meta = json.loads((found / checkpoint.META).read_text(encoding="utf-8"))
    checkpoint.compare(meta["fingerprints"], fingerprints(wish, data))
    return found


def _hardware(earlier: Plan | None, now: Hardware) -> Hardware:
    """What a run is planned for. A resumed one: the machine it was planned for at first, so that only what the wish now
    changes, changes; unless it has another number of GPUs now.
    """
    if earlier is None:
        return now
    before = Hardware.from_dict(earlier.hardware)
    return before if (before.hosts, len(before.devices)) == (now.hosts, len(now.devices)) else now


def _write_down(folder: Path, wish: Recipe, plan: Plan, deepspeed: dict[str, Any] | None) -> None:
    """The wish and the plan in the run folder, and what DeepSpeed is told.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        write_atomic(folder / "recipe.yaml", to_yaml(wish.model_copy(update={"output": str(folder)})))
        plan.save(folder / "plan.json")
        if deepspeed is not None:
            write_json(folder / DS_CONFIG, deepspeed)
    except OSError as error:
        raise TrainingError(
            tr("The run folder cannot be written: {error}", error=error),
            where=str(folder),
            remedy=tr("Free space there, or choose another place: --set output=FOLDER"),
        ) from error


def run_folder(wish: Recipe) -> Path:
    """The folder of a run: `output`, or a new one under `runs/`."""
    if wish.output is not None:
        return Path(wish.output)
    name = wish.model.name.rstrip("/").rsplit("/", 1)[-1]
    return Path("runs") / f"{name}-{wish.method}-{time.strftime('%Y%m%d-%H%M%S')}"


def _earlier(folder: Path, wish: Recipe, resume: bool) -> Plan | None:
    """The plan of the run that is resumed; None for a new run.

    Raises:
        UsageError: the folder holds a run already and `resume` was not asked for, or it was and nothing says which run.
    """
    if resume and wish.output is None:
        raise UsageError(
            tr("--resume does not know which run to go on with."),
            remedy=tr("Name its folder: kitaeru train runs/NAME --resume, or give `output` in the recipe."),
        )
    if not (folder / "plan.json").exists():
        return None
    if not resume:
        if (folder / "events.jsonl").exists():
            raise UsageError(
                tr("{folder} already holds a run.", folder=folder),
                remedy=tr("Go on with it: add --resume. Or start another: --set output=NEW_FOLDER"),
            )
        return None
    return Plan.load(folder / "plan.json")


def train(run: Run, listeners: Sequence[Listener], phase: Phase | None = None, world: World | None = None) -> Result:
    """Train a prepared run to its end. Every event goes to `events.jsonl` first, then to the listeners.

    Of several processes (`world`) each calls this; only the main one writes, the others just tell their listeners.

    Raises:
        Interrupted: the user asked to stop; a checkpoint was saved.
        KitaeruError: training cannot go on; the reason is in the last event too.
    """
    world = world or World()
    log = EventLog(run.folder / "events.jsonl") if world.main else None
    started = time.perf_counter()

    @observed(main=world.main)
    def emit(event: Event) -> None:
        try:
            if log is not None:
                log(event)
        except OSError as error:
            raise TrainingError(
                tr("The log of the run cannot be written: {error}", error=error),
                where=str(run.folder / "events.jsonl"),
                remedy=tr("Free space on this disk, then go on with --resume: the checkpoints are whole."),
            ) from error
        for listener in listeners:
            listener(event)

    loops: list[Loop] = []
    try:
        while True:
            try:
                return _trained(run, emit, phase, world, started, loops)
            except SteppedDownError:
                if world.size > 1:
                    raise
                loops.clear()  # with it goes the model
            gc.collect()
            notices: list[str] = []
            plan = ladder.resumed(run.folder, Plan.load(run.folder / "plan.json"))
            run = replace(
                run, plan=plan, resume_from=_resume_point(run.folder, run.wish, run.data, notices), notices=()
            )
    except (Interrupted, SteppedDownError):
        raise
    except BaseException as error:
        reason = _reason(error)
        step = loops[-1].progress.step if loops else 0
        with suppress(TrainingError):  # the log itself may be what failed
            emit(Notice(level="error", text=reason, step=step))
            emit(RunFinished(outcome="failed", step=step, seconds=time.perf_counter() - started, reason=reason))
        raise
    finally:
        with suppress(OSError):  # what could not be written has been told
            if log is not None:
                log.close()


def _trained(run: Run, emit: Listener, phase: Phase | None, world: World, started: float, loops: list[Loop]) -> Result:
    """One attempt, from a model that is built to a result that is written; its loop goes into `loops`."""
    began = time.perf_counter()
    trainee, loop = _ready(run, emit, phase, world)
    ready = time.perf_counter()
    loops.append(loop)
    asked = questions(run.plan.recipe, run.data, run.tokenizer)
    if loop.progress.step == 0:
        _ask(trainee, asked, 0)
    asking = time.perf_counter() - ready

    def first_step(event: Event) -> None:
        emit(event)
        if isinstance(event, Step):
            trainee.emit = emit
            text = tr(
                "The first step was done {total:.1f} s after loading began: the model was ready after {ready:.1f} s.",
                total=time.perf_counter() - began - asking,
                ready=ready - began,
            )
            trainee.say(text, step=event.step)

    trainee.emit = first_step
    with looking(trainee, loop):
        outcome = loop()
    step = loop.progress.step
    if outcome == "interrupted":
        emit(RunFinished(outcome=outcome, step=step, seconds=time.perf_counter() - started))
        raise Interrupted(
            tr("Stopped after step {step} of {total}; everything is saved.", step=step, total=loop.total),
            remedy=tr("Go on with: kitaeru train {folder} --resume", folder=run.folder),
        )
    best = loop.take_best()
    if world.any(hash_frozen(trainee.model) != trainee.frozen_hash):
        raise TrainingError(
            tr("Frozen weights changed during training: the result would be wrong."),
            remedy=tr("Please report this with the recipe and the report page; the checkpoints are kept."),
        )
    _ask(trainee, asked, step)
    trainee.optimizer.state.clear()  # saved with the last step; the result may need the room
    result = write_result(trainee, run.folder)
    seconds = time.perf_counter() - started
    emit(RunFinished(outcome=outcome, step=step, seconds=seconds, best_step=best, result=str(result)))
    return Result(run.folder, outcome, step, result)


def _reason(error: BaseException) -> str:
    if lost_contact(error):
        return tr("The connection to another process broke: it has most likely died.")
    return str(error) if isinstance(error, KitaeruError) else f"{type(error).__name__}: {error}"


def _ready(run: Run, emit: Listener, phase: Phase | None, world: World) -> tuple[Trainee, Loop]:
    """Model, optimizer and loop, restored if the run is resumed, with the events that say so."""
    held: list[Event] = []  # the start comes first in the log, and is only known once the model is there
    trainee = build(
        run.plan,
        run.tokenizer,
        held.append,
        None if phase is None else lambda title: phase(title, 0, 0),
        world,
    )
    loop = Loop(trainee, run.data.train, run.data.valid, run.folder, fingerprints(run.wish, run.data))
    if phase is not None:
        phase(tr("Trying the largest micro-batch"), 0, 0)
    settle_eight_bits(loop)
    preflight(loop)
    resume_from = world.said(run.resume_from)
    if resume_from is not None:
        loop.restore(resume_from)
    trainee.emit = emit
    emit(
        RunStarted(
            run=str(run.folder),
            model=run.plan.recipe.model.name,
            method=run.plan.layout.method,
            strategy=run.plan.layout.strategy,
            device=device_name(trainee.device),
            max_steps=loop.total,
            resumed_step=loop.progress.step,
            environment=environment(),
            trainable_parameters=trainee.held.elsewhere[0]
            + sum(p.numel() for p in trainee.model.parameters() if p.requires_grad),
            total_parameters=_parameters(trainee),
            mfu_of_rate=mfu_of_rate(run.plan),
        )
    )
    kinds = {report.path: report.kind for report in run.data.reports}
    emit(replace(run.data.train.ready("train"), kinds=kinds))
    if run.data.valid is not None:
        emit(run.data.valid.ready("valid"))
    lower = ladder.told(run.folder, run.plan)
    told = () if lower is None else (replace(lower, step=loop.progress.step),)
    for event in (*(Notice(level="warning", text=text) for text in run.notices), *told, *held):
        emit(event)
    return trainee, loop


def fingerprints(wish: Recipe, data: Prepared) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption: the wish, and the data by content."""
    contents = {"train": data.train.fingerprint}
    if data.valid is not None:
        contents["valid"] = data.valid.fingerprint
    return {"recipe": wish.model_dump(mode="json"), "data": contents}


def environment() -> dict[str, str]:
    """Versions and the machine, for the report."""
    names = ("kitaeru", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "safetensors", "tokenizers")
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
    return found


def device_name(device: torch.device) -> str:
    """A GPU's name, or "cpu (N threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _parameters(trainee: Trainee) -> int:
    """All parameters; 4-bit ones count as what they stand for."""
    stood_for = {
        module.weight: module.quant_state.shape.numel()
        for module in trainee.model.modules()
        if getattr(module, "quant_state", None) is not None
    }
    here: int = sum(stood_for.get(parameter, parameter.numel()) for parameter in trainee.model.parameters())
    return here + trainee.held.elsewhere[1]


def _ask(trainee: Trainee, asked: Sequence[Question], step: int) -> None:
    recipe = trainee.plan.recipe
    for question in asked:
        ask = partial(
            answer,
            trainee.causal_lm,
            trainee.tokenizer,
            messages=question.messages,
            text=question.text,
            sampling=Sampling(max_new_tokens=recipe.samples.max_new_tokens),
        )
        with trainee.autocast():
            text = trainee.inside(ask)
        trainee.emit(Sample(step=step, prompt=question.shown, answer=text))
