"""A small run without a planner: an explicit layout, real data, the real build and loop. Loaded by conftest.py."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from kitaeru.data.prepare import Prepared, prepare
from kitaeru.engine.build import Trainee, build
from kitaeru.engine.loop import Loop
from kitaeru.events import Event, EventLog, Notice, Step
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.parallel.world import World
from kitaeru.plan.types import Candidate, Layout, Plan
from kitaeru.recipe.types import Recipe

quiet_libraries()

QUESTIONS = (
    "日本で一番高い山は?",
    "首都はどこですか。",
    "1足す1は?",
    "海の色は何色?",
    "おすすめの本は?",
    "犬は何と鳴きますか。",
)
ANSWERS = (
    "富士山です。",
    "東京です。",
    "2になります。",
    "青いことが多いです。",
    "「こころ」を読んでください。",
    "わんわん。",
)


def write_data(path: Path, count: int = 24, *, start: int = 0) -> Path:
    """Conversations of about 15 to 45 tokens, no two alike, one a line."""
    lines = []
    for i in range(start, start + count):
        answer = "".join(ANSWERS[(i + k * k) % len(ANSWERS)] for k in range(1 + i % 4))
        turns = [
            {"role": "user", "content": f"{i}番目の質問。{QUESTIONS[i % len(QUESTIONS)]}"},
            {"role": "assistant", "content": f"{i}: {answer}"},
        ]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """`put(recipe, "train.seed", 3)`."""
    *sections, last = path.split(".")
    for name in sections:
        values = values.setdefault(name, {})
    values[last] = value


def make_recipe(model: Path, data: Path, method: str, **changes: Any) -> Recipe:
    """A recipe with everything the engine needs; `changes` as `train__seed=3`."""
    values: dict[str, Any] = {
        "model": {"name": str(model)},
        "data": {"train": str(data), "seq_len": 64, "workers": 1},
        "method": method,
        "train": {"max_steps": 4, "learning_rate": 2e-3, "global_batch_tokens": 256},
    }
    for path, value in changes.items():
        put(values, path.replace("__", "."), value)
    if values["train"].get("global_batch_examples"):
        del values["train"]["global_batch_tokens"]
    return Recipe.model_validate(values)


class Training:
    """What one run consists of, and the events it emitted."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        data: Path,
        method: str = "lora",
        *,
        base: str | None = None,
        precision: str = "fp32",
        activations: str = "keep",
        micro_batch_tokens: int = 128,
        strategy: str = "single",
        variant: str = "",
        cuts: tuple[int, ...] = (),
        devices: int = 0,
        replicas: int = 1,
        arithmetic: str = "plain",
        shards: int = 0,
        recomputed: int = 0,
        step_in_backward: bool = False,
        world: World | None = None,
        recipe: Recipe | None = None,
        **changes: Any,
    ) -> None:
        self.folder = folder
        self.recipe = recipe or make_recipe(model, data, method, **changes)
        layout = Layout(
            strategy,
            method,  # type: ignore[arg-type]
            base or ("nf4" if method == "qlora" else "none"),  # type: ignore[arg-type]
            precision,  # type: ignore[arg-type]
            activations,  # type: ignore[arg-type]
            micro_batch_tokens,
            "cpu",
            devices or (world.size if world else 1),
            variant,
            world.size if world and strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3") else replicas,
            2 if variant == "interleaved" else 1,
            cuts,
            arithmetic=arithmetic,  # type: ignore[arg-type]
            shards=shards,
            recomputed=recomputed,
            step_in_backward=step_in_backward,
        )
        self.plan = Plan(self.recipe, Candidate(layout, {}, 0, True))
        self.tokenizer = load_tokenizer(self.recipe.model)
        self.data: Prepared = prepare(self.recipe, self.tokenizer, seq_len=64, bad_rows=None)
        self.events: list[Event] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.trainee: Trainee = build(self.plan, self.tokenizer, self.hear, world=world)
        self.loop = self.new_loop()

    def hear(self, event: Event) -> None:
        self.events.append(event)

    def new_loop(self) -> Loop:
        prints = {"recipe": self.recipe.model_dump(mode="json"), "data": {"train": self.data.train.fingerprint}}
        return Loop(self.trainee, self.data.train, self.data.valid, self.folder, prints)

    def run(self) -> str:
        return self.loop()

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def notices(self) -> list[Notice]:
        return [event for event in self.events if isinstance(event, Notice)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trainee.named}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """What the trained model says, without packing and without noise."""
        model = self.trainee.causal_lm
        self.trainee.model.eval()
        kernel = model.config._attn_implementation
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(kernel)
        return logits


@contextlib.contextmanager
def logged(path: Path):
    """An event log that is closed at the end."""
    log = EventLog(path)
    try:
        yield log
    finally:
        log.close()
