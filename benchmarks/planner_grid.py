"""The planner's predictions against what training really takes, with kitaeru's own engine: memory, seconds, choice.

Models have real shapes, cut in depth where that is said (`layers`), random weights made on the device, and packed
examples of one length. Every point is planned with what it pins, built by the engine's own passes and trained for a few
steps by its own loop. A row is written at once; a point that fails is a row with its error. A run that was cut off, or
a process that died, goes on with the points that are missing.

    python benchmarks/planner_grid.py --out benchmarks/results/planner-grid-h100.csv --budget-seconds 390
    python benchmarks/planner_grid.py --out benchmarks/results/planner-choice-h100.csv --exhaustive
    python benchmarks/planner_grid.py --out /tmp/grid.csv --device cpu

First the machine is measured (`kitaeru bench --calibrate --quick`) unless FILE.profile.json is there already; that and
FILE.machine.json are what the predictions can be made again from (tests/unit/plan/test_replay_grid.py).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

from table import append, read

from kitaeru.errors import KitaeruError
from kitaeru.hardware import Hardware
from kitaeru.plan.choose import make_plan
from kitaeru.plan.problem import needed_bytes
from kitaeru.plan.types import DataFacts, Plan
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape, catalogue

GIB = 1 << 30
# The schedule of a point is of a run this long; it is cut off when enough is measured, or after so many seconds.
STEPS, PATIENCE_SECONDS = 100, 12.0
# Sizes in tokens are divided by this for a run on the CPU.
SHRINK = 64
MODELS = {
    "llama-3-8b": "elyza/Llama-3-ELYZA-JP-8B",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "gemma-2-2b": "google/gemma-2-2b",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    # As large a vocabulary as Gemma's, and attention that needs no cap on its scores.
    "gemma-like-2b": "google/gemma-2-2b",
}


@dataclass(frozen=True)
class Point:
    """What is pinned. 0 tokens and "auto" activations: the planner's to choose, under the cap."""

    model: str
    layers: int
    method: str
    activations: str
    seq_len: int
    tokens: int
    step: int = 1  # micro-batches of a step, or below 0 its tokens
    cap_gib: float = 0.0
    quantize: str = "auto"
    arithmetic: str = "auto"  # of the frozen products: "plain" is the model's own code
    graphs: int = 0  # 1: passes are replayed as CUDA graphs

    @property
    def name(self) -> str:
        """Its key in the table."""
        return "/".join(str(getattr(self, field.name)) for field in fields(self))


