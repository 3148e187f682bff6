"""kitaeru against other tools on one GPU, in one run: tokens/s, peak memory, share of the roofline, GPU-busy share.

    python benchmarks/against.py --out benchmarks/results/against-h100.csv --data ja-text/train.jsonl
    python benchmarks/against.py --out /tmp/against.csv --device cpu

Everyone trains the same: the same shape with random weights made on the device (cut in depth by the factor `cut`,
where that is not 1), the same Japanese text in full rows of `seq_len` tokens, every one of them learnt, `step_tokens`
an optimizer step, LoRA of rank 16 on all linears, fused AdamW, gradients cut at norm 1, bf16 under autocast. Each
contender has a process of its own for each point; a point that fails is a row with its error. A run that was cut off
goes on with what is missing. While one measures, the next imports its libraries, and waits before it computes anything.

`kitaeru` is its own engine on its own plan. `peft` is transformers with PEFT and bitsandbytes, gradient checkpointing
(not reentrant) and no weights cast up, `peft-liger` the same with Liger's kernels, `unsloth` Unsloth as it is by
default, `unsloth-none` without checkpointing. These four are tried with all rows of a step in a micro-batch, half of
them and so on, and measured with the fastest; no row has padding or a neighbour, so they need no mask.

A cap (`cap_gib`; 0: the whole card) is the most that torch's allocator may hold in training. The others also see a card
of that size, and 1 GiB more: what is beyond it is taken.

Roofline: 4 FLOP a token for each frozen weight of the blocks and of the head, and 3.5 times the forward FLOP of causal
attention (2 x layers x tokens x width); where all is trained 6, 6 and 3.5; at the card's dense rate of bf16 as the
table of kitaeru/hardware_table.json has it. `roofline_8bit`: the weights of the blocks at its best rate of 8 bits.
Busy: the share of time with a kernel on the GPU, by torch's profiler over two steps (one, where it takes long).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from table import append, read

import kitaeru
from kitaeru.shape import ModelShape, catalogue

GIB = 1 << 30
SEED, RANK, ALPHA, LEARNING_RATE, MOST_NORM = 0, 16, 32, 1e-5, 1.0
# Sizes in tokens are divided by this for a run on the CPU.
SHRINK = 64
# A process that could not do anything in the time that is left is not started.
LEAST_SECONDS = 15.0
QUICKSTART = Path(kitaeru.__file__).parent / "assets" / "quickstart" / "train.jsonl"
TOKENIZER = Path(kitaeru.__file__).parent / "assets" / "bundled"

MODELS = {
    "llama-3-8b": "elyza/Llama-3-ELYZA-JP-8B",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "llama-3.2-1b": "",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    # As large a vocabulary as Gemma's in layers that every contender has fast code for.
    "gemma-like-2b": "google/gemma-2-2b",
}
OWN = {
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM"}


@dataclass(frozen=True)
class Point:
    """What is trained. `cut`: so many times fewer layers than the model has; `cap_gib` 0: the whole card."""

    model: str
    method: str
    seq_len: int = 2048
    cap_gib: float = 24.0
    step_tokens: int = 16384
    cut: int = 1


# In the order of their weight.
POINTS = {
    "8b-qlora-24": Point("llama-3-8b", "qlora"),
    "13b-qlora-24": Point("llama-2-13b", "qlora", step_tokens=8192),
    "34b-qlora-24": Point("codellama-34b", "qlora", step_tokens=4096),
    "8b-qlora": Point("llama-3-8b", "qlora", cap_gib=0),
    "8b-lora": Point("llama-3-8b", "lora", cap_gib=0),
    "8b-qlora-24-8k": Point("llama-3-8b", "qlora", 8192),
    "1b-lora-24": Point("llama-3.2-1b", "lora", step_tokens=32768),
    "4b-qlora-24": Point("qwen3-4b", "qlora"),
    "gemma-like-qlora-24": Point("gemma-like-2b", "qlora"),
    "mixtral-qlora": Point("mixtral-8x7b", "qlora", cap_gib=0, cut=8),
    "1b-full": Point("llama-3.2-1b", "full", cap_gib=0),
    "8b-qlora-24-32k": Point("llama-3-8b", "qlora", 32768, step_tokens=32768),
    "8b-full": Point("llama-3-8b", "full", cap_gib=0, cut=4),
    "4b-lora": Point("qwen3-4b", "lora", cap_gib=0),
    "13b-lora": Point("llama-2-13b", "lora", cap_gib=0, step_tokens=8192),
}
# What each process imports before it is its turn, in this order.
CONTENDERS: dict[str, tuple[str, ...]] = {
    "kitaeru": ("kitaeru.engine.build", "kitaeru.engine.loop", "bitsandbytes"),
    "kitaeru-8bit": ("kitaeru.engine.build", "kitaeru.engine.loop", "bitsandbytes"),
    "unsloth-none": ("unsloth", "bitsandbytes"),
    "unsloth": ("unsloth", "bitsandbytes"),
    "peft-liger": ("peft", "bitsandbytes", "liger_kernel.transformers"),
    "peft": ("peft", "bitsandbytes"),
}
ON_CPU = ("kitaeru", "kitaeru-8bit", "peft")
# Full training in 8 bits, which a recipe has to ask for; of adapters `kitaeru` is that already.
FULL_ALONE = ("kitaeru-8bit",)
FIELDS = (
    "point", "contender", "version", "model", "cut", "method", "seq_len", "cap_gib", "step_tokens", "how",
    "micro_tokens", "trained_parameters", "tokens_per_second", "peak_gib", "roofline_bf16", "share_of_bf16",
    "roofline_8bit", "share_of_8bit", "busy", "steps", "loss", "ready_seconds", "seconds", "error", "device", "torch",
    "transformers", "date",
)  # fmt: skip


@dataclass
class Job:
    """One contender at one point, as its process is told. Sizes are those that are run, on a CPU small ones."""

    contender: str
    config: dict[str, Any]
    method: str
    seq_len: int
    step_tokens: int
    cap_bytes: int
    device: str
    folder: str
    text: str
    result: str
    warm: int
    timed: int

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.step_tokens // self.seq_len


def config_of(point: Point, *, small: bool = False) -> dict[str, Any]:
    """The model's config, cut in depth; `small` in every size, for a run on the CPU."""
    known = {entry.name: entry.config for entry in catalogue()}
    config = dict(OWN.get(point.model) or known[MODELS[point.model]])
    config["num_hidden_layers"] //= point.cut
    if point.model == "gemma-like-2b":
        config["model_type"] = "llama"
        del config["sliding_window"]
    config["max_position_embeddings"] = max(config["max_position_embeddings"], point.seq_len)
    if small:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 24576}
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    return config | {"dtype": "float32" if small else "bfloat16"}


