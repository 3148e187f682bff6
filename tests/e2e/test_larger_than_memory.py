"""A model of 170 MB answers, and is trained, in less memory than it takes, as the kernel counts it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import ctypes, gc, json, re, sys, threading, time
from pathlib import Path
import accelerate, bitsandbytes, peft, transformers
import kitaeru.engine.run
from kitaeru import JapaneseModel, LoRAConfig, LoRAFinetuningTrainer, TrainingConfig

model, small, folder = sys.argv[1:]
highest = 0
libc = ctypes.CDLL(None)

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global highest
    while True:
        highest = max(highest, resident())
        time.sleep(0.002)

def peak(work):
    global highest
    gc.collect()
    libc.malloc_trim(0)
    highest = resident()
    work()
    return highest

def train(model, ram):
    rows = [{"instruction": f"{i}番は?", "output": f"{i}です。"} for i in range(8)]
    limited = JapaneseModel(model, "cpu", offload_folder=folder, max_memory={"cpu": ram})
    recipe = {"samples.count": 0, "limits.micro_batch_tokens": 64, "limits.threads": 1, "track.tensorboard": False}
    config = TrainingConfig(max_steps=2, max_length=64, output_dir=folder + "/" + ram, recipe=recipe)
    return LoRAFinetuningTrainer(limited, LoRAConfig(r=4), config).train(rows).plan.layout.way

def answer(**more):
    one = JapaneseModel(model, "auto", **more)
    found.setdefault("said", []).append(one.generate("日本の", max_new_tokens=3))

threading.Thread(target=watch, daemon=True).start()
found = {}
train(small, "8GB")  # what the libraries take once
ways = found["ways"] = []
found["trained"] = [peak(lambda: ways.append(train(model, "1.33GB")))]
found["answered"] = [peak(lambda: answer(offload_folder=folder, max_memory={"cpu": "40MB"}))]
found["trained"].append(peak(lambda: ways.append(train(model, "9GB"))))
found["answered"].append(peak(answer))
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture
def large(tiny_model: Path, tmp_path: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(
        tiny_model, hidden_size=384, intermediate_size=1536, num_hidden_layers=20, num_attention_heads=6
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "large", max_shard_size="20MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "large")
    return tmp_path / "large"


def measured(large: Path, small: Path, folder: Path) -> dict[str, list[Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(large), str(small), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found: dict[str, list[Any]] = json.loads(Path("found.json").read_text())
    return found


def test_larger_than_memory(large: Path, tiny_model: Path, in_tmp: Path) -> None:
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    for attempt in ("first", "second"):  # the allocator keeps what was freed before as it likes: it may take two looks
        found = measured(large, tiny_model, in_tmp / f"offload-{attempt}")
        assert found["ways"] == ["single-disk", "single"]
        assert found["said"][0] == found["said"][1]
        # Training has more beside the weights, at another moment. That each layer is let go of is a unit test.
        spared = {what: found[what][1] - found[what][0] for what in ("answered", "trained")}
        if spared["answered"] > 0.6 * size and spared["trained"] > 0.25 * size:
            return
    pytest.fail(f"not enough memory is spared of {size}: {spared}")
