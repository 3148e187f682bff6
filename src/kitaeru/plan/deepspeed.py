"""DeepSpeed's configuration, made from a plan: what `parallel.zero` hands to its engine, and the run folder shows.

A person's own file (`limits.ds_config`) may set how ZeRO works: bucket sizes, thresholds, logging. What decides the
mathematics has one home, the recipe: such a value in the file may say the same and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kitaeru.errors import UsageError
from kitaeru.i18n import tr
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import Recipe

FILE = "ds_config.json"
# Gradients on their way to the rank that owns them are collected in buffers of so many numbers.
BUCKET_NUMBERS = 32 << 20
_AUTO = "auto"
# Sections and values that change neither the mathematics nor what is on which device.
_PASSED_ON = (
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
)
_ZERO_PASSED_ON = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "log_trace_cache_warnings",
    "module_granularity_threshold",
    "overlap_comm",
    "prefetch_bucket_size",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
)
_NOTHING: dict[str, Any] = {}


def deepspeed_config(layout: Layout, recipe: Recipe, trained: int = 0) -> dict[str, Any]:
    """The configuration of a ZeRO layout, with what `limits.ds_config` adds. `trained`: parameters trained, if known.

    DeepSpeed counts batches in examples and kitaeru in tokens: each backward pass is one micro-batch to DeepSpeed, and
    kitaeru says which one is a step's last. kitaeru clips (by a norm summed in 64 bits, as everywhere) and computes
    16-bit products under autocast with 32-bit weights, so DeepSpeed does neither.

    >>> layout = Layout("zero2", "full", "none", "bf16", "keep", 2048, "cuda", 2, "offload", 2)
    >>> recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "d"}, "method": "full"})
    >>> deepspeed_config(layout, recipe)["zero_optimization"]["offload_optimizer"]
    {'device': 'cpu', 'pin_memory': True}

    Raises:
        UsageError: the file is missing, is no JSON, or says something else than the recipe.
    """
    bucket = min(BUCKET_NUMBERS, -(-trained // 512) * 512) if trained else BUCKET_NUMBERS
    zero: dict[str, Any] = {
        "stage": int(layout.strategy.removeprefix("zero")),
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if layout.strategy == "zero3":
        zero |= {"stage3_prefetch_bucket_size": BUCKET_NUMBERS, "stage3_param_persistence_threshold": 100_000}
        zero["stage3_max_reuse_distance"] = BUCKET_NUMBERS  # weights that are needed later than that are let go
    in_ram = {"device": "cpu", "pin_memory": layout.device == "cuda"}
    if layout.variant.startswith("offload"):
        zero["offload_optimizer"] = in_ram
    if layout.variant == "offload-all":
        zero["offload_param"] = in_ram
    config: dict[str, Any] = {
        "train_batch_size": layout.devices,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if recipe.limits.ds_config is not None:
        own = read_own(Path(recipe.limits.ds_config))
        _check(own, layout, recipe)
        config |= {key: own[key] for key in _PASSED_ON if key in own and own[key] != _AUTO}
        given = own.get("zero_optimization", _NOTHING)
        zero |= {key: given[key] for key in _ZERO_PASSED_ON if key in given and given[key] != _AUTO}
    return config


def read_own(path: Path) -> dict[str, Any]:
    """A person's DeepSpeed configuration.

    Raises:
        UsageError: it is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _wrong(path, tr("DeepSpeed's configuration cannot be read: {error}", error=error)) from error
    if not isinstance(value, dict):
        raise _wrong(path, tr("DeepSpeed's configuration is not a JSON object."))
    return value


def offloads(own: Mapping[str, Any]) -> str:
    """The variant of a ZeRO layout that a person's configuration asks for."""
    zero = own.get("zero_optimization", _NOTHING)
    parameters, optimizer = (_device(zero, name) == "cpu" for name in ("offload_param", "offload_optimizer"))
    return "offload-all" if parameters else "offload" if optimizer else ""


def _device(zero: Mapping[str, Any], name: str) -> str:
    return str((zero.get(name) or _NOTHING).get("device", "none"))


def _wrong(path: Path, what: str, remedy: str | None = None) -> UsageError:
    return UsageError(
        what, where=str(path), remedy=remedy or tr("Correct it, or leave `limits.ds_config` out: one is made.")
    )


