"""Several ranks on one GPU: DDP, FSDP2 and pipeline steps against the same steps of one process.

With `limits.devices: 2` on a machine with one GPU both ranks use it and talk through gloo, point-to-point by way of
the CPU (NCCL refuses to share a GPU). That proves the code on CUDA, not its speed. The model has the shape of an 8B
one, cut in depth and vocabulary, with random weights; each point is a real run of the command line in a process of its
own. A row says how far losses are from the single process's, how many answers are the same, and each rank's peak memory
beside the planned one. What does not fit the budget is recorded as not run.

    python benchmarks/two_ranks_one_gpu.py --out benchmarks/results/two-ranks-one-gpu.csv
    python benchmarks/two_ranks_one_gpu.py --device cpu --out /tmp/two-ranks.csv     # a tiny shape, to try the script
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from table import write

import kitaeru
from kitaeru import events
from kitaeru.api.scaling import why_failed
from kitaeru.model.random_weights import write_random
from kitaeru.plan.types import Plan

SHAPES = {
    "cuda": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 32768, "rope_theta": 500000.0,
    },
    "cpu": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 16384,
    },
}  # fmt: skip
# Tokens of the longest example, of a micro-batch and of a step.
SIZES = {"cuda": (1024, 2048, 8192), "cpu": (128, 128, 512)}


@dataclass(frozen=True)
class Point:
    """A run: its strategy and method, its number of ranks, the point whose losses it must have, the devices that a copy
    is split over, and the strategy's variant; whether layers are fused, in 16 bits, and replayed as CUDA graphs (on a
    GPU).
    """

    strategy: str
    method: str
    ranks: int
    like: str = ""
    stages: int = 0
    variant: str = ""
    fused: bool = False
    graphs: bool = False


POINTS = {
    "single-qlora": Point("single", "qlora", 1),
    "pipeline-qlora": Point("pipeline", "qlora", 2, "single-qlora"),
    "ddp-qlora": Point("ddp", "qlora", 2, "single-qlora"),
    "single-lora": Point("single", "lora", 1),
    "fsdp-lora": Point("fsdp", "lora", 2, "single-lora"),
    "fsdp-qlora": Point("fsdp", "qlora", 2, "single-qlora"),
    "fsdp-offload-qlora": Point("fsdp", "qlora", 2, "single-qlora", variant="offload"),
    "fsdp-2x2-qlora": Point("fsdp", "qlora", 4, "single-qlora", 2),
    "pipeline-lora": Point("pipeline", "lora", 2, "single-lora"),
    "tensor-lora": Point("tensor", "lora", 2, "single-lora"),
    "model_parallel-qlora": Point("model_parallel", "qlora", 2, "single-qlora"),
    "pipeline-dp2-qlora": Point("pipeline", "qlora", 4, "single-qlora", 2),
    "pipeline-4-qlora": Point("pipeline", "qlora", 4, "single-qlora", 4),
    "single-fused-lora": Point("single", "lora", 1, fused=True),
    "single-graphs-lora": Point("single", "lora", 1, "single-fused-lora", fused=True, graphs=True),
    "ddp-graphs-lora": Point("ddp", "lora", 2, "single-fused-lora", fused=True, graphs=True),
}
FIELDS = (
    "point", "layers", "outcome", "device", "kitaeru", "torch", "transformers", "layout", "cuts", "steps", "first_loss",
    "last_loss", "loss_difference", "norm_difference", "valid_difference", "same_answers", "peak_gib", "planned_gib",
    "tokens_per_second", "seconds", "date",
)  # fmt: skip


def make_model(device: str, layers: int, folder: Path) -> None:
    """A folder with random bf16 weights (fp32 on a CPU) and the packaged tokenizer."""
    shape = {**SHAPES[device], "num_hidden_layers": layers, "tie_word_embeddings": False}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    write_random({"model_type": "llama", "max_position_embeddings": 8192, **shape}, folder, dtype)


def command(name: str, arguments: argparse.Namespace, model: Path, run: Path) -> list[str]:
    """The command line of a point."""
    point, (length, micro, batch) = POINTS[name], SIZES[arguments.device]
    settings = {
        "strategy": point.strategy,
        "limits.devices": point.ranks,
        "limits.device": arguments.device,
        "limits.micro_batch_tokens": micro,
        "limits.checkpointing": "true",  # what single would choose may differ from what half a GPU leaves room for
        "data.seq_len": length,
        "data.long": "split",
        "data.valid_fraction": 0.05,
        "train.eval_max_examples": 8,
        "train.max_steps": arguments.steps,
        "train.global_batch_tokens": batch,
        "train.learning_rate": 1e-3,
        "samples.count": 1,
        "samples.max_new_tokens": 8,
        "track.tensorboard": "false",
        **({"limits.threads": 1} if arguments.device == "cpu" else {}),
        **({"limits.split_over": point.stages} if point.stages else {}),
        **({"limits.variant": point.variant} if point.variant else {}),
        # The same arithmetic everywhere that is compared: fused layers round otherwise.
        "train.arithmetic": "16bit" if point.fused else "plain",
        "train.cuda_graphs": str(point.graphs and arguments.device == "cuda").lower(),
    }
    words = [sys.executable, "-m", "kitaeru", "train", str(model), "--data", str(arguments.data), "--plain"]
    words += ["--method", point.method, "--output", str(run)]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def run_point(words: list[str], log: Path, seconds: float) -> str:
    """Run it, with all processes that it starts; "ok", or what went wrong."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"no end within {seconds:.0f} s"
    return "ok" if code == 0 else why_failed(log.read_text(errors="replace"), code)


