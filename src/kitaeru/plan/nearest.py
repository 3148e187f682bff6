"""When nothing fits: which smallest change would, and what to type for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kitaeru.errors import PlanError
from kitaeru.i18n import tr
from kitaeru.plan.decide import fill
from kitaeru.plan.layouts import waits_to_be_asked
from kitaeru.plan.problem import GB, Problem, free_bytes, needed_bytes
from kitaeru.plan.stored import weight_bytes
from kitaeru.plan.types import Candidate, Decision, Layout
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape, catalogue

SHORTEST = 256
Change = dict[str, Any]
Pricer = Callable[[Recipe], list[Candidate]]


def not_legal(problem: Problem, reasons: Sequence[str]) -> PlanError:
    """The error for a recipe of which no layout is legal."""
    recipe = problem.recipe
    if recipe.limits.device == "cuda" and problem.device is None:
        remedy = tr("Leave `limits.device` out to train on the CPU, or look for the GPU with `kitaeru doctor`.")
    elif recipe.train.cuda_graphs:
        remedy = tr("Leave `train.cuda_graphs` out: then they are used where they can be.")
    elif recipe.train.step_in_backward:
        remedy = tr("Leave `train.step_in_backward` out: then it is done where it can be and must.")
    elif recipe.train.arithmetic != "auto":
        remedy = tr("Leave `train.arithmetic` out.")
    elif recipe.strategy == "single" and problem.hardware.hosts > 1:
        remedy = tr("Leave `strategy` out.")
    elif recipe.train.precision in ("bf16", "fp16"):
        remedy = tr("Leave `train.precision` out.")
    elif recipe.strategy not in ("auto", "single"):
        remedy = tr("Leave `strategy` out.")
    else:
        remedy = tr("Leave out `model.quantize` and `train.optimizer`, and let kitaeru decide.")
    return PlanError(" ".join(reasons), remedy=remedy)


def no_layout(problem: Problem, candidates: Sequence[Candidate], price: Pricer) -> PlanError:
    """The error when nothing that is built fits: what the smallest needs, what there is, the nearest that would fit."""
    usable = [candidate for candidate in candidates if candidate.built]
    if not usable:
        return not_built(candidates)
    what = _too_large(problem, usable)
    remedy = _nearest(problem, price)
    waiting = [candidate for candidate in candidates if candidate.fits]
    if waiting:
        best = min(waiting, key=lambda c: c.speed.step_seconds if c.speed else 0.0)
        if waits_to_be_asked(best.layout.strategy, problem.recipe):
            sentence = tr(
                "{name} would fit, with DeepSpeed: --set strategy={strategy}",
                name=best.layout.name,
                strategy=best.layout.strategy,
            )
        else:
            sentence = tr("{name} would fit, but is not built yet.", name=best.layout.name)
        return PlanError(what, remedy=f"{sentence} {remedy}" if remedy else sentence)
    return PlanError(what, remedy=remedy or _hopeless(problem))


def _too_large(problem: Problem, usable: Sequence[Candidate]) -> str:
    """What the smallest layout needs and what there is: of RAM, where one would fit on the devices."""
    model = problem.recipe.model.name
    short = [c for c in usable if needed_bytes(c.layout, c.peak_bytes) <= free_bytes(problem)]
    if short:
        least = min(short, key=lambda candidate: candidate.host_bytes)
        return tr(
            "{model} does not fit: {name} needs {need:.0f} GB of RAM, and {free:.0f} GB are free.",
            model=model,
            name=least.layout.name,
            need=least.host_bytes / GB,
            free=problem.hardware.host_free_bytes / GB,
        )
    smallest = min(usable, key=lambda candidate: candidate.peak_bytes)
    return tr(
        "{model} does not fit: the smallest layout ({method}, {tokens} tokens at a time) needs {need:.1f} GB, "
        "and {device} has {free:.1f} GB free.",
        model=model,
        method=smallest.layout.method,
        tokens=smallest.layout.micro_batch_tokens,
        need=needed_bytes(smallest.layout, smallest.peak_bytes) / GB,
        device=problem.device_name,
        free=free_bytes(problem) / GB,
    )


def not_built(candidates: Sequence[Candidate]) -> PlanError:
    """The error for a recipe that wants a strategy the engine cannot run."""
    layout = candidates[0].layout
    what = tr("This version of kitaeru cannot train {method} with `strategy: {strategy}` yet.",
              method=layout.method, strategy=layout.strategy)  # fmt: skip
    return PlanError(what, remedy=tr("Leave `strategy` out."))


def _nearest(problem: Problem, price: Pricer) -> str | None:
    for change in _changes(problem):
        try:
            fitting = [candidate for candidate in price(_changed(problem.recipe, change)) if candidate.fits]
        except PlanError:
            continue
        if fitting:
            best = min(fitting, key=lambda candidate: candidate.peak_bytes)
            flags = " ".join(f"--set {path}={_written(value)}" for path, value in change.items())
            return tr("This fits, with {peak:.1f} GB: {flags}", peak=best.peak_bytes / GB, flags=flags)
    return None


def _changes(problem: Problem) -> Iterator[Change]:
    """Changes from small to large: no graphs, recomputation, a smaller micro-batch, shorter examples, another method, a
    disk.
    """
    recipe = problem.recipe
    loose: Change = {}
    if recipe.train.cuda_graphs:
        loose["train.cuda_graphs"] = False
        yield dict(loose)
    if recipe.limits.checkpointing is False:
        loose["limits.checkpointing"] = True
        yield dict(loose)
    if recipe.limits.recomputed_layers is not None:
        loose["limits.recomputed_layers"] = problem.shape.layers - 1
        yield dict(loose)
    if recipe.limits.offload_activations is False and problem.device is not None:
        loose["limits.offload_activations"] = True
        loose.pop("limits.recomputed_layers", None)
        yield dict(loose)
    if recipe.limits.micro_batch_tokens is not None and recipe.limits.micro_batch_tokens > problem.longest:
        loose["limits.micro_batch_tokens"] = problem.least_micro_batch
        yield dict(loose)
    lengths = [{"data.seq_len": length} for length in _shorter(problem.longest)]
    methods: list[Change] = []
    if recipe.method in ("full", "pretrain"):
        methods += _lighter_beside_weights(recipe)
    if recipe.method == "full":
        methods.append({"method": "lora"})
    if recipe.method in ("full", "lora"):
        methods.append({"method": "qlora"} | ({"model.quantize": "nf4"} if recipe.model.quantize != "auto" else {}))
    if recipe.method == "auto" and recipe.model.quantize in ("none", "int8"):
        methods.append({"model.quantize": "nf4"})
    if recipe.limits.micro_batch_tokens is None:
        yield from ({**loose, **length} for length in lengths)
        yield from ({**loose, **method} for method in methods)
        yield from ({**loose, **method, **length} for method in methods for length in lengths)
    else:
        yield from ({**loose, **method} for method in methods)
    if recipe.limits.offload_folder is None and recipe.method in ("auto", "lora", "qlora"):
        yield {**loose, "limits.offload_folder": "./offload"}


def _lighter_beside_weights(recipe: Recipe) -> list[Change]:
    """Without clipping, gradients need not all be there at once (`train.step_in_backward`); moments in 8 bits; both."""
    changes: list[Change] = []
    if recipe.train.max_grad_norm and recipe.train.step_in_backward is None:
        changes.append({"train.max_grad_norm": 0.0})
    if recipe.train.optimizer in ("auto", "adamw"):
        changes.append({"train.optimizer": "adamw_8bit"})
    return [*changes, changes[0] | changes[1]] if len(changes) == 2 else changes


def _shorter(longest: int) -> list[int]:
    lengths = []
    length = 1 << (max(longest - 1, 1).bit_length() - 1)
    while length >= SHORTEST:
        lengths.append(length)
        length //= 2
    return lengths


def _changed(recipe: Recipe, change: Change) -> Recipe:
    return fill(recipe, [Decision(path, value, "") for path, value in change.items()])


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hopeless(problem: Problem) -> str:
    """What is missing when no change helps: the weights alone against the devices, and a known model that would fit."""
    layout = Layout("single", "qlora", "nf4", problem.precision, "recompute", 512, "cuda")
    size, free = sum(weight_bytes(layout, problem.shape)), free_bytes(problem)
    count = 1 if problem.device is None else len(problem.hardware.devices)
    together = sum(free_bytes(problem, rank=rank) for rank in range(count))
    if count > 1 and size > together:
        sentence = tr(
            "Its weights alone take {size:.1f} GB in 4 bits, {times:.1f} times what is free on all {count} devices "
            "together.",
            size=size / GB,
            times=size / max(together, 1),
            count=count,
        )
    elif count > 1:
        sentence = tr(
            "Its weights alone take {size:.1f} GB in 4 bits; no way to share them between {count} devices that is "
            "built fits with what training needs beside them.",
            size=size / GB,
            count=count,
        )
    else:
        sentence = tr(
            "Its weights alone take {size:.1f} GB in 4 bits, {times:.1f} times what is free.",
            size=size / GB,
            times=size / max(free, 1),
        )
    model = _largest_that_fits(layout, int(free * 0.75))
    if model is None or model.parameters() >= problem.shape.parameters():
        return sentence + " " + tr("Free memory on the device, or choose a smaller model.")
    return sentence + " " + tr("A known model that fits with qlora: {model}.", model=model.name)


def _largest_that_fits(layout: Layout, room: int) -> ModelShape | None:
    shapes = [ModelShape.from_config(entry.config, entry.name) for entry in catalogue()]
    fitting = [shape for shape in shapes if sum(weight_bytes(layout, shape)) <= room]
    return max(fitting, key=lambda shape: shape.parameters(), default=None)