def _points() -> list[Point]:
    """A cut-off run still covers every kind: one of each first, then the others."""
    kinds = [
        [  # Llama-3-8B
            Point("llama-3-8b", 8, "lora", "keep", 2048, 8192),
            Point("llama-3-8b", 32, "qlora", "auto", 2048, 0, -8192, 24),
            Point("llama-3-8b", 8, "qlora", "keep", 2048, 8192),
            Point("llama-3-8b", 8, "lora", "recompute", 2048, 8192),
            Point("llama-3-8b", 8, "full", "keep", 2048, 4096),
            Point("llama-3-8b", 8, "lora", "keep", 512, 4096),
            Point("llama-3-8b", 8, "qlora", "recompute", 16384, 16384),
            Point("llama-3-8b", 8, "full", "recompute", 8192, 8192, 2),
            Point("llama-3-8b", 8, "qlora", "keep", 512, 2048, 2),
            Point("llama-3-8b", 8, "lora", "keep", 16384, 16384),
            Point("llama-3-8b", 32, "lora", "recompute", 2048, 4096),
        ],
        [  # Qwen3-0.6B, whole
            Point("qwen3-0.6b", 28, "full", "keep", 2048, 4096),
            Point("qwen3-0.6b", 28, "lora", "keep", 512, 4096),
            Point("qwen3-0.6b", 28, "qlora", "recompute", 2048, 8192),
            Point("qwen3-0.6b", 28, "full", "recompute", 512, 8192, 2),
            Point("qwen3-0.6b", 28, "lora", "recompute", 8192, 16384),
            Point("qwen3-0.6b", 28, "full", "auto", 2048, 0, -16384, 24),
        ],
        [  # Llama-2-13B
            Point("llama-2-13b", 40, "qlora", "auto", 2048, 0, -4096, 24),
            Point("llama-2-13b", 8, "lora", "keep", 2048, 8192),
            Point("llama-2-13b", 8, "qlora", "keep", 4096, 4096),
            Point("llama-2-13b", 8, "lora", "recompute", 512, 4096, 2),
            Point("llama-2-13b", 6, "full", "keep", 2048, 4096),
            Point("llama-2-13b", 8, "qlora", "recompute", 2048, 16384),
        ],
        [  # Qwen3-4B
            Point("qwen3-4b", 12, "lora", "keep", 2048, 8192),
            Point("qwen3-4b", 12, "qlora", "keep", 2048, 4096, 2),
            Point("qwen3-4b", 12, "full", "keep", 1024, 4096),
            Point("qwen3-4b", 12, "full", "recompute", 4096, 8192),
            Point("qwen3-4b", 36, "qlora", "auto", 4096, 0, -16384, 24),
            Point("qwen3-4b", 12, "lora", "recompute", 16384, 16384),
        ],
        [  # large vocabularies
            Point("gemma-like-2b", 13, "lora", "keep", 2048, 8192),
            Point("gemma-2-2b", 13, "qlora", "keep", 1024, 1024, 2),
            Point("gemma-like-2b", 13, "full", "recompute", 2048, 4096),
            Point("gemma-2-2b", 13, "lora", "recompute", 2048, 2048),
            Point("gemma-like-2b", 26, "qlora", "auto", 8192, 0, -16384, 24),
        ],
        [  # CodeLlama-34B
            Point("codellama-34b", 8, "qlora", "keep", 2048, 4096),
            Point("codellama-34b", 48, "qlora", "auto", 2048, 0, -2048, 24),
            Point("codellama-34b", 8, "lora", "recompute", 4096, 8192),
            Point("codellama-34b", 8, "lora", "keep", 512, 2048, 2),
            Point("codellama-34b", 8, "qlora", "recompute", 16384, 16384),
        ],
        [  # Mixtral
            Point("mixtral-8x7b", 2, "lora", "keep", 2048, 4096),
            Point("mixtral-8x7b", 2, "qlora", "recompute", 2048, 8192),
            Point("mixtral-8x7b", 2, "qlora", "keep", 512, 2048, 2),
            Point("mixtral-8x7b", 2, "lora", "recompute", 8192, 8192),
        ],
        [  # the models' own layers, where others are fused
            Point("llama-3-8b", 8, "qlora", "keep", 2048, 8192, arithmetic="plain"),
            Point("llama-3-8b", 8, "lora", "recompute", 2048, 8192, arithmetic="plain"),
            Point("qwen3-4b", 12, "lora", "keep", 512, 4096, arithmetic="plain"),
            Point("llama-2-13b", 8, "lora", "keep", 4096, 8192, arithmetic="plain"),
            Point("codellama-34b", 8, "qlora", "recompute", 2048, 8192, arithmetic="plain"),
            Point("llama-3-8b", 32, "qlora", "auto", 2048, 0, -8192, 24, arithmetic="plain"),
        ],
        [  # as CUDA graphs
            Point("qwen3-0.6b", 28, "qlora", "keep", 2048, 8192, 2, graphs=1),
            Point("llama-3-8b", 8, "lora", "keep", 512, 2048, 2, graphs=1),
            Point("qwen3-4b", 36, "qlora", "keep", 2048, 8192, 2, 24, graphs=1),
            Point("llama-3-8b", 8, "qlora", "recompute", 2048, 8192, 2, graphs=1),
        ],
        [  # 8-bit base
            Point("llama-3-8b", 8, "lora", "keep", 2048, 4096, 1, 0, "int8"),
            Point("llama-3-8b", 8, "lora", "recompute", 2048, 8192, 1, 0, "int8"),
        ],
    ]
    return [point for row in itertools.zip_longest(*kinds) for point in row if point is not None]


def _exhaustive() -> list[Point]:
    """Layouts of one shape under one cap, and for each method what the planner takes when nothing is pinned."""
    pinned = {
        "auto": [("keep", 4096), ("keep", 8192), ("keep", 16384), ("keep8", 16384), ("half", 8192), ("half", 16384),
                 ("recompute", 4096), ("recompute", 8192), ("recompute", 16384)],
        "plain": [("keep", 8192), ("recompute", 8192)],
    }  # fmt: skip
    methods = ("qlora", "lora")
    points = [Point("llama-3-8b", 16, method, "auto", 1024, 0, -16384, 24) for method in methods]
    return points + [
        Point("llama-3-8b", 16, method, activations, 1024, tokens, -16384, 24, arithmetic=arithmetic)
        for method in methods
        for arithmetic in pinned
        for activations, tokens in pinned[arithmetic]
    ]


# --- prediction, without torch ---------------------------------------------------------------------------------------


