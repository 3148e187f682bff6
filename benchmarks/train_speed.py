"""Tokens/s and peak memory of `kitaeru train` on one device: models of real shapes with random weights on a GPU, the
bundled model on a CPU.

Each point is a real run of the command line in a process of its own; what is reported comes from the run's own
events.jsonl and plan.json: the median tokens/s after the warm-up steps, the measured and the predicted peak.

    python benchmarks/train_speed.py --out benchmarks/results/train-h100.csv --data TEXT.jsonl
    python benchmarks/train_speed.py --out benchmarks/results/train-cpu.csv \
        --points cpu-lora cpu-qlora cpu-int8 cpu-full
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from table import write

import kitaeru
from kitaeru import __version__, events
from kitaeru.api.scaling import until_last_step
from kitaeru.model.random_weights import write_random
from kitaeru.plan.types import Plan

# The most that one point may take.
SECONDS = 900.0

SHAPES = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip

# name: (shape, method, cap in GiB or None, further settings)
POINTS: dict[str, tuple[str, str, float | None, tuple[str, ...]]] = {
    "qlora-8b-24gb": ("llama-3-8b", "qlora", 24, ()),
    "lora-8b": ("llama-3-8b", "lora", None, ()),
    "qlora-8b": ("llama-3-8b", "qlora", None, ()),
    "full-1b": ("llama-3.2-1b", "full", None, ()),
    "full-3b": ("llama-3.2-3b", "full", None, ()),
    "lora-8b-24gb": ("llama-3-8b", "lora", 24, ()),
    "cpu-lora": ("bundled", "lora", None, ()),
    "cpu-qlora": ("bundled", "qlora", None, ()),
    "cpu-int8": ("bundled", "lora", None, ("model.quantize=int8",)),
    "cpu-full": ("bundled", "full", None, ()),
}
QUICKSTART = Path(kitaeru.__file__).parent / "assets" / "quickstart" / "train.jsonl"
FIELDS = (
    "point", "device", "kitaeru", "torch", "shape", "method", "cap_gib", "layout", "steps", "tokens_per_step",
    "tokens_per_second", "peak_gib", "predicted_gib", "load_seconds", "date",
)  # fmt: skip


def measure(point: str, work: Path, data: Path, steps: int) -> dict[str, object]:
    """Run one point and return its row."""
    shape, method, cap, extra = POINTS[point]
    on_cpu = shape == "bundled"
    model, run = shape if on_cpu else str(work / shape), work / "runs" / point / "run"
    if not on_cpu:
        config = {"model_type": "llama", "max_position_embeddings": 8192, "head_dim": 128, **SHAPES[shape]}
        write_random(config, work / shape)
    shutil.rmtree(run.parent, ignore_errors=True)
    run.parent.mkdir(parents=True)
    settings = [
        "data.seq_len=2048",
        "data.long=split",
        f"train.max_steps={steps}",
        f"train.global_batch_tokens={4096 if on_cpu else 16384}",
        "samples.count=0",
        "track.tensorboard=false",
        "train.save_every=1000",
        *([f"limits.memory_gb={cap * 2**30 / 1e9}"] if cap else []),
        *extra,
    ]
    command = [sys.executable, "-m", "kitaeru", "train", model, "--data", str(data), "--method", method, "--plain"]
    command += ["--output", str(run), *(word for setting in settings for word in ("--set", setting))]
    started = time.time()
    outcome = until_last_step(command, run.parent, steps, SECONDS)
    if outcome != "ok":
        raise RuntimeError(outcome)
    seen = list(events.read(run / "events.jsonl"))
    taken = [e for e in seen if isinstance(e, events.Step)][3:]
    begun = next(e for e in seen if isinstance(e, events.RunStarted))
    plan = Plan.load(run / "plan.json")
    return {
        "point": point,
        "device": begun.device,
        "kitaeru": __version__,
        "torch": torch.__version__,
        "shape": shape,
        "method": method,
        "cap_gib": cap or "",
        "layout": plan.layout.name,
        "steps": len(taken),
        "tokens_per_step": round(statistics.mean(e.tokens for e in taken)),
        "tokens_per_second": round(statistics.median(e.tokens_per_second for e in taken)),
        "peak_gib": round(max(e.peak_bytes for e in taken) / 2**30, 3),
        "predicted_gib": round(plan.chosen.peak_bytes / 2**30, 3),
        "load_seconds": round(begun.time - started, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=QUICKSTART, help="what to train on")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--points", nargs="*", default=[name for name in POINTS if not name.startswith("cpu-")])
    arguments = parser.parse_args()
    rows = []
    for point in arguments.points:
        try:
            rows.append(measure(point, arguments.work, arguments.data, arguments.steps))
        except RuntimeError as error:
            print(f"{point}: {error}", file=sys.stderr)
            continue
        print(json.dumps(rows[-1]), flush=True)
        write(arguments.out, rows, FIELDS)


if __name__ == "__main__":
    main()