def far(ours: list[float], theirs: list[float]) -> float | str:
    """The largest relative difference, or nothing where they cannot be compared."""
    if not ours or len(ours) != len(theirs):
        return ""
    return float(f"{max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)):.3g}")


def row_of(name: str, model: Path, run: Path, like: Path | None, outcome: str, seconds: float) -> dict[str, object]:
    """What the run's own files say, beside those of the run it must be equal to."""
    row: dict[str, object] = {
        "point": name,
        "layers": json.loads((model / "config.json").read_text())["num_hidden_layers"],
        "outcome": outcome,
        "kitaeru": kitaeru.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
    }
    seen = list(events.read(run / "events.jsonl")) if (run / "events.jsonl").exists() else []
    steps = [event for event in seen if isinstance(event, events.Step)]
    if (run / "plan.json").exists():
        plan = Plan.load(run / "plan.json")
        row |= {"layout": plan.layout.name, "cuts": " ".join(str(layers) for layers in plan.layout.cuts)}
        row["planned_gib"] = " ".join(f"{peak / 2**30:.2f}" for peak in plan.chosen.device_peaks)
    if not steps:
        return row
    peaks = steps[-1].device_peaks or (steps[-1].peak_bytes,)
    row |= {
        "device": next(event.device for event in seen if isinstance(event, events.RunStarted)),
        "steps": len(steps),
        "first_loss": round(steps[0].loss, 5),
        "last_loss": round(steps[-1].loss, 5),
        "peak_gib": " ".join(f"{peak / 2**30:.2f}" for peak in peaks),
        "tokens_per_second": round(steps[-1].tokens_per_second),
    }
    if like is not None and (like / "events.jsonl").exists():
        wanted = list(events.read(like / "events.jsonl"))
        theirs = [event for event in wanted if isinstance(event, events.Step)]
        row["loss_difference"] = far([e.loss for e in steps], [e.loss for e in theirs])
        row["norm_difference"] = far([e.grad_norm for e in steps], [e.grad_norm for e in theirs])
        row["valid_difference"] = far(*([e.loss for e in x if isinstance(e, events.Evaluated)] for x in (seen, wanted)))
        answers = [[e.answer for e in x if isinstance(e, events.Sample)] for x in (seen, wanted)]
        row["same_answers"] = sum(a == b for a, b in zip(*answers, strict=False)) if answers[0] else ""
    return row


def main() -> None:
    """Run the points that the budget allows, one after another; the CSV is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", type=Path, help="a folder from a run before, or where to make one")
    parser.add_argument("--layers", type=int, default=4, help="depth of the model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--budget-seconds", type=float, default=150, help="for everything, making the model included")
    parser.add_argument("--point-seconds", type=float, default=60, help="for one point at most")
    parser.add_argument("--data", type=Path, default=Path(kitaeru.__file__).parent / "assets/quickstart/train.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/two-ranks"))
    parser.add_argument("--points", nargs="*", choices=POINTS, default=list(POINTS))
    arguments = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    model = arguments.model or arguments.work / "model"
    if not model.exists():
        make_model(arguments.device, arguments.layers, model)
    rows = []
    for name in arguments.points:
        left = arguments.budget_seconds - (time.monotonic() - started)
        run, like, begun = arguments.work / name, POINTS[name].like, time.monotonic()
        outcome = "no time left"
        if left > 5:
            words = command(name, arguments, model, run)
            outcome = run_point(words, arguments.work / f"{name}.log", min(left, arguments.point_seconds))
        rows.append(
            row_of(name, model, run, arguments.work / like if like else None, outcome, time.monotonic() - begun)
        )
        print(json.dumps(rows[-1]), flush=True)
        write(arguments.out, rows, FIELDS)


if __name__ == "__main__":
    main()
