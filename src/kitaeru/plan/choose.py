"""The choice: every layout that is legal is priced, and the fastest that fits with a margin is taken.

Today's candidates are those of one device: the methods the recipe leaves open, what is done with activations, and how
many tokens a micro-batch has. Speed is compared by passes over the weights: 4 for an adapter and 6 for full training, 2
more where layers are computed twice, and each micro-batch pays the same launch cost whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kitaeru.hardware import Hardware
from kitaeru.plan.decide import decide_learning, default_seq_len, fill
from kitaeru.plan.layouts import activation_policies, illegal, ways
from kitaeru.plan.memory import host_bytes, memory_items
from kitaeru.plan.nearest import no_layout, not_legal
from kitaeru.plan.problem import Problem, free_bytes, global_tokens, needed_bytes, setting_of, state
from kitaeru.plan.reasons import decide_layout, why_chosen, why_lost
from kitaeru.plan.types import Activations, Base, Candidate, DataFacts, Layout, MethodKind, Plan
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

__all__ = ["default_seq_len", "make_plan"]

# Tokens whose arithmetic takes as long as launching a micro-batch's kernels.
GPU_LAUNCH_TOKENS, CPU_LAUNCH_TOKENS = 512, 64

_SIZES = tuple(sorted({base << shift for base in (256, 384) for shift in range(13)}))


def make_plan(recipe: Recipe, hardware: Hardware, shape: ModelShape, facts: DataFacts | None = None) -> Plan:
    """What will run: `recipe` with nothing left open, the layout, its cost, and why each value was chosen.

    The same arguments give the same plan. Without `facts` the longest example is taken to be `data.seq_len`.

    Raises:
        PlanError: no layout of this recipe is legal or fits; the remedy names the nearest one that does.
    """
    problem = state(recipe, hardware, shape, facts)
    candidates = price(problem)
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        raise no_layout(problem, candidates, lambda other: price(state(other, hardware, shape, facts)))
    chosen = choose(problem, fitting)
    learning = decide_learning(recipe, chosen.layout.method, problem.schedule, facts, on_cpu=problem.device is None)
    decisions = (*decide_layout(problem, chosen), *learning)
    return Plan(
        recipe=fill(recipe, decisions),
        chosen=replace(chosen, why=why_chosen(problem, chosen)),
        decisions=decisions,
        rivals=_rivals(problem, chosen, candidates),
        hardware=hardware.to_dict(),
    )


# --- pricing ----------------------------------------------------------------------------------------------------------


def price(problem: Problem) -> list[Candidate]:
    """Every legal layout with its cost, in the order of preference of methods.

    Raises:
        PlanError: not one layout is legal.
    """
    candidates: list[Candidate] = []
    reasons: list[str] = []
    for method, base in ways(problem.recipe):
        for activations in activation_policies(problem.recipe):
            for tokens in micro_batch_sizes(problem):
                layout = _layout(problem, method, base, activations, tokens)
                reason = illegal(layout, problem.recipe, problem.device)
                if reason is None:
                    candidates.append(_candidate(problem, layout))
                elif reason not in reasons:
                    reasons.append(reason)
    if not candidates:
        raise not_legal(problem, reasons)
    return candidates


def _layout(problem: Problem, method: MethodKind, base: Base, activations: Activations, tokens: int) -> Layout:
    strategy = "single" if problem.recipe.strategy == "auto" else problem.recipe.strategy
    wants_gpu = problem.recipe.limits.device == "cuda" or problem.device is not None
    return Layout(strategy, method, base, problem.precision, activations, tokens, "cuda" if wants_gpu else "cpu")


def micro_batch_sizes(problem: Problem) -> list[int]:
    """Sizes to try, in tokens: from the longest example to the whole global batch, in steps of a half or a third."""
    recipe = problem.recipe
    if recipe.limits.micro_batch_tokens is not None:
        return [recipe.limits.micro_batch_tokens]
    least = problem.least_micro_batch
    if not recipe.data.packing:
        return [least]
    most = max(least, min(problem.usual_micro_batch, global_tokens(problem)))
    return sorted({least, most, *(size for size in _SIZES if least < size < most)})


def _candidate(problem: Problem, layout: Layout) -> Candidate:
    setting = setting_of(problem, layout)
    memory = memory_items(layout, problem.shape, setting)
    host = host_bytes(layout, problem.shape, setting)
    fits = needed_bytes(layout, sum(memory.values())) <= free_bytes(problem)
    return Candidate(layout, memory, host, fits)


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose(problem: Problem, fitting: Sequence[Candidate]) -> Candidate:
    """Of those that fit: the preferred method, then the least work for a token, then the fewest bytes."""
    first = fitting[0].layout
    same = [c for c in fitting if (c.layout.method, c.layout.base) == (first.method, first.base)]
    return min(same, key=lambda c: (token_cost(c.layout), c.peak_bytes))


def token_cost(layout: Layout) -> float:
    """Work for one token in passes over the weights, launch cost counted in; only good to compare layouts.

    >>> keep = Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda")
    >>> token_cost(keep), token_cost(replace(keep, activations="recompute", micro_batch_tokens=16384))
    (4.5, 6.1875)
    """
    passes = 4 if layout.method in ("lora", "qlora") else 6
    passes += 2 if layout.activations == "recompute" else 0
    launch = CPU_LAUNCH_TOKENS if layout.device == "cpu" else GPU_LAUNCH_TOKENS
    return passes * (1 + launch / layout.micro_batch_tokens)


def _rivals(problem: Problem, chosen: Candidate, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The best of every other way that was open (the smallest where none fits), with why it lost."""
    groups: dict[tuple[str, str, str], list[Candidate]] = {}
    for candidate in candidates:
        layout = candidate.layout
        groups.setdefault((layout.method, layout.base, layout.activations), []).append(candidate)
    rivals: list[Candidate] = []
    for group in groups.values():
        if chosen in group:
            larger = [c for c in group if token_cost(c.layout) < token_cost(chosen.layout)]
            best = min(larger, key=lambda c: c.peak_bytes, default=None)
        else:
            fitting = [c for c in group if c.fits]
            best = (
                min(fitting, key=lambda c: token_cost(c.layout)) if fitting else min(group, key=lambda c: c.peak_bytes)
            )
        if best is not None:
            rivals.append(
                replace(
                    best, why=(why_lost(problem, best, chosen, token_cost(best.layout) / token_cost(chosen.layout)),)
                )
            )
    return tuple(rivals)