def roofline(shape: ModelShape, method: str, seq_len: int, blocks: float, others: float) -> float:
    """Tokens/s at which the arithmetic alone takes all the time; `blocks` and `others` in TFLOP/s, 0 where unknown."""
    if not blocks or not others:
        return 0.0
    a_weight = 6 if method == "full" else 4
    attention = 3.5 * 2 * shape.layers * seq_len * shape.q_size
    head = a_weight * shape.vocab * shape.hidden
    return 1e12 / (a_weight * shape.active_parameters() / blocks + (head + attention) / others)


# --- a contender's own process ----------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A contender that is ready: an optimizer step, the micro-batch it takes, how it works in a few words, and how many
    steps it needs before it is measured.
    """

    step: Callable[[], float]
    micro_tokens: int
    trained: int
    how: str
    warm: int
    ballast: tuple[Any, ...] = ()  # held as long as the runner is


def work(job: Job) -> None:
    """Import, wait for the turn, measure, and leave a row; then again with what the profiler says."""
    version = ""
    for name in CONTENDERS[job.contender]:
        importlib.import_module(name)
    sys.stdin.readline()
    begun = time.perf_counter()
    row: dict[str, Any] = {}
    runner = None
    try:
        version = _version(job.contender)
        runner = (ours if job.contender.startswith("kitaeru") else theirs)(job)
        row = {"micro_tokens": runner.micro_tokens, "trained_parameters": runner.trained, "how": runner.how}
        row |= measure(runner, job, begun)
    except Exception as error:
        traceback.print_exc()
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row |= _facts(job, row.get("tokens_per_second", 0.0)) | {"version": version}
    Path(job.result).write_text(json.dumps(row))
    if runner is not None and job.device == "cuda" and "error" not in row:
        row["busy"] = busy(runner.step, 1 if job.step_tokens / row["tokens_per_second"] > 2 else 2)
        Path(job.result).write_text(json.dumps(row))
    sys.stdout.flush()
    os._exit(0)  # nothing that a library has started may hold the card


def measure(runner: Runner, job: Job, begun: float) -> dict[str, Any]:
    """Steps between two moments at which the device has nothing left to do."""
    import torch

    on_gpu = job.device == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    loss, ready = 0.0, 0.0
    for _ in range(runner.warm + job.timed):
        wait()
        started = time.perf_counter()
        loss = runner.step()
        wait()
        seconds.append(time.perf_counter() - started)
        ready = ready or time.perf_counter() - begun
    median = statistics.median(seconds[runner.warm :])
    found = {
        "tokens_per_second": round(job.step_tokens / median, 1),
        "steps": job.timed,
        "loss": round(loss, 4),
        "ready_seconds": round(ready, 1),
    }
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    if on_gpu:
        found["peak_gib"] = round((torch.cuda.max_memory_allocated() - sum(t.nbytes for t in runner.ballast)) / GIB, 3)
    return found


def busy(step: Callable[[], float], steps: int) -> float:
    """The share of time, from the first kernel to the end of the last one, in which a kernel is on the GPU."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
    )
    if not spans:
        return math.nan
    taken, until = 0.0, spans[0][0]
    for start, end in spans:
        taken += max(0.0, end - max(start, until))
        until = max(until, end)
    return round(taken / (until - spans[0][0]), 3)


