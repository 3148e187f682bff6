"""Impossible combinations of values, as one ordered table of rules: each a function from a recipe to what clashes.

A new rule is a function and a row in `RULES`. Rules see only values; `read` finds the lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from kitaeru.i18n import tr
from kitaeru.recipe.fields import leaves, value_at
from kitaeru.recipe.types import Recipe

ZERO = ("zero1", "zero2", "zero3")
_BITS = {"nf4": 4, "int8": 8}


@dataclass(frozen=True)
class Clash:
    """Values that cannot stand together: the paths involved (the one to show first), what is wrong, what to do."""

    paths: tuple[str, ...]
    what: str
    remedy: str


Rule = Callable[[Recipe, Collection[str]], Iterator[Clash]]


def check(recipe: Recipe, given: Collection[str] = ()) -> list[Clash]:
    """Everything that clashes, in the order of `RULES`. `given` are the paths that a person wrote, not a default."""
    return [clash for rule in RULES for clash in rule(recipe, given)]


def qlora_needs_nf4(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """QLoRA is LoRA on a 4-bit base."""
    base = recipe.model.quantize
    if recipe.method == "qlora" and base not in ("auto", "nf4"):
        yield Clash(
            ("model.quantize", "method"),
            tr("`method: qlora` is an adapter on a 4-bit base, but `quantize` is {base}", base=base),
            tr("Write `method: lora`, or leave `quantize` out."),
        )


def whole_weights_are_not_quantised(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """Full training and pre-training change every weight; quantised weights cannot be changed."""
    base = recipe.model.quantize
    if recipe.method in ("full", "pretrain") and base in _BITS:
        yield Clash(
            ("model.quantize", "method"),
            tr(
                "`method: {method}` trains every weight; weights stored in {bits} bits cannot be trained",
                method=recipe.method,
                bits=_BITS[base],
            ),
            tr("Leave `quantize` out, or write `method: lora`."),
        )


def adapter_needs_adapter_method(recipe: Recipe, given: Collection[str]) -> Iterator[Clash]:
    """Values under `lora` that would do nothing."""
    if recipe.method not in ("full", "pretrain"):
        return
    for spec in leaves():
        if spec.path.startswith("lora.") and spec.path in given and value_at(recipe, spec.path) != spec.default:
            yield Clash(
                (spec.path, "method"),
                tr("`method: {method}` has no adapter, so this value would do nothing", method=recipe.method),
                tr("Remove it, or write `method: lora`."),
            )


def pissa_needs_float_base(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """PEFT takes PiSSA's singular values from fp32, fp16 or bf16 weights only."""
    if recipe.lora.init == "pissa" and (recipe.method == "qlora" or recipe.model.quantize in _BITS):
        yield Clash(
            ("lora.init", "model.quantize", "method"),
            tr("`init: pissa` needs a base that is not quantised"),
            tr("Write `init: olora` or `init: default`, or `method: lora` without `quantize`."),
        )


