"""The recipe: what a person wants. Frozen, strict, every field documented; None means "decide for me".

The description of a field is its help text (`kitaeru recipe explain train.learning_rate`), its place in the JSON schema
and its documentation: it is written once, here. Units are in the names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kitaeru.i18n import N_

Method = Literal["auto", "full", "lora", "qlora", "pretrain"]
Strategy = Literal["auto", "single", "ddp", "fsdp", "pipeline", "model_parallel", "tensor", "zero1", "zero2", "zero3"]
Quantize = Literal["auto", "none", "nf4", "int8"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Arithmetic = Literal["auto", "plain", "16bit", "fp8", "int8"]
Optimizer = Literal["auto", "adamw", "adamw_16bit", "adamw_8bit", "paged_adamw_8bit", "lion", "adafactor"]
Schedule = Literal["linear", "cosine", "constant", "wsd"]
RowKind = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _alone_to_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else _to_tuple(value)


class Section(BaseModel):
    """The base of all recipe types: strict, frozen, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=False)


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class ModelSection(Section):
    """The model to start from."""

    name: str = Field(
        description=N_(
            "Where the model comes from: `bundled` (the small Japanese model inside kitaeru), a Hub id such as "
            "`elyza/Llama-3-ELYZA-JP-8B`, or a local folder. With `method: pretrain`, a folder that holds a config.json; "
            "its weights, if any, are not read."
        )
    )
    revision: str | None = Field(None, description=N_("Hub revision (branch, tag or commit) of model and tokenizer."))
    tokenizer: str | None = Field(
        None, description=N_("Hub id or folder of the tokenizer, when it is not the model's own.")
    )
    chat_template: str | None = Field(
        None, description=N_("A file with a Jinja chat template that replaces the tokenizer's own.")
    )
    quantize: Quantize = Field(
        "auto",
        description=N_(
            "How the frozen base is stored: `none` (16 bits, or 32 in fp32), `nf4` (4 bits, double quantisation) or `int8` "
            "(LLM.int8). `auto` is nf4 for qlora and none otherwise."
        ),
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "packed"] = Field(
        "auto",
        description=N_(
            "The attention kernel. `auto` takes kitaeru's packed kernels where every layer is causal attention, with a "
            "window or without, else torch's SDPA with a block mask."
        ),
    )
    trust_remote_code: bool = Field(
        False, description=N_("Run Python code that comes with the model. Off: such models are refused.")
    )


class SourceSection(Section):
    """One source of examples."""

    path: str = Field(
        description=N_(
            "A file (.json, .jsonl, .csv, .parquet, .txt, also .gz and .zst), a folder of such files, or a Hub data set id. "
            "In a recipe file a path is looked for beside the file first, then from the current folder."
        )
    )
    kind: RowKind = Field("auto", description=N_("The form of the rows; `auto` looks at them and says what it found."))
    weight: float = Field(
        1.0,
        gt=0,
        description=N_(
            "How often its examples are seen in one epoch: 2.0 twice, 0.5 every second example (chosen by the seed)."
        ),
    )
    split: str = Field("train", description=N_("The split to read when the source is a Hub data set."))
    columns: dict[str, str] | None = Field(
        None,
        description=N_(
            "Names of columns that differ from the usual ones, as `usual: yours`, for example `instruction: question`."
        ),
    )


def _source_alone(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list | tuple):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_source_alone)]


class DataSection(Section):
    """What to learn from."""

    train: Sources = Field(
        min_length=1,
        description=N_(
            "What to train on: one source or a list; a source is a path or has its own keys (path, kind, weight…)."
        ),
    )
    valid: Sources = Field((), description=N_("What to validate on, in the same form. Never trained."))
    valid_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=N_(
            "Without `valid`: this share of the training examples, chosen by the seed, is kept for validation."
        ),
    )
    seq_len: int | None = Field(
        None,
        ge=8,
        description=N_(
            "The longest example in tokens; longer ones are treated as `long` says. Default: what the model takes, at most 2048."
        ),
    )
    long: Literal["truncate", "split", "drop"] | None = Field(
        None,
        description=N_(
            "What happens to longer examples: `truncate` cuts the end off, `split` makes several (default for raw text), "
            "`drop` leaves them out. The count is shown. Default for conversations: truncate."
        ),
    )
    packing: bool = Field(
        True,
        description=N_(
            "Put several examples into one micro-batch row without padding. Examples never see one another: attention and "
            "positions start anew for each."
        ),
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant",
        description=N_(
            "In conversations: learn the assistant's turns only, or every token. Raw text is always trained whole."
        ),
    )
    system: str | None = Field(None, description=N_("A system message for conversations that have none."))
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop",
        description=N_(
            "A row that cannot be read: stop and name it, or skip it and write it to `bad_rows.jsonl` in the run folder."
        ),
    )
    max_examples: int | None = Field(None, ge=1, description=N_("Read at most so many examples of each source."))
    workers: int | None = Field(None, ge=1, description=N_("Processes that tokenise. Default: the number of cores."))


