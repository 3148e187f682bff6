"""Run folders as training would leave them, made of real events, a real plan and a real recipe. No training."""

from __future__ import annotations

import math
import random
from pathlib import Path

from kitaeru.events import (
    DataReady,
    Evaluated,
    Event,
    EventLog,
    Notice,
    RunFinished,
    RunStarted,
    Sample,
    Saved,
    Step,
)
from kitaeru.plan.types import Candidate, Decision, Layout, Plan
from kitaeru.recipe.types import Recipe

T0 = 1_790_000_000.0
MODEL = "bundled"
QUESTIONS = {
    "日本で一番高い山は何ですか?": ("山は山の山です。", "日本で一番高い山は富士山です。標高は3,776メートルです。"),
    "鍛えるとはどういう意味ですか? 例を挙げて説明してください。": (
        "鍛えるの鍛えるの意味の意味",
        "「鍛える」とは、繰り返し練習して力をつけることです。\n例えば、毎朝走って体を鍛える、などと言います。",
    ),
    "<script>alert('x')</script> & \"quotes\"": ("<b>bold</b>", "a < b && c > d"),
}
RECIPE = """\
# 日本語の指示に答える小さなモデル
model: bundled
method: lora
data:
  train: instructions.jsonl  # <script>alert(1)</script>
  valid_fraction: 0.05
train:
  max_steps: {steps}
"""


def recipe(steps: int) -> Recipe:
    return Recipe.model_validate(
        {
            "model": MODEL,
            "method": "lora",
            "data": {"train": "instructions.jsonl", "valid_fraction": 0.05, "seq_len": 512},
            "train": {"max_steps": steps, "learning_rate": 2e-4},
        }
    )


def plan(steps: int) -> Plan:
    layout = Layout("single", "lora", "none", "fp32", "keep", 2048, "cpu")
    memory = {"weights": 38_200_000, "adapter": 2_100_000, "optimizer": 4_200_000, "activations": 182_000_000,
              "head": 130_000_000, "quantization": 0}  # fmt: skip
    rival = Layout("single", "full", "none", "fp32", "keep", 2048, "cpu")
    return Plan(
        recipe=recipe(steps),
        chosen=Candidate(layout, memory, 900_000_000, True, ("fits with room to spare",)),
        decisions=(
            Decision("train.global_batch_tokens", 4096, "The data set is small: about 400 steps an epoch."),
            Decision(
                "limits.micro_batch_tokens", 2048, "The largest that keeps the step under the memory of this CPU."
            ),
            Decision("train.precision", "fp32", "A CPU computes bf16 slower than fp32."),
        ),
        rivals=(Candidate(rival, {**memory, "optimizer": 76_400_000}, 900_000_000, True, ("slower to learn",)),),
        hardware={"name": "2 cores"},
    )


def started(steps: int, resumed: int = 0, at: float = T0) -> RunStarted:
    return RunStarted(
        time=at,
        run="quickstart",
        model=MODEL,
        method="lora",
        strategy="single",
        device="cpu (2 cores)",
        max_steps=steps,
        resumed_step=resumed,
        environment={"kitaeru": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "machine": "Linux x86_64, 2 cores"},
        trainable_parameters=524_288,
        total_parameters=9_437_184,
    )


def data() -> list[Event]:
    histogram = {"32": 812, "64": 1403, "128": 701, "256": 233, "512": 51}
    return [
        DataReady(time=T0 + 1, split="train", examples=3200, tokens=331_204, trained_tokens=171_034, longest=498,
                  left_out={"longer than seq_len: truncated": 12, "duplicate": 3}, characters=512_345,
                  length_histogram=histogram, kinds={"instructions.jsonl": "alpaca"}),
        DataReady(time=T0 + 1, split="valid", examples=160, tokens=16_431, trained_tokens=8_610, longest=402,
                  characters=25_418),
    ]  # fmt: skip