def _version(contender: str) -> str:
    from importlib.metadata import version

    if contender.startswith("kitaeru"):
        return kitaeru.__version__
    names = {"unsloth": ("unsloth",), "peft": ("peft", "bitsandbytes"), "liger": ("liger-kernel",)}
    wanted = [name for part in contender.split("-") for name in names.get(part, ())]
    return " ".join(f"{name} {version(name)}" for name in wanted)


def _facts(job: Job, rate: float) -> dict[str, Any]:
    """The machine, and what its roofline makes of a rate."""
    import torch
    import transformers

    from kitaeru.machine.probe import probe

    facts: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
    if job.device == "cpu":
        return facts
    card, shape = probe().devices[0], ModelShape.from_config(job.config)
    facts["device"] = card.name
    wide, narrow = card.bf16_tflops, max(card.int8_tops, card.fp8_tflops)
    lines = {"bf16": roofline(shape, job.method, job.seq_len, wide, wide)}
    if job.method != "full":
        lines["8bit"] = roofline(shape, job.method, job.seq_len, narrow, wide)
    for name, line in lines.items():
        facts[f"roofline_{name}"] = round(line)
        if rate and line:
            facts[f"share_of_{name}"] = round(rate / line, 3)
    return facts


def text_of(job: Job) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Rows of text, int32 [n, seq_len], enough for every step: what there is, again and again."""
    flat = np.load(job.text)
    count = job.rows * (job.warm + job.timed + 2)
    return np.resize(flat, count * job.seq_len).reshape(count, job.seq_len)


# --- kitaeru ----------------------------------------------------------------------------------------------------------


def ours(job: Job) -> Runner:
    """kitaeru's engine, on the plan that it makes for this wish and this machine."""
    import torch
    from random_model import on_device

    from kitaeru.data.corpus import Corpus
    from kitaeru.engine import build as engine
    from kitaeru.engine.loop import Loop
    from kitaeru.events import Event, Step
    from kitaeru.machine.probe import probe
    from kitaeru.model import load
    from kitaeru.model.tokenizer import load_tokenizer
    from kitaeru.plan.choose import make_plan
    from kitaeru.plan.types import DataFacts
    from kitaeru.recipe.types import ModelSection, Recipe

    hardware = probe()
    if job.device == "cpu":
        hardware = replace(hardware, devices=(), links=())
    train: dict[str, Any] = {"global_batch_tokens": job.step_tokens, "max_steps": 1000, "learning_rate": LEARNING_RATE}
    if job.contender in FULL_ALONE:
        train["arithmetic"] = "fp8" if hardware.devices and 9 <= hardware.devices[0].sm < 12 else "int8"
    wish = Recipe.model_validate(
        {
            "model": {"name": job.folder},
            "data": {"train": "-", "seq_len": job.seq_len},
            "method": job.method,
            "strategy": "single",
            "lora": {"r": RANK, "alpha": ALPHA},
            "limits": {"devices": 1} | ({"memory_gb": job.cap_bytes / 1e9} if job.cap_bytes else {}),
            "train": train | {"max_grad_norm": MOST_NORM, "seed": SEED},
        }
    )
    text = text_of(job)
    facts = DataFacts(examples=len(text), tokens=text.size, longest=job.seq_len)
    plan = make_plan(wish, hardware, ModelShape.from_config(job.config), facts)

    def make_model(section: Any, layout: Any, seed: int, *_: Any) -> Any:
        """As `load_model` would give it; the cap is for training, a real model is packed on its way to the device."""
        torch.manual_seed(seed)
        config, compute = load.load_config(section), load.DTYPES[layout.precision]
        dtype = torch.float32 if layout.method == "full" else compute
        attention = load.attention_for(section, config)
        how: Any = {"dtype": dtype, "base": layout.base, "compute": compute, "attention": attention, "experts": True}
        with _uncapped(job):
            return on_device(config, torch.device(job.device), **how)

    losses: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, Step):
            if event.tokens != job.step_tokens:
                raise RuntimeError(f"a step has {event.tokens} tokens of {job.step_tokens}")
            losses.append(event.loss)

    with mock.patch.object(engine, "load_model", make_model):
        trainee = engine.build(plan, load_tokenizer(ModelSection(name="bundled")), hear)
    trained = np.ones(text.shape, np.bool_)
    trained[:, 0] = False  # which nothing predicts
    corpus = Corpus(
        tokens=text.reshape(-1),
        trained=trained.reshape(-1),
        offsets=np.arange(len(text) + 1, dtype=np.int64) * job.seq_len,
        files=("text",),
        file_index=np.zeros(len(text), np.int32),
        rows=np.arange(len(text), dtype=np.int64),
        sources=np.zeros(len(text), np.int32),
        weights=(1.0,),
    )
    loop = Loop(trainee, corpus, None, Path(job.folder), {})

    def step() -> float:
        loop._step()
        return losses[-1]

    how = f"{plan.layout.name}{', CUDA graphs' if plan.layout.graphs else ''}"
    return Runner(step, plan.layout.micro_batch_tokens, sum(p.numel() for _, p in trainee.named), how, job.warm)