class LoraSection(Section):
    """The adapter, for `method: lora` and `qlora`. The names are PEFT's where PEFT has one."""

    r: int = Field(16, ge=1, description=N_("Rank of the update matrices."))
    alpha: float = Field(
        32, gt=0, description=N_("Scale: the update is multiplied by alpha/r (alpha/√r with `rslora`).")
    )
    dropout: float = Field(0.0, ge=0, lt=1, description=N_("Dropout on the adapter's input."))
    targets: Annotated[tuple[str, ...], BeforeValidator(_alone_to_tuple)] = Field(
        ("all-linear",),
        min_length=1,
        description=N_("Names of the linear layers that get an adapter, or `all-linear` (all but the output head)."),
    )
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(_alone_to_tuple)] = Field(
        (), description=N_("Modules trained and saved whole beside the adapter, for example `embed_tokens`.")
    )
    dora: bool = Field(False, description=N_("Weight-decomposed LoRA: magnitude and direction are learnt apart."))
    rslora: bool = Field(False, description=N_("Rank-stabilised scale alpha/√r."))
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default",
        description=N_(
            "How the adapter starts: `default` (Kaiming, B = 0), `gaussian`, `pissa` (principal singular values) or `olora`."
        ),
    )
    plus_ratio: float | None = Field(
        None, ge=1, description=N_("LoRA+: the learning rate of B is this many times that of A (16 is usual).")
    )


