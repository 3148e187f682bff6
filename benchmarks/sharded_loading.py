"""RAM of two processes while FSDP or ZeRO-3 loads a model: a layer at a time, or whole in each, as it was before.

A random Llama-shaped model is written, and loaded by two CPU processes (gloo). A row says how much memory of its own a
process had at the most beyond what it had before (/proc, RssAnon, looked at every 5 ms), what it holds in the end, and
at the most until then `before_engine`: until DeepSpeed's engine, which makes copies of its own, was set up. The C
library keeps most of what is freed between pieces that stay; `mapped_from` is MALLOC_MMAP_THRESHOLD_, from which size
on it gives memory back at once: with 65536 a row says what is in use.

    python benchmarks/sharded_loading.py --out benchmarks/results/sharded-loading-cpu.csv
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from table import write
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.model import parts
from kitaeru.model.adapt import add_adapter
from kitaeru.model.load import load_model
from kitaeru.model.quiet import quiet_libraries
from kitaeru.parallel import strategy_of, zero
from kitaeru.parallel.types import Engine, Unit
from kitaeru.parallel.world import join, leave
from kitaeru.plan.deepspeed import deepspeed_config
from kitaeru.plan.types import Layout
from kitaeru.recipe.types import LoraSection, ModelSection, Recipe

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 8192, "num_hidden_layers": 24, "tie_word_embeddings": False,
}  # fmt: skip
FIELDS = (
    "strategy", "variant", "method", "way", "rank", "model_mb", "before_engine_mb", "peak_mb", "held_mb", "seconds",
    "mapped_from", "torch", "date",
)  # fmt: skip
CASES = (
    ("fsdp", "", "full", "whole"), ("fsdp", "", "full", "parts"), ("fsdp", "", "qlora", "parts"),
    ("zero3", "", "full", "whole"), ("zero3", "", "full", "parts"), ("zero3", "", "lora", "whole"),
    ("zero3", "", "lora", "parts"), ("zero3", "offload-all", "full", "parts"),
)  # fmt: skip


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(rank: int, model: str, strategy: str, variant: str, method: Any, way: str, store: str, out: str) -> None:
    """What one of two processes does."""
    quiet_libraries()
    torch.set_num_threads(1)
    world = join(dist.FileStore(store, 2), rank=rank, size=2, local_rank=rank, local_size=2, device="cpu")
    base: Any = "nf4" if method == "qlora" else "none"
    layout = Layout(strategy, method, base, "fp32", "keep", 128, "cpu", 2, variant, 2)
    section, lora = ModelSection(name=model), LoraSection(r=8)
    deepspeed = zero.library(layout) if strategy == "zero3" else None
    before, peak, going, until = own_bytes(), [0], [True], [0]

    def look() -> None:
        while going[0]:
            peak[0] = max(peak[0], own_bytes())
            time.sleep(0.005)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    began = time.perf_counter()
    if way == "whole":
        loaded, source = load_model(section, layout, 0), None
    else:
        loaded, source = parts.outline(section, layout, lora, 0)
    trained: Any = loaded
    loaded.requires_grad_(method == "full")
    if method != "full":
        trained = add_adapter(loaded, lora, 0)
    named = [(name, parameter) for name, parameter in trained.named_parameters() if parameter.requires_grad]
    engine = None
    if deepspeed is not None:
        recipe = Recipe.model_validate({"model": {"name": model}, "data": {"train": "none"}, "method": method})
        numbers = sum(parameter.numel() for _, parameter in named)

        def optimizer(named: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-4, fused=True)

        engine = Engine(deepspeed_config(layout, recipe, numbers), optimizer)
        set_up = deepspeed.initialize

        def initialize(**options: Any) -> Any:
            until[0] = peak[0]
            return set_up(**options)

        deepspeed.initialize = initialize
    held = strategy_of(layout).hold(Unit(trained, source, engine), named, world, layout)
    seconds = time.perf_counter() - began
    del loaded, trained
    going[0] = False
    watch.join()
    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    first = (until[0] or peak[0]) - before
    found = (size, first, peak[0] - before, own_bytes() - before)
    row = (strategy, variant or "-", method, way, rank, *found, round(seconds, 1))
    Path(out, str(rank)).write_text(" ".join(str(value) for value in row))
    assert held.unit is not None
    leave(world)


def main() -> None:
    """Every way in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose names, joined by -, contain this")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / "model")
    rows = []
    for case in (case for case in CASES if arguments.only in "-".join(case)):
        there = place / "-".join(case)
        there.mkdir()
        options = (str(place / "model"), *case, str(there / "store"), str(there))
        mp.start_processes(load, options, nprocs=2, start_method="spawn")
        for rank in range(2):
            values: list[Any] = (there / str(rank)).read_text().split()
            for number in (5, 6, 7, 8):
                values[number] = round(int(values[number]) / 1e6)
            rows.append(
                [*values, os.environ.get("MALLOC_MMAP_THRESHOLD_", "-"), torch.__version__, time.strftime("%Y-%m-%d")]
            )
            print(*rows[-1], flush=True)
    write(arguments.out, [dict(zip(FIELDS, row, strict=True)) for row in rows])
    shutil.rmtree(place)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