def _check(own: Mapping[str, Any], layout: Layout, recipe: Recipe) -> None:
    """Refuse what says something else than the recipe, and what kitaeru does not pass on."""
    assert recipe.limits.ds_config is not None
    path = Path(recipe.limits.ds_config)
    for key, value in own.items():
        if value != _AUTO and key not in (*_PASSED_ON, *_COMPARED, "zero_optimization"):
            raise _wrong(path, tr("`{key}` in DeepSpeed's configuration is not for kitaeru.", key=key))
    for key, compare in _COMPARED.items():
        if key in own and own[key] != _AUTO:
            clash = compare(own[key], layout, recipe)
            if clash is not None:
                there, here = clash
                raise _wrong(
                    path,
                    tr("`{key}` says {there}, and the recipe says {here}.", key=key, there=there, here=here),
                    tr("The recipe decides this: leave `{key}` out of DeepSpeed's configuration.", key=key),
                )
    _check_zero(own.get("zero_optimization", _NOTHING), layout, path)
    if own.get("communication_data_type", "fp32") not in (_AUTO, None, "fp32"):
        raise _wrong(path, tr("Gradients are summed in 32 bits: `communication_data_type` must be fp32."))


def _check_zero(zero: Any, layout: Layout, path: Path) -> None:
    if not isinstance(zero, dict):
        raise _wrong(path, tr("`zero_optimization` is not a JSON object."))
    stage = int(layout.strategy.removeprefix("zero"))
    if zero.get("stage", _AUTO) not in (_AUTO, stage):
        raise _wrong(
            path,
            tr(
                "`zero_optimization.stage` is {stage}, and the strategy {name}.",
                stage=zero["stage"],
                name=layout.strategy,
            ),
            tr("Train with the stage it names: --set strategy=zero{stage}", stage=zero["stage"]),
        )
    for name in ("offload_optimizer", "offload_param"):
        if _device(zero, name) not in ("none", "cpu", _AUTO):
            raise _wrong(path, tr("`zero_optimization.{name}` goes to RAM (cpu) or nowhere (none).", name=name))
    if offloads({"zero_optimization": zero}) != layout.variant:
        raise _wrong(path, tr("It offloads otherwise than the plan, {way}.", way=layout.way))
    for key, value in zero.items():
        if value != _AUTO and key not in (*_ZERO_PASSED_ON, "stage", "offload_optimizer", "offload_param"):
            raise _wrong(
                path, tr("`{key}` in DeepSpeed's configuration is not for kitaeru.", key=f"zero_optimization.{key}")
            )


Clash = tuple[str, str] | None
_Compare = Callable[[Any, Layout, Recipe], Clash]


def _same(there: Any, here: Any) -> Clash:
    return None if there == here else (str(there), str(here))


def _batch(value: Any, _: Layout, recipe: Recipe) -> Clash:
    train = recipe.train
    if train.global_batch_examples is not None:
        return _same(value, train.global_batch_examples)
    return f"{value}", tr("{tokens} tokens a step", tokens=train.global_batch_tokens or _AUTO)


def _micro(value: Any, layout: Layout, _: Recipe) -> Clash:
    return f"{value}", tr("at most {tokens} tokens a pass", tokens=layout.micro_batch_tokens)


def _accumulated(value: Any, _: Layout, __: Recipe) -> Clash:
    return f"{value}", tr("as many passes as the global batch needs")


def _clipping(value: Any, _: Layout, recipe: Recipe) -> Clash:
    return _same(float(value), float(recipe.train.max_grad_norm or 0.0))


def _precision(name: str) -> _Compare:
    def compare(value: Any, layout: Layout, _: Recipe) -> Clash:
        enabled = isinstance(value, dict) and value.get("enabled", False)
        if enabled in (_AUTO, False) or layout.precision == name:
            return None
        return name, layout.precision

    return compare


def _optimizer(value: Any, _: Layout, recipe: Recipe) -> Clash:
    train = recipe.train
    kind = str(value.get("type", ""))
    ours = "adamw" if train.optimizer == "auto" else train.optimizer
    if kind != _AUTO and kind.lower() != ours:
        return kind, ours
    wanted = {
        "lr": train.learning_rate,
        "betas": [train.beta1, train.beta2],
        "eps": train.epsilon,
        "weight_decay": train.weight_decay,
    }
    for key, there in (value.get("params") or _NOTHING).items():
        if there == _AUTO:
            continue
        if key not in wanted:
            return f"{key}={there}", ours
        if there != wanted[key]:
            return f"{key}={there}", f"{key}={wanted[key]}"
    return None


def _scheduler(value: Any, _: Layout, recipe: Recipe) -> Clash:
    return str(value.get("type", value) if isinstance(value, dict) else value), recipe.train.schedule


_COMPARED: dict[str, _Compare] = {
    "train_batch_size": _batch,
    "train_micro_batch_size_per_gpu": _micro,
    "gradient_accumulation_steps": _accumulated,
    "gradient_clipping": _clipping,
    "bf16": _precision("bf16"),
    "fp16": _precision("fp16"),
    "optimizer": _optimizer,
    "scheduler": _scheduler,
}