class TrainSection(Section):
    """How to learn."""

    max_steps: int | None = Field(None, ge=1, description=N_("Optimizer steps. Comes before `epochs`."))
    epochs: float | None = Field(
        None, gt=0, description=N_("Passes over the training data. Default: 1 for pretrain, else 3.")
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description=N_("Peak learning rate. Default: 2e-4 for LoRA and QLoRA, 1e-5 for full, 1e-3 for pretrain."),
    )
    global_batch_tokens: int | None = Field(
        None,
        ge=1,
        description=N_(
            "Tokens of one optimizer step over all devices: examples are added while they fit (at least one). "
            "Default: 16384, less for a small data set."
        ),
    )
    global_batch_examples: int | None = Field(
        None, ge=1, description=N_("Examples of one optimizer step over all devices, instead of `global_batch_tokens`.")
    )
    optimizer: Optimizer = Field(
        "auto",
        description=N_(
            "`adamw` (fused where torch has it), `adamw_16bit` (moments in 16 bits, for weights that lie in RAM), "
            "`adamw_8bit`, `paged_adamw_8bit`, `lion` or `adafactor`; `auto`: AdamW, in 16 bits where RAM is short."
        ),
    )
    beta1: float = Field(0.9, ge=0, lt=1, description=N_("Decay of the first moment (AdamW, Lion)."))
    beta2: float = Field(0.999, ge=0, lt=1, description=N_("Decay of the second moment (AdamW, Lion)."))
    epsilon: float = Field(1e-8, gt=0, description=N_("AdamW's epsilon."))
    weight_decay: float = Field(0.0, ge=0, description=N_("Decoupled weight decay; norms and biases are left out."))
    schedule: Schedule = Field(
        "cosine",
        description=N_(
            "Learning rate after warm-up: `linear` or `cosine` to `final_rate`, `constant`, or `wsd` (constant, then linear decay)."
        ),
    )
    warmup_fraction: float = Field(
        0.03, ge=0, lt=1, description=N_("Share of the steps in which the rate rises from 0.")
    )
    warmup_steps: int | None = Field(None, ge=0, description=N_("Warm-up in steps, instead of `warmup_fraction`."))
    decay_fraction: float = Field(
        0.2, gt=0, le=1, description=N_("`wsd`: the share of the steps, at the end, in which the rate falls.")
    )
    final_rate: float = Field(0.0, ge=0, le=1, description=N_("Where the schedule ends, as a share of the peak rate."))
    max_grad_norm: float = Field(1.0, ge=0, description=N_("Gradients are scaled down to this global norm; 0 = never."))
    z_loss: float = Field(
        0.0,
        ge=0,
        description=N_(
            "Adds so many times the square of log Z to each token's loss, Z being what softmax divides by: it keeps logits "
            "from drifting in long runs (PaLM: 0.0001). Not for validation."
        ),
    )
    precision: Precision = Field(
        "auto",
        description=N_(
            "Arithmetic: `bf16`, `fp16` (with a loss scaler) or `fp32`. `auto`: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."
        ),
    )
    arithmetic: Arithmetic = Field(
        "auto",
        description=N_(
            "How the products with frozen weights are computed under an adapter: in 8 bits (`fp8` from compute capability "
            "8.9, `int8` from 8.0) or in 16 bits (`16bit`), both with every layer fused into one operation, or `plain`, by the "
            "model's own code. `auto`: the fastest the planner finds for this model and GPU. In full training `auto` is "
            "`plain`; `fp8` and `int8` compute the layers' trained products in 8 bits but for the weights' own gradients."
        ),
    )
    cuda_graphs: bool | None = Field(
        None,
        description=N_(
            "Record a micro-batch's passes through fused layers as one CUDA graph and launch that, so that the GPU does not "
            "wait for the host: for small models. It takes memory. Default: where it is clearly faster and fits."
        ),
    )
    step_in_backward: bool | None = Field(
        None,
        description=N_(
            "Change each weight as soon as its gradient is there, in the backward pass, so that gradients (4 bytes a trained "
            "weight) are never all there at once: on one device, with one micro-batch a step and `max_grad_norm: 0`. A "
            "gradient that is not finite then ends the run. Default: where all gradients do not fit."
        ),
    )
    seed: int = Field(0, ge=0, description=N_("Seed of data order, initial adapter weights and dropout."))
    neftune_alpha: float | None = Field(
        None,
        gt=0,
        description=N_("NEFTune: uniform noise of size alpha/√(tokens × width) on the embeddings, in training only."),
    )
    eval_every: int | None = Field(
        None, ge=1, description=N_("Validate every so many steps. Default: ten times a run.")
    )
    eval_max_examples: int | None = Field(None, ge=1, description=N_("Validate on at most so many examples."))
    save_every: int | None = Field(
        None, ge=1, description=N_("Write a checkpoint every so many steps. Default: with each validation.")
    )
    keep_checkpoints: int = Field(
        2, ge=1, description=N_("How many of the newest checkpoints are kept (the best one comes on top).")
    )
    keep_best: bool = Field(
        True, description=N_("The result is the checkpoint with the lowest validation loss, not the last one.")
    )
    early_stop: int | None = Field(None, ge=1, description=N_("Stop after so many validations without a lower loss."))
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description=N_(
            "A loss or gradient that is not finite: stop and name the examples, or skip the step and name them."
        ),
    )
    on_spike: Literal["stop", "skip", "ignore"] = Field(
        "ignore",
        description=N_("A loss above `spike_factor` times the recent median: stop, skip the step, or only say so."),
    )
    spike_factor: float = Field(
        3.0, gt=1, description=N_("How many times the median of the last 50 losses counts as a spike.")
    )


class LimitsSection(Section):
    """What the planner decides, pinned by hand. Leave these out to have them decided."""

    device: Literal["cpu", "cuda"] | None = Field(None, description=N_("Train on this kind of device."))
    devices: int | None = Field(
        None,
        ge=1,
        description=N_(
            "Use so many devices: GPUs, or on a CPU processes. Default: every GPU that is visible, and one CPU process."
        ),
    )
    split_over: int | None = Field(
        None,
        ge=2,
        description=N_(
            "Split each copy of the model over so many devices (strategies `pipeline`, `model_parallel`, `tensor` and "
            "`fsdp`). Default: the planner's choice."
        ),
    )
    variant: Literal["grad", "offload", "offload-all", "1f1b", "interleaved", "gpipe"] | None = Field(
        None, description=N_("One variant of a strategy, as `kitaeru plan` names it: `offload` of `fsdp-offload`.")
    )
    max_restarts: int = Field(
        0,
        ge=0,
        description=N_(
            "When a process of a run on several devices dies: start again from the last checkpoint so often."
        ),
    )
    micro_batch_tokens: int | None = Field(None, ge=8, description=N_("Tokens in one forward and backward pass."))
    checkpointing: bool | None = Field(
        None,
        description=N_("Activation (gradient) checkpointing: keep only each layer's input and compute the rest again."),
    )
    recomputed_layers: int | None = Field(
        None,
        ge=1,
        description=N_(
            "Checkpoint so many layers, the first ones, and keep the activations of the others. Default: all of them, or "
            "as few as fit where the planner decides."
        ),
    )
    offload_activations: bool | None = Field(
        None,
        description=N_(
            "Let the inputs of checkpointed layers wait in pinned RAM: for very long examples. Default: only where it pays."
        ),
    )
    memory_gb: float | None = Field(None, gt=0, description=N_("Use at most so many GB (10⁹ bytes) of each device."))
    ram_gb: float | None = Field(
        None, gt=0, description=N_("Use at most so many GB (10⁹ bytes) of the machine's RAM, all processes together.")
    )
    offload_folder: str | None = Field(
        None,
        description=N_(
            "A folder on a fast disk with room for the model. Where it fits nowhere else, an adapter is trained with the "
            "frozen layers there: each is read when its turn comes. Slow, and it fits."
        ),
    )
    ds_config: str | None = Field(
        None,
        description=N_(
            "DeepSpeed's configuration (a JSON file) for the strategies `zero1`, `zero2` and `zero3`: bucket sizes, thresholds, logging. Default: one is made from the plan."
        ),
    )
    threads: int | None = Field(None, ge=1, description=N_("Threads of CPU arithmetic."))


