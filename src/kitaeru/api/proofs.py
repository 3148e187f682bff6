"""The six checks of `kitaeru doctor --train`: small real trainings of the bundled model that prove what runs rely on.

Run as `python -m kitaeru.api.proofs FOLDER`: a process that forks one more for each check, so that a crash or a hang in
one leaves the others. Without a GPU it has imported everything before. It writes a JSON object a line: what each check
found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kitaeru
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, language, set_language, tr
from kitaeru.machine.attempt import HUNG, Answer, attempt, end_group
from kitaeru.machine.probe import probe
from kitaeru.recipe.types import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from kitaeru.engine.build import Trainee

_ASSETS = Path(kitaeru.__file__).parent / "assets" / "quickstart"
_STEPS = 4
_EXAMPLES, _VALID_EXAMPLES = 64, 4
_MICRO_TOKENS, _LONGEST = 256, 256
_CHECK_SECONDS = 240.0
# How far two ways to compute the same may differ, as a share: the order of sums in fp32, and rounding in 16 bits.
_SAME = {"cpu": 1e-4, "cuda": 2e-2}
# The planner's activations beside what autograd keeps.
_NEAR_PLAN = 0.2
_CLIP = 0.05
_THIRTEEN_B = "tokyotech-llm/Swallow-13b-hf"


@dataclass(frozen=True)
class Proof:
    """What a check found. `passed` is None where it could not be made here; `detail` says why, or what was measured."""

    number: int
    title: str
    passed: bool | None
    detail: str
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Where the checks run: the folder of their runs, and the machine."""

    folder: Path
    hardware: Hardware
    device: str

    @classmethod
    def made(cls, folder: Path, hardware: Hardware, device: str) -> Bench:
        """A bench with its data laid out in `folder`: the first instructions of the quickstart."""
        for name, count in (("train", _EXAMPLES), ("valid", _VALID_EXAMPLES)):
            lines = (_ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return cls(folder, hardware, device)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step: a micro-batch for each device, and four at least."""
        return _MICRO_TOKENS * max(4, self.group[1])

    @property
    def group(self) -> tuple[str, int]:
        """Device and number of processes for what takes several: all GPUs, or two processes on the CPU."""
        count = len(self.hardware.devices)
        return ("cuda", count) if self.device == "cuda" and count > 1 else ("cpu", 2)

    def recipe(self, name: str, device: str, **changes: Any) -> Recipe:
        """The small training: the bundled model, every weight; `changes` as `train__max_steps=3`."""
        values: dict[str, Any] = {
            "model": "bundled",
            "method": "full",
            "strategy": "single",
            "data": {"train": str(self.folder / "train.jsonl"), "valid": str(self.folder / "valid.jsonl")},
            "train": {"max_steps": _STEPS, "eval_every": _STEPS, "global_batch_tokens": self.step_tokens},
            "limits": {"device": device, "devices": 1, "micro_batch_tokens": _MICRO_TOKENS, "threads": 1},
            "samples": {"count": 0},
            "track": {"tensorboard": False},
            "output": str(self.folder / name),
        }
        values["data"] |= {"seq_len": _LONGEST, "workers": 1}
        values["train"] |= {"learning_rate": 5e-4, "precision": "fp32" if device == "cpu" else "auto"}
        for path, value in changes.items():
            section, _, field = path.partition("__")
            if field:
                values[section][field] = value
            else:
                values[section] = value
        return Recipe.model_validate(values)


def prove(numbers: Sequence[int] = ()) -> Iterator[Proof]:
    """Run the checks (default: all) in a process of their own; each result as soon as it is there."""
    wanted = list(numbers) or list(range(1, len(CHECKS) + 1))
    with tempfile.TemporaryDirectory(prefix="kitaeru-proofs-") as folder, tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "kitaeru.api.proofs", folder, language(), *map(str, wanted)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                proof = Proof(**json.loads(line))
                wanted.remove(proof.number)
                yield proof
            child.wait(timeout=10)
        finally:
            end_group(child.pid)
        said.seek(0)
        last = said.read().strip().splitlines()
        for number in wanted:
            yield Proof(number, tr(CHECKS[number - 1][0]), False, last[-1] if last else tr("no answer"), 0.0)


# --- in the process of the checks -------------------------------------------------------------------------------------


def main(folder: Path, numbers: Sequence[int]) -> None:
    """The checks of these numbers, one after another."""
    import torch

    device = "cuda" if probe().devices and torch.version.cuda else "cpu"
    if device == "cpu":  # once, for all forks; where there is a GPU, it touches it (see `engine.launch`)
        import kitaeru.engine.run  # noqa: F401
    bench = Bench.made(folder, probe(), device)
    for number in numbers:
        title, check = CHECKS[number - 1]
        started = time.perf_counter()
        answer = attempt(folder, 1, {}, _quiet, check, bench, seconds=_CHECK_SECONDS)[0]
        if isinstance(answer, str):
            answer = {"passed": False, "detail": tr("it does not end") if answer == HUNG else answer}
        proof = Proof(number, tr(title), answer["passed"], answer["detail"], time.perf_counter() - started)
        print(json.dumps(asdict(proof)), flush=True)


def _quiet(rank: int, ranks: int, store: Path, check: Callable[[Bench], Answer], bench: Bench) -> Answer:
    """A check whose runs write to a file instead of the screen."""
    with (bench.folder / f"{check.__name__}.log").open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    return check(bench)


def _passed(detail: str, passed: bool = True) -> Answer:
    return {"passed": passed, "detail": detail}


def _skipped(detail: str) -> Answer:
    return {"passed": None, "detail": detail}


def full_fine_tuning(bench: Bench) -> Answer:
    """Every weight is trained, validated, saved and read back."""
    from kitaeru.report.history import History

    past = History.load(_train(bench.recipe(f"one-full-{bench.device}", bench.device)))
    before, after, finished = past.before, past.after, past.finished
    if before is None or after is None or finished is None or not finished.result:
        return _passed(tr("the run has no result"), False)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.result)
    whole = sum(p.numel() for p in model.parameters()) > 0
    detail = tr(
        "validation loss {before:.3f} → {after:.3f} in {steps} steps, {rate:,.0f} tokens/s",
        before=before.loss,
        after=after.loss,
        steps=_STEPS,
        rate=past.tokens_per_second,
    )
    return _passed(detail, whole and after.loss < before.loss)


def under_accelerate(bench: Bench) -> Answer:
    """`accelerate launch` starts the processes; the losses are those of one process."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        return _skipped(tr("accelerate is not installed: pip install accelerate"))
    from kitaeru.recipe.read import to_yaml

    device, count = bench.group
    name = "accelerate"
    # For the launcher's processes, not for one that plans for several.
    recipe = bench.recipe(name, device, strategy="ddp", limits__devices=None)
    (bench.folder / f"{name}.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    # What `accelerate config` would have written; a file of the user's own may ask for something else.
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "num_processes": count,
        "num_machines": 1,
        "machine_rank": 0,
        "mixed_precision": "no",
        "main_process_port": 0,
        "use_cpu": False,
    }
    (bench.folder / "accelerate-config.yaml").write_text(json.dumps(config), encoding="utf-8")
    words = ["-m", "accelerate.commands.launch", "--config_file", str(bench.folder / "accelerate-config.yaml")]
    words += ["-m", "kitaeru", "train", str(bench.folder / f"{name}.yaml"), "--plain"]
    done = subprocess.run(
        [sys.executable, *words],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if re.search(r"\w+(Error|Exception):", line)]
        said = lines[-1].strip() if lines else tr("it ended with code {code}", code=done.returncode)
        return _passed(_reason(bench.folder / name) or said, False)
    return _compared(bench, name, device, count)


def memory(bench: Bench) -> Answer:
    """Recomputation saves the bytes that the plan says; half precision halves them and computes the same."""
    half = _weighed(bench, False, "bf16" if bench.device == "cpu" else "auto")
    whole, recomputed = _weighed(bench, False, "fp32"), _weighed(bench, True, "fp32")
    measured, planned = whole.kept - recomputed.kept, whole.planned - recomputed.planned
    near = abs(measured - planned) <= _NEAR_PLAN * planned
    same = abs(half.loss - whole.loss) <= 0.02 * whole.loss and abs(recomputed.loss - whole.loss) <= 1e-4 * whole.loss
    detail = tr(
        "recomputation saves {measured:.1f} MB (planned {planned:.1f}); in 16 bits {half:.1f} MB of weights and "
        "activations instead of {whole:.1f}, loss {half_loss:.3f} and {loss:.3f}",
        measured=measured / 1e6,
        planned=planned / 1e6,
        half=(half.stored + half.kept) / 1e6,
        whole=(whole.stored + whole.kept) / 1e6,
        half_loss=half.loss,
        loss=whole.loss,
    )
    smaller = half.stored < 0.7 * whole.stored and half.kept < whole.kept
    return _passed(detail, measured > 0 and near and same and smaller)


def accumulation(bench: Bench) -> Answer:
    """Many micro-batches give the gradient of one big batch, and clipping scales it to the limit."""
    import torch

    small, norm = _clipped_gradient(bench, _MICRO_TOKENS)
    big, whole_norm = _clipped_gradient(bench, bench.step_tokens)
    apart = float((small - big).norm() / big.norm())
    length = float(torch.linalg.vector_norm(big))
    detail = tr(
        "{count} micro-batches and 1: gradients differ by {apart:.1e}; norms {norm:.4f} and {whole:.4f}, clipped to "
        "{length:.4f}",
        count=bench.step_tokens // _MICRO_TOKENS,
        apart=apart,
        norm=norm,
        whole=whole_norm,
        length=length,
    )
    clipped = min(norm, whole_norm) > _CLIP and abs(length - _CLIP) < 1e-3 * _CLIP
    return _passed(detail, clipped and apart < _SAME["cpu"])


def model_parallel(bench: Bench) -> Answer:
    """A 13B-class model planned for this machine, and a small one really split over the devices."""
    planned = _thirteen(bench)
    device, count = bench.group
    count = min(count, 4)  # a stage has a layer at least, and the model eight
    # An adapter: the bundled model's input and output are one table, which cannot be trained on two devices.
    _train(bench.recipe("split", device, strategy="model_parallel", method="lora", limits__devices=count))
    answer = _compared(bench, "split", device, count, "lora")
    return _passed(f"{planned}; {answer['detail']}", answer["passed"])


def data_parallel(bench: Bench) -> Answer:
    """Every device with the whole model and its share of the batch; the losses are those of one process."""
    device, count = bench.group
    _train(bench.recipe("data-parallel", device, strategy="ddp", limits__devices=count))
    return _compared(bench, "data-parallel", device, count)


CHECKS: tuple[tuple[str, Callable[[Bench], Answer]], ...] = (
    (N_("full fine-tuning"), full_fine_tuning),
    (N_("distributed training under accelerate"), under_accelerate),
    (N_("memory: recomputation, half precision"), memory),
    (N_("accumulation and clipping"), accumulation),
    (N_("model parallel"), model_parallel),
    (N_("data parallel on several devices"), data_parallel),
)

# --- how ------------------------------------------------------------------------------------------------------------


def _train(recipe: Recipe) -> Path:
    """A run as `kitaeru train` makes it; its folder."""
    from kitaeru.api.ranks import Show
    from kitaeru.api.runs import train

    folder = train(recipe, show=Show(plain=True))
    assert folder is not None
    return folder


def _reason(folder: Path) -> str:
    """Why a run failed, as its events say it."""
    from kitaeru.report.history import History

    with suppress(Exception):
        finished = History.load(folder).finished
        return finished.reason if finished else ""
    return ""


def _losses(folder: Path) -> list[float]:
    from kitaeru.report.history import History

    return [step.loss for step in History.load(folder).steps]


def _compared(bench: Bench, name: str, device: str, count: int, method: str = "full") -> Answer:
    """The losses of a run beside those of the same training in one process."""
    from kitaeru.report.history import History

    one = bench.folder / f"one-{method}-{device}"
    if not (one / "events.jsonl").exists() or len(_losses(one)) < _STEPS:
        with suppress(FileNotFoundError):
            (one / "events.jsonl").unlink()
        _train(bench.recipe(one.name, device, method=method))
    ours, theirs = _losses(bench.folder / name), _losses(one)
    apart = max((abs(a - b) / b for a, b in zip(ours, theirs, strict=False)), default=1.0)
    started = History.load(bench.folder / name).started
    detail = tr(
        "{where}, {strategy}: losses as of one, to {apart:.1e}",
        where=_where(bench.folder / name, device, count),
        strategy=started.strategy if started else "?",
        apart=apart,
    )
    if device == "cpu" and len(bench.hardware.devices) == 1:
        detail += "; " + tr("on the CPU, because here is one GPU")
    return _passed(detail, len(ours) == len(theirs) == _STEPS and apart < _SAME[device])


def _where(folder: Path, device: str, count: int) -> str:
    """On what a run was, and what carried its numbers."""
    from kitaeru.errors import PlanError
    from kitaeru.plan.types import Plan

    with suppress(PlanError):
        if Plan.load(folder / "plan.json").layout.processes == 1:
            return tr("{count} devices of one process ({device})", count=count, device=device)
    if device == "cuda":
        return tr("{count} GPUs over NCCL", count=count)
    return tr("{count} processes on the CPU over gloo", count=count)


def _trainee(recipe: Recipe) -> tuple[Trainee, Any]:
    """A model made ready as for a run, and the prepared run."""
    from kitaeru.engine.build import build
    from kitaeru.engine.run import prepare

    run = prepare(recipe)
    return build(run.plan, run.tokenizer, lambda event: None), run


@dataclass(frozen=True)
class _Weighed:
    """Bytes of frozen weights, bytes that autograd keeps of a micro-batch, what the plan says of these, the loss."""

    stored: int
    kept: int
    planned: int
    loss: float


def _weighed(bench: Bench, recompute: bool, precision: str) -> _Weighed:
    """An adapter's forward pass of one micro-batch."""
    import torch

    from kitaeru.data.batches import micro_batches

    name = f"memory-{'recompute' if recompute else 'keep'}-{precision}"
    changes = {"method": "lora", "limits__checkpointing": recompute, "train__precision": precision}
    trainee, run = _trainee(bench.recipe(name, bench.device, **changes))
    layout = run.plan.layout
    chosen = list(range(min(16, len(run.data.train))))
    batches = micro_batches(run.data.train, chosen, micro_batch_tokens=layout.micro_batch_tokens, packing=True)
    number = max(range(len(batches)), key=lambda n: batches.tokens[n])
    batch = batches[number].to(trainee.device)
    trainee.model.train()
    constant = {t.untyped_storage().data_ptr() for t in (*trainee.model.parameters(), *trainee.model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constant:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    torch.manual_seed(0)
    with trainee.autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainee.loss_sum(batch)
    planned = run.plan.chosen.memory.get("activations", 0) * batches.tokens[number] // layout.micro_batch_tokens
    stored = sum(p.nbytes for p in trainee.causal_lm.parameters() if not p.requires_grad)
    return _Weighed(stored, sum(found.values()), planned, float(loss.detach()) / int((batch.targets >= 0).sum()))


def _clipped_gradient(bench: Bench, micro: int) -> tuple[Tensor, float]:
    """The gradient of the first step as the optimizer gets it, on the CPU, and its norm before it was clipped."""
    import torch

    from kitaeru.engine.loop import Loop
    from kitaeru.events import Event, Step

    recipe = bench.recipe(
        f"micro-{micro}",
        bench.device,
        train__max_steps=1,
        train__max_grad_norm=_CLIP,
        train__precision="fp32",
        limits__micro_batch_tokens=micro,
    )
    heard: list[Event] = []
    trainee, run = _trainee(recipe)
    trainee.emit = heard.append
    taken: list[Tensor] = []

    def take(*_: Any) -> None:
        taken.extend(p.grad.detach().float().cpu().flatten() for _, p in trainee.named if p.grad is not None)

    trainee.optimizer.register_step_pre_hook(take)
    Loop(trainee, run.data.train, None, run.folder, {})()
    [step] = [event for event in heard if isinstance(event, Step)]
    return torch.cat(taken), step.grad_norm


def _thirteen(bench: Bench) -> str:
    """The way that the planner takes for a 13B-class model on this machine, or what is missing for it."""
    from kitaeru.errors import PlanError
    from kitaeru.plan.known import models
    from kitaeru.shape import catalogue

    entry = next(entry for entry in catalogue() if entry.name == _THIRTEEN_B)
    try:
        [known] = models(bench.hardware, 2048, [entry])
    except PlanError as error:
        return error.what
    best = known.best
    if best is None or best.speed is None:
        return tr("{model} does not fit this machine in any way", model=entry.name)
    return tr(
        "{model}: {way}, {size:.1f} GB, about {rate:,.0f} tokens/s",
        model=entry.name.rpartition("/")[2],
        way=best.layout.name,
        size=max(best.device_peaks) / 1e9,
        rate=best.speed.tokens_per_second,
    )


if __name__ == "__main__":
    set_language(sys.argv[2])
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[3:]])
