"""Equal loss: a small real model trained with its frozen products in 8 bits, and plainly, on the same Japanese data.

    python benchmarks/equal_loss.py --data ja-instruct/train.jsonl --valid ja-instruct/valid.jsonl \
        --out benchmarks/results/equal-loss-h100.csv

Each run is a real run of the command line, QLoRA unless told otherwise; those of one seed see the same examples in the
same order from the same adapter. What counts: the mean training loss of the last fifth of the steps, and the validation
loss at the end, each against the plain run of the same seed, and how far seeds lie apart. Beside them a task score of
each result: the share of questions of `--task` whose right answer is the likeliest (without it: which answer belongs to
a held-out conversation, of four).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from table import write
from task_score import questions, score_of

from kitaeru import events

FIELDS = (
    "arithmetic", "seed", "steps", "train_loss", "valid_loss", "valid_loss_before", "task_score", "seconds", "device",
    "date",
)  # fmt: skip


def command(arithmetic: str, seed: int, run: Path, arguments: argparse.Namespace) -> list[str]:
    settings = {
        "data.valid": arguments.valid,
        "data.seq_len": min(1024, arguments.tokens),
        "train.arithmetic": arithmetic,
        "train.seed": seed,
        "train.max_steps": arguments.steps,
        "train.global_batch_tokens": arguments.tokens,
        "limits.micro_batch_tokens": arguments.tokens,
        "train.eval_every": arguments.steps,
        "train.eval_max_examples": arguments.valid_examples,
        "train.save_every": arguments.steps,
        "train.keep_best": "false",
        "samples.count": 0,
        "track.tensorboard": "false",
    }
    if arguments.learning_rate:
        settings["train.learning_rate"] = arguments.learning_rate
    words = [sys.executable, "-m", "kitaeru", "train", arguments.model, "--data", str(arguments.data)]
    words += ["--method", arguments.method, "--plain", "--output", str(run)]
    return words + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def row_of(arithmetic: str, seed: int, run: Path, most: int) -> dict[str, object] | None:
    """What a run came to in its first `most` steps; None where it has none yet."""
    path = run / "events.jsonl"
    seen = list(events.read(path)) if path.exists() else []
    steps = [e for e in seen if isinstance(e, events.Step)][:most]
    if not steps:
        return None
    checked = {e.step: e.loss for e in seen if isinstance(e, events.Evaluated)}
    begun = next(e for e in seen if isinstance(e, events.RunStarted))
    last = steps[-max(1, len(steps) // 5) :]
    return {
        "arithmetic": arithmetic,
        "seed": seed,
        "steps": len(steps),
        "train_loss": round(statistics.mean(e.loss for e in last), 6),
        "valid_loss": round(checked[len(steps)], 6) if len(steps) in checked else "",
        "valid_loss_before": round(checked[0], 6) if 0 in checked else "",
        "seconds": round(steps[-1].time - begun.time, 1),
        "device": begun.device,
        "date": time.strftime("%Y-%m-%d"),
    }


def verdict(rows: list[dict[str, object]]) -> list[str]:
    """For each arithmetic the mean task score; for each kind of loss the mean gap to plain, seed by seed, beside the
    spread of plain's seeds.
    """
    found = []
    scores = {(r["arithmetic"], r["seed"]): float(str(r["task_score"])) for r in rows if r["task_score"] != ""}
    for name in dict.fromkeys(arithmetic for arithmetic, _ in scores):
        own = [score for (arithmetic, _), score in scores.items() if arithmetic == name]
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        found.append(f"task score {name}: {statistics.mean(own):.1%} (seeds lie {spread:.1%} apart), {len(own)} seeds")
    for kind in ("train_loss", "valid_loss"):
        losses = {(r["arithmetic"], r["seed"]): float(str(r[kind])) for r in rows if r[kind] != ""}
        plain = {seed: loss for (arithmetic, seed), loss in losses.items() if arithmetic == "plain"}
        spread = statistics.stdev(plain.values()) / statistics.mean(plain.values()) if len(plain) > 1 else 0.0
        for name in dict.fromkeys(str(r["arithmetic"]) for r in rows if r["arithmetic"] != "plain"):
            gaps = [losses[name, seed] / plain[seed] - 1 for seed in plain if (name, seed) in losses]
            if gaps:
                mean = statistics.mean(gaps)
                found.append(f"{kind} {name}: {mean:+.3%} of plain's (seeds lie {spread:.3%} apart), {len(gaps)} seeds")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--method", choices=("qlora", "lora", "full"), default="qlora")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/equal-loss"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--valid-examples", type=int, default=400)
    parser.add_argument("--task", type=Path, help="rows of question, choices, answer; default: --valid")
    parser.add_argument("--task-questions", type=int, default=150)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arithmetic", nargs="+", default=["plain", "fp8", "int8"])
    parser.add_argument("--at-once", type=int, default=9, help="runs side by side")
    parser.add_argument("--seconds", type=float, default=1e9, help="for everything")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    todo = [(kind, seed) for seed in range(arguments.seeds) for kind in arguments.arithmetic]
    every = list(todo)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    until = time.monotonic() + arguments.seconds
    while (todo or running) and time.monotonic() < until:
        while todo and len(running) < arguments.at_once:
            kind, seed = todo.pop(0)
            run = arguments.work / f"{kind}-{seed}"
            shutil.rmtree(run, ignore_errors=True)
            log = run.with_suffix(".log").open("w")
            running[kind, seed] = subprocess.Popen(
                command(kind, seed, run, arguments), stdout=log, stderr=subprocess.STDOUT
            )
        time.sleep(0.5)
        for key, process in list(running.items()):
            if process.poll() is not None:
                del running[key]
                if process.returncode:
                    said = (arguments.work / f"{key[0]}-{key[1]}.log").read_text()[-600:]
                    print(f"{key}: exit code {process.returncode}", said, file=sys.stderr)
    for process in running.values():
        process.kill()
    # A run that was cut off is compared over the steps that all have made.
    found = [row_of(*key, arguments.work / f"{key[0]}-{key[1]}", arguments.steps) for key in every]
    common = min((int(str(row["steps"])) for row in found if row), default=0)
    again = [row_of(*key, arguments.work / f"{key[0]}-{key[1]}", common) for key in every]
    asked = questions(arguments.task or arguments.valid, arguments.task_questions)
    for key, row in zip(every, again, strict=True):
        if row:
            score = score_of(arguments.work / f"{key[0]}-{key[1]}", asked)
            row["task_score"] = "" if score is None else round(score, 4)
    rows = [row for row in again if row]
    write(arguments.out, rows, FIELDS)
    for row in rows:
        print(row)
    print("\n".join(verdict(rows)))


if __name__ == "__main__":
    main()