def step(n: int, steps: int, loss: float | None = None) -> Step:
    noise = random.Random(n)
    value = 1.9 + 1.6 * math.exp(-4 * n / steps) + noise.gauss(0, 0.09)
    return Step(
        time=T0 + 2 + n * 0.6,
        step=n,
        loss=value if loss is None else loss,
        tokens=4000 + noise.randrange(96),
        trained_tokens=2050,
        tokens_per_second=6800 + noise.gauss(0, 150),
        learning_rate=2e-4 * min(1, n / 3) * 0.5 * (1 + math.cos(math.pi * n / steps)),
        grad_norm=0.6 + abs(noise.gauss(0, 0.2)),
        peak_bytes=371_000_000,
        epoch=n * 4050 / 331_204,
        seconds=0.59,
    )


def validation(n: int, steps: int, best: bool = True) -> Evaluated:
    loss = 1.95 + 1.5 * math.exp(-4 * n / steps)
    return Evaluated(time=T0 + 2.1 + n * 0.6, step=n, loss=loss, tokens=16_431, seconds=1.2, best=best)


def samples(n: int, steps: int) -> list[Event]:
    place = 0 if n == 0 else 1
    return [Sample(time=T0 + 2.2 + n * 0.6, step=n, prompt=q, answer=a[place]) for q, a in QUESTIONS.items()]


def events(steps: int, first: int = 1, last: int | None = None) -> list[Event]:
    """Steps `first` to `last` with a validation and a checkpoint every fifth of the run."""
    every = max(1, steps // 5)
    result: list[Event] = [validation(0, steps, best=False), *samples(0, steps)] if first == 1 else []
    for n in range(first, (last or steps) + 1):
        result.append(step(n, steps))
        if n % every == 0:
            result.append(validation(n, steps))
            path = f"checkpoints/step-{n:06d}"
            result.append(Saved(time=T0 + 2.3 + n * 0.6, step=n, path=path, bytes=6_300_000, seconds=0.05))
    return result


def finish(steps: int, outcome: str = "finished", result: str = "adapter") -> list[Event]:
    at = T0 + 4 + steps * 0.6
    ended = RunFinished(time=at, outcome=outcome, step=steps, seconds=at - T0, best_step=steps, result=result)
    return [*samples(steps, steps), ended]


def write(folder: Path, steps: int, parts: list[list[Event]], with_plan: bool = True) -> Path:
    folder.mkdir(parents=True)
    for part in parts:  # one log for each start, as processes would have it
        log = EventLog(folder / "events.jsonl")
        for event in part:
            log(event)
        log.close()
    if with_plan:
        plan(steps).save(folder / "plan.json")
        (folder / "recipe.yaml").write_text(RECIPE.format(steps=steps), encoding="utf-8")
    return folder


def finished(folder: Path, steps: int = 60) -> Path:
    """A run from start to end."""
    notice = Notice(time=T0 + 3, level="warning", text="Step 17: the loss rose to <3> times the median.", step=17,
                    examples=("instructions.jsonl:<12>",))  # fmt: skip
    return write(folder, steps, [[started(steps), *data(), *events(steps), notice, *finish(steps)]])


def resumed(folder: Path, steps: int = 60) -> Path:
    """Killed after step 40 with its last checkpoint at 36, then resumed and finished; void steps had another loss."""
    void = [step(n, steps, loss=99.0) for n in range(37, 41)]
    first = [started(steps), *data(), *events(steps, last=36), *void]
    second = [started(steps, resumed=36, at=T0 + 1000), *data(), *events(steps, first=37), *finish(steps)]
    return write(folder, steps, [first, second])


def killed(folder: Path, steps: int = 60) -> Path:
    """Killed in the middle of writing an event; no plan, no recipe."""
    write(folder, steps, [[started(steps), *data(), *events(steps, last=25)]], with_plan=False)
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 26, "lo')
    return folder


def begun(folder: Path) -> Path:
    """Nothing but a start."""
    return write(folder, 60, [[started(60)]])