class TrackSection(Section):
    """Where the numbers go, beside `events.jsonl` and the report."""

    tensorboard: bool = Field(True, description=N_("Write TensorBoard files into the run folder."))
    wandb: str | None = Field(None, description=N_("Name of a Weights & Biases project."))
    mlflow: str | None = Field(None, description=N_("Name of an MLflow experiment (server from MLFLOW_TRACKING_URI)."))
    trackio: str | None = Field(None, description=N_("Name of a trackio project."))
    prometheus_port: int | None = Field(
        None, ge=1, le=65535, description=N_("Serve the numbers for Prometheus on this port.")
    )
    prometheus_address: str = Field(
        "127.0.0.1", description=N_("Where `prometheus_port` can be reached: this machine alone, or 0.0.0.0.")
    )
    device_seconds: float = Field(
        5.0, gt=0, description=N_("How often utilisation, memory, power and heat of the devices are looked at.")
    )
    power_price: float | None = Field(
        None, ge=0, description=N_("Price of a kilowatt-hour, to say what a million tokens cost.")
    )
    currency: str = Field("JPY", description=N_("What `power_price` is in."))
    machine_watts: float = Field(
        0.0, ge=0, description=N_("Power of the machine beside its GPUs (which are measured), for the cost.")
    )


class SamplesSection(Section):
    """Questions answered before and after training, and shown side by side."""

    prompts: Annotated[tuple[str, ...], BeforeValidator(_alone_to_tuple)] = Field(
        (), description=N_("The questions. Default: the first of the validation (or training) examples.")
    )
    system: str | None = Field(None, description=N_("The system message of `prompts`."))
    count: int = Field(3, ge=0, description=N_("How many questions are taken from the data when `prompts` is empty."))
    max_new_tokens: int = Field(128, ge=1, description=N_("Longest answer, in tokens."))


class Recipe(Section):
    """A whole recipe."""

    model: Annotated[ModelSection, BeforeValidator(_name_alone)] = Field(
        description=N_("The model to start from: its name alone, or a section with more.")
    )
    data: DataSection = Field(description=N_("What to learn from."))
    method: Method = Field(
        "auto",
        description=N_(
            "What is trained: `full` (every weight), `lora` (an adapter), `qlora` (an adapter on a 4-bit base) or `pretrain` "
            "(every weight, from random ones). `auto` is the first of lora and qlora that fits the device."
        ),
    )
    strategy: Strategy = Field("auto", description=N_("How devices share the work. `auto`: the planner's choice."))
    preset: str | None = Field(
        None, description=N_("A named set of values under those of this file (`kitaeru recipe presets`).")
    )
    lora: LoraSection = Field(LoraSection(), description=N_("The adapter."))
    train: TrainSection = Field(TrainSection(), description=N_("How to learn."))
    limits: LimitsSection = Field(LimitsSection(), description=N_("What the planner decides, pinned by hand."))
    track: TrackSection = Field(TrackSection(), description=N_("Where the numbers go."))
    samples: SamplesSection = Field(SamplesSection(), description=N_("Questions answered before and after."))
    output: str | None = Field(
        None, description=N_("The run folder. Default: `runs/` and a name made of model, method and time.")
    )
