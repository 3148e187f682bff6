"""One very long example, and a model that hardly fits: what activations by layer make possible on a card of 24 GB.

Shapes are real, weights random, drawn on the device and packed to 4 bits one after the other. Each point is planned
under a cap of 24 GiB, built by the engine's own passes, tried (`preflight`) and trained for a few steps.

    python benchmarks/long_context.py --out benchmarks/results/long-context-h100.csv
    python benchmarks/long_context.py --out /tmp/long.csv --device cpu
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from planner_grid import GIB, MODELS, SHRINK, Point, _corpus, config_of
from table import append

from kitaeru import __version__
from kitaeru.machine.probe import probe
from kitaeru.plan.choose import make_plan
from kitaeru.plan.types import DataFacts, Plan
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

# name: (model, layers, tokens of an example, examples of a step, what is pinned)
POINTS: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "8b-100k": ("llama-3-8b", 32, 102400, 1, {}),
    "8b-128k": ("llama-3-8b", 32, 131072, 1, {}),
    "34b-some": ("codellama-34b", 48, 2048, 8, {"recomputed_layers": 40, "micro_batch_tokens": 2048}),
    "34b-all": ("codellama-34b", 48, 2048, 8, {"checkpointing": True, "offload_activations": False}),
    "34b-offload": ("codellama-34b", 48, 2048, 8, {"offload_activations": True}),
}
CAP_GIB = 24.0
FIELDS = (
    "point", "device", "kitaeru", "torch", "layout", "tokens", "steps", "seconds", "predicted_seconds",
    "tokens_per_second", "peak_gib", "predicted_gib", "pinned_gb", "predicted_host_gb", "process_gb", "build_seconds",
    "preflight_seconds", "loss", "date",
)  # fmt: skip


def planned(name: str, folder: Path, *, small: bool) -> Plan:
    """The plan of a point on this machine, the model's config in `folder`."""
    from transformers import AutoConfig

    model, layers, tokens, examples, pinned = POINTS[name]
    config = config_of(Point(model, layers, "qlora", "auto", tokens, 0), small=small)
    config |= {"max_position_embeddings": max(131072, tokens)}
    settings = dict(config)
    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
    tokens //= SHRINK if small else 1
    wish = Recipe.model_validate(
        {
            "model": str(folder),
            "data": {"train": "-", "seq_len": tokens},
            "method": "qlora",
            "strategy": "single",
            "limits": {"devices": 1} | ({} if small else {"memory_gb": CAP_GIB * GIB / 1e9, **pinned}),
            "train": {"global_batch_tokens": tokens * examples, "max_steps": 100, "learning_rate": 1e-5},
        }
    )
    machine = replace(probe(), devices=(), links=()) if small else probe()
    shape = ModelShape.from_config(config)
    plan = make_plan(wish, machine, shape, DataFacts(examples, examples * tokens, tokens))
    if small:  # on a CPU nothing needs to be moved: the same code is gone through all the same
        layout = replace(plan.layout, activations="offload")
        plan = replace(plan, chosen=replace(plan.chosen, layout=layout))
    return plan


def make_model(section: Any, layout: Any, seed: int, *_: Any) -> Any:
    """A model as `load_model` gives it, drawn and packed one weight after the other."""
    import torch
    from random_model import on_device

    from kitaeru.model import load

    config = load.load_config(section)
    torch.manual_seed(seed)
    dtype = load.DTYPES[layout.precision]
    how: Any = {"base": layout.base, "compute": dtype, "attention": load.attention_for(section, config)}
    return on_device(config, torch.device(layout.device), dtype=dtype, **how)


def measure(name: str, steps: int, *, small: bool) -> dict[str, Any]:
    """Plan, build, try and train one point; its row."""
    import torch

    from kitaeru.engine import build as engine
    from kitaeru.engine.loop import Loop
    from kitaeru.engine.preflight import preflight
    from kitaeru.events import Event, Notice, Step
    from kitaeru.model.tokenizer import load_tokenizer
    from kitaeru.plan.activations import PIECE_BYTES
    from kitaeru.recipe.types import ModelSection

    taken: list[Step] = []

    def hear(event: Event) -> None:
        if isinstance(event, Step):
            taken.append(event)
        if isinstance(event, Notice):
            print(f"{name}: {event.text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        plan = planned(name, Path(folder), small=small)
        print(f"{name}: {plan.layout.name}, {plan.chosen.peak_bytes / GIB:.2f} GiB predicted", flush=True)
        started = time.perf_counter()
        with mock.patch.object(engine, "load_model", make_model):
            trainee = engine.build(plan, load_tokenizer(ModelSection(name="bundled")), hear)
        loop = Loop(trainee, _corpus(plan, len(trainee.tokenizer)), None, Path(folder), {})
        if not small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        built = time.perf_counter()
        preflight(loop)
        tried = time.perf_counter()
        for _ in range(steps):
            loop._step()
    hosts = {id(layer.host): layer.host for layer in trainee.fused if layer.host is not None}
    seconds = statistics.median(step.seconds for step in taken)
    speed = plan.chosen.speed
    peak = taken[-1].peak_bytes if small else torch.cuda.max_memory_allocated()
    return {
        "point": name,
        "device": "cpu" if small else torch.cuda.get_device_name(),
        "kitaeru": __version__,
        "torch": torch.__version__,
        "layout": trainee.plan.layout.name,
        "tokens": taken[-1].tokens,
        "steps": steps,
        "seconds": round(seconds, 3),
        "predicted_seconds": "" if speed is None else round(speed.step_seconds, 3),
        "tokens_per_second": round(taken[-1].tokens / seconds, 1),
        "peak_gib": round(peak / GIB, 3),
        "predicted_gib": round(plan.chosen.peak_bytes / GIB, 3),
        "pinned_gb": round(sum(len(host.pieces) for host in hosts.values()) * PIECE_BYTES / 1e9, 2),
        "predicted_host_gb": round(plan.chosen.host_bytes / 1e9, 2),
        "process_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "build_seconds": round(built - started, 1),
        "preflight_seconds": round(tried - built, 1),
        "loss": round(taken[-1].loss, 4),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", nargs="*", default=["8b-100k", "34b-some", "34b-offload"], choices=list(POINTS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    assert {POINTS[name][0] for name in arguments.points} <= set(MODELS)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    from kitaeru.model.quiet import quiet_libraries

    quiet_libraries()
    small = arguments.device == "cpu"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.points:
        row = measure(name, arguments.steps, small=small)
        print(json.dumps(row), flush=True)
        append(arguments.out, [row], FIELDS)
        gc.collect()
        if not small:
            import torch

            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