@contextmanager
def _uncapped(job: Job) -> Iterator[None]:
    """Without the memory limit that the engine has set, and then with it again."""
    import torch

    if job.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    yield
    if job.device == "cuda" and job.cap_bytes:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, job.cap_bytes / torch.cuda.get_device_properties(0).total_memory)
        )


# --- the others -------------------------------------------------------------------------------------------------------


def theirs(job: Job) -> Runner:
    """A model that transformers' loop would train, with the fastest number of rows in a micro-batch."""
    import torch

    torch.manual_seed(SEED)
    ballast: list[Any] = []
    model, how = (_unsloth if job.contender.startswith("unsloth") else _peft)(job, ballast)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    text = torch.from_numpy(text_of(job).astype(np.int64))
    device, place = torch.device(job.device), [0]

    def passes(rows: int, of: int) -> torch.Tensor:
        """Forward and backward over the next rows; their mean loss."""
        ids = text[place[0] : place[0] + rows].to(device)
        place[0] = (place[0] + rows) % len(text)
        with torch.autocast(job.device, torch.bfloat16, enabled=job.device == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss * (rows / of)
        loss.backward()
        return loss.detach()

    rows = fastest(lambda rows: passes(rows, rows), job, lambda: optimizer.zero_grad(set_to_none=True))
    place[0] = 0

    def step() -> float:
        losses = [passes(rows, job.rows) for _ in range(job.rows // rows)]
        torch.nn.utils.clip_grad_norm_(trained, MOST_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())

    count = sum(parameter.numel() for parameter in trained)
    # The passes are compiled and warm already.
    return Runner(step, rows * job.seq_len, count, how, 1, tuple(ballast))


def fastest(passes: Callable[[int], Any], job: Job, clear: Callable[[], None]) -> int:
    """The number of rows with the most tokens/s: from all of a step downwards, until fewer are slower.

    Raises:
        OutOfMemoryError: one row is too much.
    """
    import torch

    def timed(rows: int) -> float:
        started = time.perf_counter()
        passes(rows)
        if job.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rows, best, rate = job.rows, 0, 0.0
    while rows:
        full = False
        try:
            timed(rows)  # compiles, finds memory
            now = rows / min(timed(rows), timed(rows))
        except torch.OutOfMemoryError:
            if rows == 1 and not best:
                raise
            full = True  # what the error holds is let go when its handler ends
        clear()
        if full:
            gc.collect()
            torch.cuda.empty_cache()
        elif now <= rate:
            break
        else:
            best, rate = rows, now
        rows //= 2
    return best


def _cap(job: Job, ballast: list[Any]) -> None:
    """Take what a card of the cap's size would not have. Called when the model is there, before anything else."""
    import torch

    if job.device == "cpu" or not job.cap_bytes:
        return
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    spare = free - max(0, job.cap_bytes - torch.cuda.memory_reserved()) - GIB
    ballast.append(torch.empty(max(0, spare), dtype=torch.uint8, device="cuda"))
    torch.cuda.set_per_process_memory_fraction(min(1.0, (job.cap_bytes + ballast[0].nbytes) / total))


def _peft(job: Job, ballast: list[Any]) -> tuple[Any, str]:
    import torch
    from peft import LoraConfig, get_peft_model
    from random_model import on_device
    from transformers import AutoConfig

    small, full = job.device == "cpu", job.method == "full"
    model = on_device(
        AutoConfig.from_pretrained(job.folder),
        torch.device(job.device),
        dtype=torch.float32 if small or full else torch.bfloat16,
        base="nf4" if job.method == "qlora" else "none",
        compute=torch.float32 if small else torch.bfloat16,
    )
    _cap(job, ballast)
    model.config.use_cache = False
    if job.contender == "peft-liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not full:
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        model = get_peft_model(model, config)
    return model, "checkpointing"


def _unsloth(job: Job, ballast: list[Any]) -> tuple[Any, str]:
    import torch
    from random_model import on_device
    from transformers import AutoConfig, AutoModelForCausalLM
    from unsloth import FastLanguageModel

    full, keeps = job.method == "full", job.contender == "unsloth-none"
    checkpointing: Any = False if keeps else "unsloth"

    def make_model(*_: Any, **options: Any) -> Any:
        """What `from_pretrained` would read."""
        config = options.get("config") or AutoConfig.from_pretrained(job.folder)
        packed = options.get("quantization_config") is not None
        if packed:
            config.quantization_config = options["quantization_config"].to_dict()
        model = on_device(
            config,
            torch.device(job.device),
            dtype=options.get("dtype") or options.get("torch_dtype") or torch.bfloat16,
            base="nf4" if packed else "none",
            attention=options.get("attn_implementation") or "sdpa",
        )
        _cap(job, ballast)
        return model

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", make_model):
        model, _ = FastLanguageModel.from_pretrained(
            job.folder,
            max_seq_length=job.seq_len,
            dtype=torch.bfloat16,
            load_in_4bit=job.method == "qlora",
            load_in_16bit=job.method == "lora",
            full_finetuning=full,
            float32_mixed_precision=full or None,  # 32-bit weights, as the others keep them
            use_gradient_checkpointing=checkpointing,
        )
    if not full:
        # Without targets: q, k, v, o, gate, up, down, and a mixture's experts.
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=checkpointing, random_state=SEED
        )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    return model, "no checkpointing" if keeps else "default checkpointing"


# --- the run ----------------------------------------------------------------------------------------------------------


def job_of(name: str, contender: str, arguments: argparse.Namespace) -> Job:
    """What a process is told, and the folder of its model: config and tokenizer."""
    point, small = POINTS[name], arguments.device == "cpu"
    shrink = SHRINK if small else 1
    config, folder = config_of(point, small=small), arguments.work / f"{name}-{contender}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)
    return Job(
        contender=contender,
        config=config,
        method=point.method,
        seq_len=point.seq_len // shrink,
        step_tokens=point.step_tokens // shrink,
        cap_bytes=0 if small else int(point.cap_gib * GIB),
        device=arguments.device,
        folder=str(folder),
        text=str(arguments.work / "text.npy"),
        result=str(folder / "result.json"),
        warm=arguments.warm,
        timed=arguments.timed,
    )


def start(job: Job, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A contender's process, which imports and waits."""
    path = os.environ.get("PYTHONPATH", "")
    if arguments.site and {"unsloth", "liger_kernel.transformers"} & set(CONTENDERS[job.contender]):
        path = os.pathsep.join(filter(None, (str(arguments.site), path)))
    environment = os.environ | {
        "PYTHONPATH": path,
        "KITAERU_DATA": str(arguments.work / "data"),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(arguments.work / "unsloth"),
    }
    words = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--out",
        str(arguments.out),
        "--job",
        json.dumps(asdict(job)),
    ]
    with (Path(job.folder) / "log").open("wb") as log:
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], job: Job, seconds: float) -> dict[str, Any]:
    """Let it measure, for so long at the most; what it has found."""
    error = ""
    assert process.stdin is not None
    try:
        process.stdin.write(b"go\n")
        process.stdin.close()
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        error = f"no end within {seconds:.0f} s"
    except BrokenPipeError:
        process.wait()
    stop(process)
    result = Path(job.result)
    if result.exists():
        row: dict[str, Any] = json.loads(result.read_text())
        return row
    said = (Path(job.folder) / "log").read_text(errors="replace").strip().splitlines()
    return {"error": error or f"code {process.returncode}: {said[-1][:250] if said else ''}"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it, with what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(arguments: argparse.Namespace) -> None:
    """One after another, a row at a time; the next one's imports are done meanwhile, where there are cores for it."""
    until = time.monotonic() + arguments.budget_seconds
    done = {(row["point"], row["contender"]) for row in read(arguments.out)}
    every = [(name, who) for name in arguments.points for who in arguments.contenders if (name, who) not in done]
    todo = [(name, who) for name, who in every if who not in FULL_ALONE or POINTS[name].method == "full"]
    waiting: dict[tuple[str, str], tuple[Job, subprocess.Popen[bytes]]] = {}

    def ready(key: tuple[str, str]) -> None:
        if key not in waiting and (arguments.device == "cuda" or key[1] in ON_CPU):
            job = job_of(*key, arguments)
            waiting[key] = (job, start(job, arguments))

    try:
        for index, (name, contender) in enumerate(todo):
            left = until - time.monotonic()
            if left < LEAST_SECONDS:
                print(f"{len(todo) - index} of {len(todo)} not measured: no time left", flush=True)
                return
            started, point = time.monotonic(), POINTS[name]
            row: dict[str, Any] = {"point": name, "contender": contender} | asdict(point)
            ready((name, contender))
            if (name, contender) not in waiting:
                row["error"] = "needs a GPU"
            else:
                job, process = waiting[name, contender]
                row |= {"seq_len": job.seq_len, "step_tokens": job.step_tokens}
                if arguments.device == "cuda" and index + 1 < len(todo):
                    ready(todo[index + 1])
                row |= finish(process, job, min(left, arguments.point_seconds))
                del waiting[name, contender]
            row |= {"seconds": round(time.monotonic() - started, 1), "date": time.strftime("%Y-%m-%d")}
            append(arguments.out, [row], FIELDS)
            print(told(row), flush=True)
    finally:
        for _, process in waiting.values():
            stop(process)


def told(row: dict[str, Any]) -> str:
    """A row in a few words."""
    name = f"{row['point']:>20} {row['contender']:<13}"
    if row.get("error"):
        return f"{name} failed: {row['error']} ({row['seconds']} s)"
    words = [f"{float(row['tokens_per_second']):>9,.0f} tokens/s", f"{row['micro_tokens']} tokens a pass", row["how"]]
    if row.get("peak_gib"):
        words.insert(1, f"{row['peak_gib']:.1f} GiB, {row['share_of_bf16']:.0%} of the roofline")
    return f"{name} {', '.join(words)} ({row['seconds']} s)"


def factors(rows: list[dict[str, str]]) -> Iterator[str]:
    """At each point: how many times as fast kitaeru is as each other one."""
    rates = {(row["point"], row["contender"]): float(row["tokens_per_second"]) for row in rows if not row["error"]}
    for name in dict.fromkeys(point for point, _ in rates):
        own = rates.get((name, "kitaeru"))
        others = {who: rate for (point, who), rate in rates.items() if point == name and who != "kitaeru"}
        if own and others:
            yield f"{name}: " + ", ".join(f"{own / rate:.2f}x {who}" for who, rate in others.items())


def write_text(data: Path, out: Path) -> None:
    """The tokens of a JSONL file's texts, one after another, int32."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line]
    texts = [row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"]) for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, np.concatenate([np.asarray(each.ids, np.int32) for each in tokenizer.encode_batch(texts)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--budget-seconds", type=float, default=1e9)
    parser.add_argument("--point-seconds", type=float, default=150.0, help="for one contender at one point, at most")
    parser.add_argument("--data", type=Path, default=QUICKSTART, help="JSONL with `text` or `messages`")
    parser.add_argument("--work", type=Path, default=Path("runs/against"))
    parser.add_argument("--profile", type=Path, help="kitaeru's measured rates of this machine (profile.json)")
    parser.add_argument("--site", type=Path, help="a folder of packages that Unsloth and Liger alone shall see")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--timed", type=int, default=6)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        work(Job(**json.loads(arguments.job)))
        return
    arguments.work = arguments.work.resolve()
    write_text(arguments.data, arguments.work / "text.npy")
    if arguments.profile:
        (arguments.work / "data").mkdir(exist_ok=True)
        shutil.copy(arguments.profile, arguments.work / "data" / "profile.json")
    run(arguments)
    print("\n".join(factors(read(arguments.out))))


if __name__ == "__main__":
    main()