def config_of(point: Point, *, small: bool = False) -> dict[str, Any]:
    """The model's config, cut in depth; `small` in every size, for a run on the CPU."""
    entry = next(entry for entry in catalogue() if entry.name == MODELS[point.model])
    config = {**entry.config, "num_hidden_layers": point.layers}
    if point.model == "gemma-like-2b":
        config |= {"model_type": "llama"}
        del config["sliding_window"]
    if small:
        config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 24576}
        config |= {"num_local_experts": 4} if "num_local_experts" in config else {}
    return config


def wish_of(point: Point, folder: str, *, small: bool = False) -> tuple[Recipe, DataFacts]:
    """The recipe that pins what the point pins, and the data it is for."""
    shrink = SHRINK if small else 1
    seq_len, tokens = point.seq_len // shrink, point.tokens // shrink
    step = -point.step // shrink if point.step < 0 else max(tokens, seq_len) * point.step
    limits: dict[str, Any] = {"devices": 1}
    if tokens:
        limits["micro_batch_tokens"] = tokens
    if point.activations != "auto":
        limits["checkpointing"] = point.activations in ("half", "recompute")
        limits["recomputed_layers"] = point.layers // 2 if point.activations == "half" else None
    # What is pinned is tried whether the planner thinks it fits or not; 8 bits are what it takes to fit.
    if point.cap_gib and (not tokens or point.activations == "keep8") and not small:
        limits["memory_gb"] = point.cap_gib * GIB / 1e9
    wish = Recipe.model_validate(
        {
            "model": {"name": folder, "quantize": point.quantize},
            "data": {"train": "-", "seq_len": seq_len},
            "method": point.method,
            "strategy": "single",
            "limits": limits,
            "train": {"global_batch_tokens": max(step, seq_len), "max_steps": STEPS, "learning_rate": 1e-5}
            | {"cuda_graphs": bool(point.graphs) and not small}
            | ({} if point.arithmetic == "auto" else {"arithmetic": point.arithmetic}),
        }
    )
    examples = max(1, max(step, seq_len) // seq_len)
    return wish, DataFacts(examples=examples, tokens=examples * seq_len, longest=seq_len)


def planned(point: Point, hardware: Hardware, folder: str = "grid", *, small: bool = False) -> Plan:
    """The plan of a point, with this machine's profile where `hardware` is not a described one."""
    shape = ModelShape.from_config(config_of(point, small=small))
    wish, facts = wish_of(point, folder, small=small)
    return make_plan(wish, hardware, shape, facts)


PREDICTED = (
    "layout",
    "predicted_bytes",
    "predicted_process_bytes",
    "predicted_seconds",
    "predicted_low",
    "predicted_high",
)
MEASURED = ("allocated_bytes", "reserved_bytes", "process_bytes", "seconds", "step_tokens", "error")
FIELDS = (*(field.name for field in fields(Point)), *PREDICTED, *MEASURED, "device", "torch", "date")


def predicted(plan: Plan) -> dict[str, Any]:
    """What the plan says of a step."""
    # What graphs need besides is for a validation, and there is none here.
    speed, peak = plan.chosen.speed, plan.chosen.step_bytes
    assert speed is not None
    tokens = plan.chosen.global_batch_tokens
    return {
        "layout": plan.layout.name,
        "predicted_bytes": peak,
        "predicted_process_bytes": needed_bytes(plan.layout, peak),
        "predicted_seconds": round(speed.step_seconds, 5),
        "predicted_low": round(tokens / speed.high, 5),
        "predicted_high": round(tokens / speed.low, 5),
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(point: Point, hardware: Hardware, folder: Path, *, small: bool, warm: int, timed: int) -> dict[str, Any]:
    """Plan, build and train one point; its row."""
    import torch
    from transformers import AutoConfig

    from kitaeru.engine import build as engine
    from kitaeru.engine.loop import Loop
    from kitaeru.events import Event, Step
    from kitaeru.model.load import config_dict
    from kitaeru.model.tokenizer import load_tokenizer
    from kitaeru.recipe.types import ModelSection

    row: dict[str, Any] = asdict(point)
    on_gpu = bool(hardware.devices)
    config = dict(config_of(point, small=small))
    full = AutoConfig.for_model(config.pop("model_type"), **config)
    full.save_pretrained(folder)
    if ModelShape.from_config(config_dict(full)) != ModelShape.from_config(config_of(point, small=small)):
        raise RuntimeError("the catalogue's sizes are not those of the model")
    plan = planned(point, hardware, str(folder), small=small)
    row |= predicted(plan)
    steps: list[Step] = []

    def hear(event: Event) -> None:
        if isinstance(event, Step):
            steps.append(event)

    start = _used(on_gpu)
    if on_gpu:
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if left > 160 << 20:
            raise RuntimeError(f"{left} bytes are left from the point before")
    with mock.patch.object(engine, "load_model", _make_model):  # weights made on the device, not those on a disk
        trainee = engine.build(plan, load_tokenizer(ModelSection(name="bundled")), hear)
    trained = sum(parameter.numel() for _, parameter in trainee.named)
    if trained != plan.chosen.trained_parameters:
        raise RuntimeError(f"{trained} parameters are trained, {plan.chosen.trained_parameters} were planned")
    corpus = _corpus(plan, len(trainee.tokenizer))
    loop = Loop(trainee, corpus, None, folder, {})
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    while len(steps) < warm + timed and (len(steps) < 2 or time.time() - began < PATIENCE_SECONDS):
        loop._step()
    row["seconds"] = round(statistics.median(step.seconds for step in steps[min(warm, len(steps) // 2) :]), 5)
    row["step_tokens"] = steps[-1].tokens
    if on_gpu:
        row["allocated_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
        row["process_bytes"] = _used(True) - BASELINE.get("bytes", start)
    else:
        row["allocated_bytes"] = steps[-1].peak_bytes
    return row


BASELINE: dict[str, int] = {}


def _used(on_gpu: bool) -> int:
    """Bytes of the first GPU that are taken, as its driver says."""
    if not on_gpu:
        return 0
    from kitaeru.machine.nvml import opened

    with opened() as nvml:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used)


def _corpus(plan: Plan, vocabulary: int) -> Any:
    """Examples of one length, enough for one step, of random tokens."""
    import numpy as np

    from kitaeru.data.corpus import Corpus

    length, step = plan.recipe.data.seq_len, plan.recipe.train.global_batch_tokens
    assert length
    assert step
    count = max(1, step // length)
    trained = np.ones(count * length, np.bool_)
    trained[::length] = False
    return Corpus(
        tokens=np.random.default_rng(0).integers(4, min(vocabulary, 20000), count * length, dtype=np.int32),
        trained=trained,
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        files=("grid",),
        file_index=np.zeros(count, np.int32),
        rows=np.arange(count, dtype=np.int64),
        sources=np.zeros(count, np.int32),
        weights=(1.0,),
    )


def _make_model(section: Any, layout: Any, seed: int, *_: Any) -> Any:
    """As `model.load.load_model` would give it: dtype, packing of the base, attention, device."""
    import torch
    from random_model import on_device

    from kitaeru.model import load

    config = load.load_config(section)
    dtype = torch.float32 if layout.method in ("full", "pretrain") else load.DTYPES[layout.precision]
    torch.manual_seed(seed)
    capped = layout.device == "cuda"
    if capped:  # the cap is for training: a real model is packed on its way to the device
        torch.cuda.set_per_process_memory_fraction(1.0)
    compute, attention = load.DTYPES[layout.precision], load.attention_for(section, config)
    how: Any = {"base": layout.base, "compute": compute, "attention": attention, "experts": True}
    model = on_device(config, torch.device(layout.device), dtype=dtype, **how)
    if capped and CAP:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP[0] / torch.cuda.get_device_properties(0).total_memory))
    return model


# Bytes that the point at work may take.
CAP: list[float] = []


# --- the run ----------------------------------------------------------------------------------------------------------


def work(points: list[Point], out: Path, hardware: Hardware, arguments: argparse.Namespace) -> None:
    """Measure what is missing, a row at a time."""
    import torch

    from kitaeru.model.quiet import quiet_libraries

    quiet_libraries()
    small = not hardware.devices
    BASELINE["bytes"] = _used(not small)
    with tempfile.TemporaryDirectory() as folder:
        for point in points:
            CAP[:] = [point.cap_gib * GIB] if point.cap_gib and not small else []
            started = time.time()
            row: dict[str, Any] = asdict(point)
            with suppress_to(row):
                row |= measure(point, hardware, Path(folder), small=small, warm=arguments.warm, timed=arguments.timed)
            gc.collect()
            if not small:
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)
            row |= {"device": hardware.devices[0].name if hardware.devices else "cpu", "torch": torch.__version__}
            append(out, [row | {"date": time.strftime("%Y-%m-%d")}], FIELDS)
            print(f"{point.name}: {told(row)} ({time.time() - started:.1f} s)", flush=True)
            if time.time() > arguments.until:
                return


@contextmanager
def suppress_to(row: dict[str, Any]) -> Iterator[None]:
    """An error goes into the row."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, KitaeruError) else f"{type(error).__name__}: {error}"
        row["error"] = " ".join(text.split())[:300]


def point_of(row: dict[str, str]) -> Point:
    """The point of a row."""
    kinds = {field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(Point)}
    return Point(**{name: kind(row[name]) for name, kind in kinds.items()})


def told(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if row.get("error"):
        return f"failed: {row['error']}"
    memory = float(row["predicted_bytes"]) / float(row["allocated_bytes"]) - 1
    seconds = float(row["predicted_seconds"]) / float(row["seconds"]) - 1
    gib = float(row["allocated_bytes"]) / GIB
    rate = float(row["step_tokens"]) / float(row["seconds"])
    took = f"{float(row['seconds']):.3f} s, planned {seconds:+.1%}; {rate:,.0f} tokens/s"
    return f"{row['layout']}: {gib:.2f} GiB, planned {memory:+.1%}; {took}"


def summary(rows: list[dict[str, str]]) -> str:
    """How far the predictions are off."""
    good = [row for row in rows if not row["error"]]
    lines = [f"{len(good)} points of {len(rows)}"]
    for what, before, after in (
        ("peak allocated", "predicted_bytes", "allocated_bytes"),
        ("process memory", "predicted_process_bytes", "process_bytes"),
        ("step time", "predicted_seconds", "seconds"),
    ):
        off = [abs(float(row[before]) / float(row[after]) - 1) for row in good if row[after]]
        if off:
            lines.append(f"{what}: off by {statistics.median(off):.1%} in the median, {max(off):.1%} at most")
    return "\n".join(lines)


def choices(rows: list[dict[str, str]]) -> str:
    """Of each method: what the planner took against the best that was measured."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        good = [row for row in rows if row["method"] == method and not row["error"]]
        taken = next((row for row in good if row["activations"] == "auto"), None)
        if taken is None:
            continue
        rate = {row["layout"]: float(row["step_tokens"]) / float(row["seconds"]) for row in good}
        best, mine = max(rate, key=lambda layout: rate[layout]), taken["layout"]
        text = (
            f"{method}: took {mine} ({rate[mine]:,.0f} tokens/s), the best of {len(rate)} is {best} ({rate[best]:,.0f})"
        )
        lines.append(f"{text}: {rate[mine] / rate[best] - 1:+.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--exhaustive", action="store_true", help="all layouts of a shape under 24 GiB")
    parser.add_argument("--budget-seconds", type=float, default=1e9)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--timed", type=int, default=3)
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    worker = bool(arguments.until)
    arguments.until = arguments.until or time.time() + arguments.budget_seconds
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["KITAERU_DATA"] = str(arguments.out.parent / f".{arguments.out.stem}")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    hardware = _machine(arguments)
    done = {point_of(row) for row in read(arguments.out)}
    points = [p for p in (_exhaustive() if arguments.exhaustive else _points()) if arguments.only in p.name]
    missing = [point for point in points if point not in done]
    if worker:
        work(missing, arguments.out, hardware, arguments)
        return
    while missing and time.time() < arguments.until:
        command = [sys.executable, *sys.argv, "--until", str(arguments.until)]
        ended = subprocess.run(command, check=False).returncode
        left = [p for p in missing if p not in {point_of(row) for row in read(arguments.out)}]
        if ended and left:  # the process died: this point is to blame
            died = asdict(left[0]) | {"error": f"the process ended with code {ended}"}
            append(arguments.out, [died], FIELDS)
            left = left[1:]
        elif len(left) == len(missing):
            break
        missing = left
    rows = read(arguments.out)
    print(summary(rows))
    if arguments.exhaustive:
        print(choices(rows))


def _machine(arguments: argparse.Namespace) -> Hardware:
    """This machine, measured once and kept beside the table."""
    from kitaeru.machine.probe import probe
    from kitaeru.plan.calibrate import profile_path

    kept = arguments.out.with_suffix(".machine.json")
    measured = arguments.out.with_suffix(".profile.json")
    if not kept.exists():
        found = probe()
        if arguments.device == "cpu":
            found = replace(found, devices=(), links=())
        kept.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    hardware = Hardware.load(kept)
    if not measured.exists():
        started = time.time()
        if hardware.devices:  # in a process of its own, which leaves nothing on the GPU
            words = ["bench", "--calibrate", "--quick", "--alone", "--output", str(measured)]
            subprocess.run([sys.executable, "-m", "kitaeru", *words], check=True, stdout=sys.stderr)
        else:
            from kitaeru.machine.calibration import calibrate

            calibrate(hardware, measured, quick=True, links=False)
        print(f"calibrated in {time.time() - started:.1f} s", flush=True)
    profile_path().parent.mkdir(parents=True, exist_ok=True)
    profile_path().write_bytes(measured.read_bytes())
    return hardware


if __name__ == "__main__":
    main()
