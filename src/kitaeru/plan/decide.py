"""Values that do not depend on memory: how long an example may be, how much is learnt at a time and how often to look.

Each function gives a `Decision` for a field the recipe leaves open, or nothing when it is pinned. The numbers of a
decision stand in its reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kitaeru.i18n import tr
from kitaeru.plan.types import DataFacts, Decision, MethodKind
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

SEQ_LEN = 2048
GLOBAL_BATCH_TOKENS = 16384
CPU_GLOBAL_BATCH_TOKENS = 4096
SMALLEST_GLOBAL_BATCH_TOKENS = 256
WISHED_STEPS = 50
LOOKS_PER_RUN = 10
LEARNING_RATES: dict[MethodKind, float] = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5, "pretrain": 1e-3}


@dataclass(frozen=True)
class Schedule:
    """How long a run is: tokens (or examples) of one step, and the steps as far as they can be known before it."""

    global_batch_tokens: int | None
    global_batch_examples: int | None
    epochs: float | None
    steps: int | None


def default_seq_len(recipe: Recipe, shape: ModelShape) -> int:
    """The longest example in tokens: what the recipe says, else what the model takes, at most 2048.

    A pinned `limits.micro_batch_tokens` bounds it too, since a micro-batch must hold the longest example.
    """
    if recipe.data.seq_len is not None:
        return recipe.data.seq_len
    bounds = [SEQ_LEN, shape.max_position or SEQ_LEN, recipe.limits.micro_batch_tokens or SEQ_LEN]
    return min(bounds)


def decide_seq_len(recipe: Recipe, shape: ModelShape) -> Iterator[Decision]:
    """`data.seq_len`."""
    if recipe.data.seq_len is not None:
        return
    length = default_seq_len(recipe, shape)
    if length == shape.max_position:
        why = tr("The model takes at most {length} tokens.", length=length)
    elif length == recipe.limits.micro_batch_tokens:
        why = tr("A micro-batch of {length} tokens must hold the longest example.", length=length)
    else:
        why = tr("{length} tokens hold most examples; longer ones are counted aloud.", length=length)
    yield Decision("data.seq_len", length, why)


def longest_example(recipe: Recipe, shape: ModelShape, facts: DataFacts | None) -> int:
    """Tokens of the longest example a micro-batch must hold: the data's own where it is known, else `data.seq_len`."""
    bound = default_seq_len(recipe, shape)
    return min(bound, facts.longest) if facts is not None and facts.longest else bound


def schedule(recipe: Recipe, longest: int, facts: DataFacts | None, *, on_cpu: bool) -> Schedule:
    """The global batch and the length of the run.

    >>> wish = Recipe.model_validate({"model": "m", "data": {"train": "d"}})
    >>> schedule(wish, 500, DataFacts(examples=1000, tokens=200_000, longest=500), on_cpu=False)
    Schedule(global_batch_tokens=11968, global_batch_examples=None, epochs=3, steps=51)
    """
    train = recipe.train
    epochs = train.epochs
    if epochs is None and train.max_steps is None:
        epochs = 1 if recipe.method == "pretrain" else 3
    tokens = train.global_batch_tokens
    if tokens is None and train.global_batch_examples is None:
        tokens = _global_batch(
            recipe, longest, facts, epochs, CPU_GLOBAL_BATCH_TOKENS if on_cpu else GLOBAL_BATCH_TOKENS
        )
    return Schedule(tokens, train.global_batch_examples, epochs, _steps(recipe, tokens, epochs, facts))


def _global_batch(recipe: Recipe, longest: int, facts: DataFacts | None, epochs: float | None, usual: int) -> int:
    """The usual size; less for data so small that it would make fewer than 50 steps; never less than one example."""
    tokens = usual
    if facts is not None and facts.tokens:
        most = facts.tokens if epochs is None else int(facts.tokens * epochs / WISHED_STEPS)
        tokens = min(usual, max(SMALLEST_GLOBAL_BATCH_TOKENS, most // 64 * 64))
    return max(tokens, longest, min(usual, recipe.limits.micro_batch_tokens or 0))


def _steps(recipe: Recipe, batch_tokens: int | None, epochs: float | None, facts: DataFacts | None) -> int | None:
    """Optimizer steps of the run; None when neither `max_steps` nor the data says."""
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    if facts is None or epochs is None or not facts.examples:
        return None
    examples = recipe.train.global_batch_examples
    per_epoch = facts.examples / examples if examples else facts.tokens / max(1, batch_tokens or 1)
    # A batch holds at least one example.
    return max(1, math.ceil(epochs * min(per_epoch, facts.examples)))


def decide_learning(
    recipe: Recipe, method: MethodKind, plan: Schedule, facts: DataFacts | None, *, on_cpu: bool
) -> Iterator[Decision]:
    """Epochs, learning rate, global batch, warm-up, and how often to validate and to save."""
    train = recipe.train
    if train.epochs is None and train.max_steps is None:
        why = (
            tr("Pre-training sees each text once.")
            if recipe.method == "pretrain"
            else tr("Three passes over the examples are usual for fine-tuning.")
        )
        yield Decision("train.epochs", float(plan.epochs or 1), why)
    if train.learning_rate is None:
        rate = LEARNING_RATES[method]
        yield Decision("train.learning_rate", rate, tr("{rate:g} is usual for {method}.", rate=rate, method=method))
    if train.global_batch_tokens is None and plan.global_batch_tokens is not None:
        yield Decision("train.global_batch_tokens", plan.global_batch_tokens, _why_batch(plan, facts, on_cpu))
    if plan.steps is None:
        return
    if train.warmup_steps is None:
        warmup = min(plan.steps - 1, math.ceil(train.warmup_fraction * plan.steps))
        why = tr("{share:.0%} of about {steps} steps.", share=train.warmup_fraction, steps=plan.steps)
        yield Decision("train.warmup_steps", warmup, why)
    yield from _decide_looks(recipe, plan.steps, facts)


def _why_batch(plan: Schedule, facts: DataFacts | None, on_cpu: bool) -> str:
    tokens = plan.global_batch_tokens or 0
    usual = CPU_GLOBAL_BATCH_TOKENS if on_cpu else GLOBAL_BATCH_TOKENS
    if tokens < usual and facts is not None:
        return tr(
            "The data has {tokens} tokens: with {batch} in a step the run makes about {steps} steps, not a handful.",
            tokens=facts.tokens,
            batch=tokens,
            steps=plan.steps or 0,
        )
    if tokens > usual:
        return tr("One example may have {tokens} tokens.", tokens=tokens)
    return tr("{tokens} tokens give a steady gradient.", tokens=tokens)


def _decide_looks(recipe: Recipe, steps: int, facts: DataFacts | None) -> Iterator[Decision]:
    train = recipe.train
    valid = bool(facts.valid_examples) if facts is not None else bool(recipe.data.valid or recipe.data.valid_fraction)
    every = train.eval_every or max(1, round(steps / LOOKS_PER_RUN))
    if train.eval_every is None and valid:
        yield Decision("train.eval_every", every, tr("At most ten times in about {steps} steps.", steps=steps))
    if train.save_every is None:
        why = tr("With each validation.") if valid else tr("At most ten times in about {steps} steps.", steps=steps)
        yield Decision("train.save_every", every, why)


def fill(recipe: Recipe, decisions: Sequence[Decision]) -> Recipe:
    """`recipe` with the decided values in their places."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for decision in decisions:
        section, _, name = decision.path.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[name] = decision.value
    for section, values in sections.items():
        top[section] = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update=top)
