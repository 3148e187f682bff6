"""What the trainers are told, in the words of the field; each is carried over into a recipe, which is what runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import UsageError
from kitaeru.i18n import tr

__all__ = ["LoRAConfig", "MultiGPUTrainingConfig", "TrainingConfig"]

StrategyName = Literal[
    "auto", "single", "ddp", "model_parallel", "pipeline", "fsdp", "tensor_parallel", "zero1", "zero2", "zero3"
]
Memory = int | float | str
Values = dict[str, Any]

# Words that other tools have for the same strategies.
_STRATEGIES = {"tensor_parallel": "tensor", "pipeline_parallel": "pipeline", "data_parallel": "ddp"}
_COPIES = ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3")
_SPLITS = ("pipeline", "model_parallel", "tensor")
_SCHEDULES = {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(kw_only=True)
class TrainingConfig:
    """How to train. What is None is decided by the planner, which says why (`plan.json`, the report).

    Args:
        learning_rate: the peak rate. None: 2e-4 with an adapter, 1e-5 for all weights.
        batch_size: examples of one device in one accumulation step. With `gradient_accumulation_steps` it says how many
            examples one optimizer step learns from: batch_size x gradient_accumulation_steps x devices (times the
            copies of the model, where a strategy splits it). Examples are packed without padding, and how many tokens
            go through a device at a time is chosen to fit its memory; the result does not depend on it.
        gradient_accumulation_steps: see `batch_size`. Given alone, `batch_size` is 1.
        effective_batch_size: examples of one optimizer step over all devices, said directly.
        num_epochs: passes over the training data. None: 3. `max_steps` comes first.
        max_steps: optimizer steps.
        warmup_steps: steps in which the rate rises. None: 3 % of the run.
        max_grad_norm: gradients are scaled down to this global norm; 0 never does.
        weight_decay: decoupled weight decay; norms and biases are left out.
        lr_scheduler_type: `linear`, `cosine`, `constant` or `wsd`, after the warm-up.
        max_length: the longest example in tokens; longer ones are cut at the end and counted aloud.
        eval_steps: validate every so many steps.
        save_steps: write a checkpoint every so many steps.
        save_total_limit: how many of the newest checkpoints are kept (the best one comes on top).
        logging_steps: print a line every so many steps where the live view cannot be shown (a log, a notebook). The
            run's `events.jsonl` holds every step in any case.
        output_dir: the run folder. None: a new one under `runs/`.
        fp16: 16-bit arithmetic with a loss scaler. A GPU with bf16 does better with that.
        bf16: bfloat16 arithmetic. With neither, the planner takes bf16 where the GPU has it.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; None: where
            that is needed to fit.
        optim: `adamw`, `adamw_16bit`, `adamw_8bit`, `paged_adamw_8bit`, `lion` or `adafactor`.
        seed: of data order, initial adapter weights and dropout.
        recipe: anything else of a recipe by its path, as `{"train.neftune_alpha": 5.0}`, or as the command line has
            it: `["train.neftune_alpha=5"]`. It comes last and wins. All fields: `kitaeru recipe explain`.

    Raises:
        UsageError: values that contradict each other.
    """

    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    effective_batch_size: int | None = None
    num_epochs: float | None = None
    max_steps: int | None = None
    warmup_steps: int | None = None
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    lr_scheduler_type: str | None = None
    max_length: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    logging_steps: int | None = None
    output_dir: str | Path | None = None
    fp16: bool = False
    bf16: bool = False
    gradient_checkpointing: bool | None = None
    optim: str | None = None
    seed: int | None = None
    recipe: Mapping[str, Any] | Sequence[str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: names the fields, and what to write instead.
        """
        if self.fp16 and self.bf16:
            raise UsageError(tr("`fp16` and `bf16` are both asked for."), remedy=tr("Leave one out, or both."))
        for name in ("batch_size", "gradient_accumulation_steps", "effective_batch_size", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(tr("`{name}` is {value}; it counts from 1.", name=name, value=value))

    def values(self, devices: int) -> Values:
        """The recipe's values by path, for training on so many devices (`recipe` is not in them yet).

        Raises:
            UsageError: as `check`.
        """
        self.check()
        precision = "fp16" if self.fp16 else "bf16" if self.bf16 else None
        # A recipe is strict: 1 is no fraction of epochs there.
        epochs = None if self.num_epochs is None else float(self.num_epochs)
        schedule = _SCHEDULES.get(self.lr_scheduler_type or "", self.lr_scheduler_type)
        return {
            "train.learning_rate": self.learning_rate,
            "train.global_batch_examples": self.examples_per_step(devices),
            "train.epochs": None if self.max_steps is not None else epochs,
            "train.max_steps": self.max_steps,
            "train.warmup_steps": self.warmup_steps,
            "train.max_grad_norm": self.max_grad_norm,
            "train.weight_decay": self.weight_decay,
            "train.schedule": schedule,
            "train.eval_every": self.eval_steps,
            "train.save_every": self.save_steps,
            "train.keep_checkpoints": self.save_total_limit,
            "train.precision": precision,
            "train.optimizer": self.optim,
            "train.seed": self.seed,
            "data.seq_len": self.max_length,
            "limits.checkpointing": self.gradient_checkpointing,
        }

    def examples_per_step(self, devices: int) -> int | None:
        """The effective batch: examples of one optimizer step over so many devices; None leaves it to the planner.

        >>> TrainingConfig(batch_size=8, gradient_accumulation_steps=4).examples_per_step(2)
        64
        >>> TrainingConfig(effective_batch_size=64).examples_per_step(2)
        64
        """
        batch, accumulation = self.batch_size, self.gradient_accumulation_steps
        product = (batch or 1) * (accumulation or 1) * self.copies(devices)
        whole = self.effective_batch_size
        if whole is None:
            return None if batch is None and accumulation is None else product
        if batch is not None and accumulation is not None and product != whole:
            raise UsageError(
                tr(
                    "`batch_size` {batch} x `gradient_accumulation_steps` {steps} on {count} devices make {product} "
                    "examples, and `effective_batch_size` is {whole}.",
                    batch=batch,
                    steps=accumulation,
                    count=devices,
                    product=product,
                    whole=whole,
                ),
                remedy=tr("Leave `effective_batch_size` out, or the other two."),
            )
        return whole

    def copies(self, devices: int) -> int:
        """Copies of the model that learn side by side on so many devices."""
        return devices


@dataclass(kw_only=True)
class MultiGPUTrainingConfig(TrainingConfig):
    """How to train on several devices: `TrainingConfig`, and how they share the work.

    Args:
        strategy: `auto` (the fastest that fits), `single`, `ddp` (each device has the whole model), `fsdp` (weights in
            pieces on all devices), `model_parallel` (layers split over the devices of one process), `pipeline` (layers
            split, a process for each device; both have several micro-batches on the way), `tensor_parallel`, `zero1`,
            `zero2`, `zero3`.
            What this version cannot do is refused with the reason the recipe gives.
        max_memory_per_gpu: what may be used of each device, by index: `{0: "22GB", 1: "22GB"}`. As many devices are
            used as it names. "GB" are 10**9 bytes, "GiB" 2**30, a plain number bytes.
        pipeline_parallel_size: split each copy of the model over so many devices, as a pipeline.
        tensor_parallel_size: split each layer over so many devices.
        devices: use so many: GPUs, or processes on a CPU. None: every GPU that is visible.
    """

    strategy: StrategyName = "auto"
    max_memory_per_gpu: Mapping[int, Memory] | None = None
    pipeline_parallel_size: int | None = None
    tensor_parallel_size: int | None = None
    devices: int | None = None

    def check(self) -> None:
        """As of `TrainingConfig`, and that strategy, sizes and devices fit each other."""
        super().check()
        sizes = {"pipeline": self.pipeline_parallel_size or 1, "tensor": self.tensor_parallel_size or 1}
        asked = [name for name, size in sizes.items() if size > 1]
        if len(asked) > 1:
            raise UsageError(
                tr("A pipeline of tensor-parallel groups is not built."),
                remedy=tr("Leave `tensor_parallel_size` out, or `pipeline_parallel_size`."),
            )
        wished = _STRATEGIES.get(self.strategy, self.strategy)
        for name in asked:
            if wished not in ("auto", name):
                raise UsageError(
                    tr("`{name}_parallel_size` does nothing with strategy={wished!r}.", name=name, wished=wished),
                    remedy=tr("Write strategy={name!r}, or leave the size out.", name=name),
                )
        if self.max_memory_per_gpu is not None:
            count = len(self.max_memory_per_gpu)
            memory_of(self.max_memory_per_gpu)
            if self.devices not in (None, count):
                raise UsageError(
                    tr(
                        "`max_memory_per_gpu` names {count} devices, and `devices` is {devices}.",
                        count=count,
                        devices=self.devices,
                    ),
                    remedy=tr("Leave `devices` out."),
                )

    @property
    def recipe_strategy(self) -> str:
        """The recipe's word for the strategy."""
        wished = _STRATEGIES.get(self.strategy, self.strategy)
        if wished == "auto" and (self.pipeline_parallel_size or 1) > 1:
            return "pipeline"
        if wished == "auto" and (self.tensor_parallel_size or 1) > 1:
            return "tensor"
        return wished

    @property
    def count(self) -> int | None:
        """Devices to use; None for all that are there."""
        return len(self.max_memory_per_gpu) if self.max_memory_per_gpu else self.devices

    def split(self, devices: int) -> int:
        """Devices that share one copy of the model, of so many."""
        strategy = self.recipe_strategy
        if strategy not in _SPLITS:
            return 1
        return (self.pipeline_parallel_size if strategy == "pipeline" else self.tensor_parallel_size) or devices

    def copies(self, devices: int) -> int:
        """Copies of the model that learn side by side.

        >>> MultiGPUTrainingConfig(strategy="pipeline", pipeline_parallel_size=2).copies(4)
        2
        """
        if self.recipe_strategy in _COPIES:
            return devices
        return 1 if self.recipe_strategy == "single" else max(1, devices // self.split(devices))

    def values(self, devices: int) -> Values:
        """The recipe's values by path."""
        split = self.split(devices)
        return super().values(devices) | {
            "strategy": self.recipe_strategy,
            "limits.devices": self.count,
            "limits.split_over": split if self.recipe_strategy in _SPLITS and split > 1 else None,
            "limits.memory_gb": memory_of(self.max_memory_per_gpu) if self.max_memory_per_gpu else None,
        }


@dataclass
class LoRAConfig:
    """The adapter.

    Args:
        r: rank of the update matrices.
        lora_alpha: scale; the update is multiplied by lora_alpha / r. None: 2 x r.
        lora_dropout: dropout on the adapter's input.
        target_modules: names of the linear layers that get an adapter; None: all but the output head.
        bias: only "none": with an adapter, no bias of the base is trained.
        use_qlora: hold the frozen base in 4 bits (or, with `qlora_4bit=False`, in 8).
        qlora_4bit: True alone asks for QLoRA too.

    Raises:
        UsageError: a bias is asked for, or `use_qlora=False` with `qlora_4bit=True`.
    """

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    bias: str = "none"
    use_qlora: bool | None = None
    qlora_4bit: bool | None = None

    def __post_init__(self) -> None:
        if self.bias != "none":
            raise UsageError(
                tr("bias={bias!r}: kitaeru trains no biases of the base beside an adapter.", bias=self.bias),
                remedy=tr(
                    "The adapter could not be switched off then. Write bias='none', or use FullFinetuningTrainer."
                ),
            )
        if self.use_qlora is False and self.qlora_4bit:
            raise UsageError(
                tr("`qlora_4bit` asks for a 4-bit base, and `use_qlora` is False."),
                remedy=tr("Leave one of them out."),
            )

    @property
    def base(self) -> Literal["nf4", "int8"] | None:
        """How the base is stored, as far as this says; None leaves it to the model."""
        if self.use_qlora or (self.use_qlora is None and self.qlora_4bit):
            return "int8" if self.qlora_4bit is False else "nf4"
        return None

    def values(self) -> Values:
        """The recipe's values by path."""
        targets = self.target_modules
        return {
            "lora.r": self.r,
            "lora.alpha": float(2 * self.r if self.lora_alpha is None else self.lora_alpha),
            "lora.dropout": float(self.lora_dropout),
            "lora.targets": None if targets is None else [targets] if isinstance(targets, str) else list(targets),
        }


def memory_of(limits: Mapping[int, Memory]) -> float:
    """The limit of each device in GB (10**9 bytes), from accelerate's way to say it.

    >>> memory_of({0: "22GB", 1: "22GB"}), round(memory_of({0: "22GiB"}), 2)
    (22.0, 23.62)

    Raises:
        UsageError: the limits differ, the devices are not 0, 1, …, or a limit cannot be read.
    """
    if sorted(limits) != list(range(len(limits))):
        raise UsageError(
            tr("Memory limits are for the devices {names}.", names=", ".join(map(str, limits))),
            remedy=tr("Count from 0 without gaps; CUDA_VISIBLE_DEVICES says which GPUs these are."),
        )
    sizes = {gigabytes(limit) for limit in limits.values()}
    if len(sizes) != 1:
        raise UsageError(
            tr("The devices have different memory limits."),
            remedy=tr("Give one limit for all; what is free on each GPU is measured and respected anyway."),
        )
    return sizes.pop()


def gigabytes(limit: Memory) -> float:
    """A size in GB (10**9 bytes), from "22GB", "22GiB" or a number of bytes.

    Raises:
        UsageError: it cannot be read.
    """
    if isinstance(limit, int | float):
        return limit / 10**9
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", limit)
    if match is None or match[2].upper() not in _UNITS or match[1].count(".") > 1:
        raise UsageError(
            tr("{value!r} is not a size.", value=limit), remedy=tr('Write "22GB", "22GiB" or a number of bytes.')
        )
    return float(match[1]) * _UNITS[match[2].upper()] / 10**9