def one_global_batch(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """Tokens or examples, not both."""
    if recipe.train.global_batch_tokens is not None and recipe.train.global_batch_examples is not None:
        yield Clash(
            ("train.global_batch_examples", "train.global_batch_tokens"),
            tr("the global batch is given twice, in tokens and in examples"),
            tr("Remove `global_batch_tokens` or `global_batch_examples`."),
        )


def micro_batch_holds_longest(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """One example must fit into a micro-batch."""
    micro, longest = recipe.limits.micro_batch_tokens, recipe.data.seq_len
    if micro is not None and longest is not None and micro < longest:
        yield Clash(
            ("limits.micro_batch_tokens", "data.seq_len"),
            tr("an example may have {longest} tokens, but a micro-batch only {micro}", longest=longest, micro=micro),
            tr(
                "Raise `limits.micro_batch_tokens` to {longest}, or lower `data.seq_len` to {micro}.",
                longest=longest,
                micro=micro,
            ),
        )


def one_validation_set(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """A validation set of its own, or a share of the training set."""
    if recipe.data.valid and recipe.data.valid_fraction > 0:
        yield Clash(
            ("data.valid_fraction", "data.valid"),
            tr("`valid` names a validation set, and `valid_fraction` takes one out of the training data"),
            tr("Remove one of the two."),
        )


def validation_is_not_training(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """A loss on trained examples says nothing."""
    trained = {(source.path, source.split) for source in recipe.data.train}
    for source in recipe.data.valid:
        if (source.path, source.split) in trained:
            yield Clash(
                ("data.valid", "data.train"),
                tr("{path} is both trained and validated on; that loss would say nothing", path=source.path),
                tr("Name another file, or write `valid_fraction: 0.05` instead of `valid`."),
            )


def early_stop_needs_validation(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """Early stopping looks at the validation loss."""
    if recipe.train.early_stop is not None and not recipe.data.valid and recipe.data.valid_fraction == 0:
        yield Clash(
            ("train.early_stop", "data.valid"),
            tr("`early_stop` looks at the validation loss, and there is nothing to validate on"),
            tr("Add `valid: FILE` or `valid_fraction: 0.05` under `data`."),
        )


def gpu_only(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """What a CPU cannot do."""
    if recipe.limits.device != "cpu":
        return
    cases = (
        ("train.optimizer", "paged_adamw_8bit", tr("Write `optimizer: adamw_8bit` or `adamw`.")),
        ("train.precision", "fp16", tr("Write `precision: fp32` or `bf16`, or leave it out.")),
        ("model.attention", "flash_attention_2", tr("Leave `attention` out.")),
    )
    for path, value, remedy in cases:
        if value_at(recipe, path) == value:
            yield Clash((path, "limits.device"), tr("{value} needs a GPU, but `device` is cpu", value=value), remedy)


def warmup_ends(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """The learning rate must reach its peak before the end."""
    warmup, steps = recipe.train.warmup_steps, recipe.train.max_steps
    if warmup is not None and steps is not None and warmup >= steps:
        yield Clash(
            ("train.warmup_steps", "train.max_steps"),
            tr("{warmup} warm-up steps leave nothing of {steps} steps", warmup=warmup, steps=steps),
            tr("Lower `warmup_steps`, or use `warmup_fraction`."),
        )


def wsd_fits(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """Warm-up and decay of `wsd` must not overlap."""
    train = recipe.train
    if train.schedule == "wsd" and train.warmup_steps is None and train.warmup_fraction + train.decay_fraction > 1:
        yield Clash(
            ("train.decay_fraction", "train.warmup_fraction"),
            tr("warm-up and decay together take more than the whole run"),
            tr("Lower `warmup_fraction` or `decay_fraction`; their sum is at most 1."),
        )


def what_is_checkpointed_agrees(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """Settings that say how much is computed again, and one that says nothing is."""
    limits = recipe.limits
    if limits.offload_activations and limits.recomputed_layers is not None:
        yield Clash(
            ("limits.recomputed_layers", "limits.offload_activations"),
            tr("`offload_activations` computes all layers again, so a number of layers would do nothing"),
            tr("Remove one of the two."),
        )
    if limits.checkpointing is not False:
        return
    for path in ("limits.recomputed_layers", "limits.offload_activations"):
        if value_at(recipe, path):
            yield Clash(
                (path, "limits.checkpointing"),
                tr("nothing is computed again with `checkpointing: false`, so this value would do nothing"),
                tr("Remove it, or write `checkpointing: true`."),
            )


def clipping_needs_all_gradients(recipe: Recipe, given: Collection[str]) -> Iterator[Clash]:
    """A norm of all gradients is known when all are there."""
    limit = recipe.train.max_grad_norm
    if recipe.train.step_in_backward and limit:
        which = "" if "train.max_grad_norm" in given else " " + tr("(the default)")
        yield Clash(
            ("train.step_in_backward", "train.max_grad_norm"),
            tr(
                "gradients are clipped to a norm of {limit}{which}, which is known when all are there",
                limit=limit,
                which=which,
            ),
            tr("Write `max_grad_norm: 0`, or leave `step_in_backward` out."),
        )


def split_needs_a_splitting_strategy(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """A model is split over devices by some strategies only."""
    splits = recipe.strategy in ("auto", "pipeline", "model_parallel", "tensor", "fsdp")
    if recipe.limits.split_over is not None and not splits:
        yield Clash(
            ("limits.split_over", "strategy"),
            tr("`strategy: {strategy}` does not split the model over devices", strategy=recipe.strategy),
            tr("Leave `split_over` out, or `strategy`."),
        )


def fsdp_cuts_no_int8(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """LLM.int8 keeps weights and scales in objects of its own, whole on each device."""
    if recipe.strategy == "fsdp" and recipe.model.quantize == "int8":
        yield Clash(
            ("strategy", "model.quantize"),
            tr("`strategy: fsdp` cannot cut weights that are stored in 8 bits"),
            tr("Write `strategy: ddp`, or `quantize: nf4`."),
        )


def ds_config_is_deepspeeds(recipe: Recipe, _: Collection[str]) -> Iterator[Clash]:
    """DeepSpeed's configuration does nothing without DeepSpeed."""
    if recipe.limits.ds_config is not None and recipe.strategy not in ZERO:
        yield Clash(
            ("limits.ds_config", "strategy"),
            tr("`ds_config` is for DeepSpeed (zero1, zero2, zero3), not for {strategy}", strategy=recipe.strategy),
            tr("Write `strategy: zero2`, or leave `ds_config` out."),
        )


RULES: tuple[Rule, ...] = (
    ds_config_is_deepspeeds,
    split_needs_a_splitting_strategy,
    fsdp_cuts_no_int8,
    qlora_needs_nf4,
    whole_weights_are_not_quantised,
    adapter_needs_adapter_method,
    pissa_needs_float_base,
    one_validation_set,
    validation_is_not_training,
    micro_batch_holds_longest,
    one_global_batch,
    warmup_ends,
    wsd_fits,
    clipping_needs_all_gradients,
    early_stop_needs_validation,
    gpu_only,
    what_is_checkpointed_agrees,
)
