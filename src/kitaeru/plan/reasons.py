"""Why each value and layout was chosen, in plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kitaeru.i18n import tr
from kitaeru.plan.decide import decide_seq_len
from kitaeru.plan.memory import memory_items
from kitaeru.plan.problem import GB, Problem, free_bytes, global_tokens, needed_bytes, setting_of
from kitaeru.plan.stored import trained_parameters, trains_all
from kitaeru.plan.types import Candidate, Decision, Layout


def decide_layout(problem: Problem, chosen: Candidate) -> Iterator[Decision]:
    """Decisions about layout and device, for the fields the recipe leaves open."""
    recipe, layout = problem.recipe, chosen.layout
    yield from decide_seq_len(recipe, problem.shape)
    if recipe.limits.device is None:
        yield Decision("limits.device", layout.device, _why_device(problem))
    if recipe.strategy == "auto":
        yield Decision("strategy", layout.strategy, tr("One device trains in this version."))
    if recipe.train.precision == "auto":
        yield Decision("train.precision", layout.precision, _why_precision(problem))
    if recipe.method == "auto":
        yield Decision("method", layout.method, _why_method(problem, layout))
    if recipe.model.quantize == "auto":
        yield Decision("model.quantize", layout.base, _why_base(layout))
    if recipe.limits.micro_batch_tokens is None:
        yield Decision("limits.micro_batch_tokens", layout.micro_batch_tokens, _why_micro(problem, chosen))
    if recipe.limits.checkpointing is None:
        recompute = layout.activations == "recompute"
        yield Decision("limits.checkpointing", recompute, _why_activations(problem, chosen))
    if recipe.limits.threads is None and layout.device == "cpu":
        cores = problem.hardware.cpu_cores
        yield Decision("limits.threads", cores, tr("One for each of the {count} cores.", count=cores))


def _why_device(problem: Problem) -> str:
    if problem.device is None:
        return tr("There is no GPU here.")
    size = problem.device.memory_bytes / GB
    return tr("{device} with {size:.1f} GB is here.", device=problem.device.name, size=size)


def _why_precision(problem: Problem) -> str:
    if problem.device is None:
        return tr("A CPU is fastest and most exact in fp32.")
    if problem.precision == "bf16":
        return tr("{device} computes in bf16.", device=problem.device.name)
    return tr("{device} has no bf16; fp16 with a loss scaler is used.", device=problem.device.name)


def _why_method(problem: Problem, layout: Layout) -> str:
    weights = problem.shape.parameters() * (4 if layout.precision == "fp32" else 2) / GB
    if layout.method == "lora":
        return tr("The base needs {size:.1f} GB unquantised, and that fits.", size=weights)
    return tr("The base needs {size:.1f} GB unquantised, which leaves too little room; 4 bits fit.", size=weights)


def _why_base(layout: Layout) -> str:
    if layout.base == "nf4":
        return tr("QLoRA stores the frozen base in 4 bits.")
    return tr("{method} works on weights that are not quantised.", method=layout.method)


def _why_micro(problem: Problem, chosen: Candidate) -> str:
    tokens = chosen.layout.micro_batch_tokens
    if tokens >= global_tokens(problem):
        return tr("The whole global batch goes through at once.")
    if tokens >= problem.usual_micro_batch:
        return tr("{tokens} tokens keep the device busy; more would only take memory.", tokens=tokens)
    if tokens == problem.least_micro_batch:
        return tr("It must hold the longest example, {tokens} tokens.", tokens=problem.longest)
    return tr(
        "The most that fits: {peak:.1f} GB of {free:.1f} GB at the peak.",
        peak=chosen.peak_bytes / GB,
        free=free_bytes(problem) / GB,
    )


def _why_activations(problem: Problem, chosen: Candidate) -> str:
    if chosen.layout.activations == "keep":
        kept = chosen.memory.get("activations", 0) / GB
        return tr("Everything the backward pass needs fits ({size:.1f} GB), so nothing is computed twice.", size=kept)
    items = memory_items(replace(chosen.layout, activations="keep"), problem.shape, setting_of(problem, chosen.layout))
    return tr(
        "Keeping everything would take {size:.1f} GB, so layers are computed twice instead.",
        size=sum(items.values()) / GB,
    )


def why_chosen(problem: Problem, chosen: Candidate) -> tuple[str, ...]:
    """What the chosen layout costs and trains, and what a person should know about the plan."""
    layout = chosen.layout
    trained = trained_parameters(layout, problem.shape, problem.recipe.lora)
    total = problem.shape.parameters() + (0 if trains_all(layout) else trained)
    sentences = [
        tr(
            "{peak:.1f} GB at the peak; {device} has {free:.1f} GB free.",
            peak=chosen.peak_bytes / GB,
            device=problem.device_name,
            free=free_bytes(problem) / GB,
        ),
        tr(
            "{trained:,} of {total:,} parameters are trained ({share:.2%}).",
            trained=trained,
            total=total,
            share=trained / total,
        ),
    ]
    if not problem.shape.exact:
        sentences.append(
            tr("The family {family} is not known here: it is counted as a Llama.", family=problem.shape.family)
        )
    if len(problem.hardware.devices) > 1 and layout.device == "cuda":
        count = len(problem.hardware.devices) - 1
        sentences.append(tr("Other GPUs stay idle ({count}): one device trains in this version.", count=count))
    return tuple(sentences)


def why_lost(problem: Problem, rival: Candidate, chosen: Candidate, cost: float) -> str:
    """Why a rival was not taken; `cost` is its time for a token as a share of the chosen one's."""
    if not rival.fits:
        return tr(
            "Does not fit: it needs {need:.1f} GB with its margin, and {free:.1f} GB are free.",
            need=needed_bytes(rival.layout, rival.peak_bytes) / GB,
            free=free_bytes(problem) / GB,
        )
    if rival.layout.base != chosen.layout.base:
        return tr("Fits too, but a 4-bit base is less exact and is not needed here.")
    return tr("Fits too, but takes about {share:.0%} of the chosen layout's time for a token.", share=cost)
