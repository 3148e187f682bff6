"""Full training with weights, gradients and moments in RAM: tokens/s, peak on the device and RAM, beside the plan's.

A Llama-shaped model of real sizes with random weights, made on the device as its layers are asked for, so that nothing
is read or written but the result. The plan, the build and the loop are kitaeru's own; no checkpoint is saved.

    python benchmarks/full_from_ram.py --out benchmarks/results/full-from-ram.csv --cap 24
    python benchmarks/full_from_ram.py --out benchmarks/results/full-from-ram-cpu.csv --shape 1b --layers 8 --tokens 512

`--update` times only the optimizer's step in RAM, on so many million weights, beside torch's and DeepSpeed's.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from table import append
from transformers import AutoConfig, AutoModelForCausalLM

import kitaeru
from kitaeru.data.prepare import prepare
from kitaeru.engine.build import build
from kitaeru.engine.loop import Loop
from kitaeru.engine.optim import build_optimizer
from kitaeru.engine.preflight import preflight
from kitaeru.events import Event, Notice, Preflight, Step
from kitaeru.machine.probe import host_memory, probe
from kitaeru.model.bundled import bundled_folder
from kitaeru.model.parts import Parts
from kitaeru.model.quiet import quiet_libraries
from kitaeru.model.tokenizer import load_tokenizer
from kitaeru.plan.choose import make_plan
from kitaeru.recipe.types import Recipe, TrainSection
from kitaeru.shape import ModelShape

USUAL = {
    "max_position_embeddings": 8192, "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "head_dim": 64, "vocab_size": 32000},
}  # fmt: skip
FIELDS = (
    "shape", "layers", "parameters", "device", "cores", "cap_gb", "layout", "optimizer", "tokens_per_step", "steps",
    "tokens_per_second", "planned_tokens_per_second", "planned_low", "planned_high", "seconds_per_step",
    "optimizer_seconds", "peak_gb", "planned_peak_gb", "ram_gb", "planned_ram_gb", "build_seconds",
    "preflight_seconds", "losses", "torch", "date",
)  # fmt: skip


class Watch(threading.Thread):
    """The most memory that this process had of its own (/proc, RssAnon), looked at twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        """Look."""
        while True:
            self.most = max(self.most, own_bytes())
            time.sleep(0.05)


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def outline_of(args: argparse.Namespace, work: Path) -> tuple[Path, ModelShape]:
    """A model's folder without weights, and its shape."""
    folder = work / f"{args.shape}-{args.layers or 'all'}"
    folder.mkdir(parents=True, exist_ok=True)
    values = USUAL | SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    AutoConfig.for_model("llama", **values).save_pretrained(folder)
    for file in bundled_folder().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    return folder, ModelShape.from_config(config, args.shape)


def texts(work: Path) -> Path:
    """Long Japanese texts, of what comes with kitaeru."""
    source = Path(kitaeru.__file__).parent / "assets" / "quickstart" / "train.jsonl"
    whole = source.read_text(encoding="utf-8")
    file = work / "texts.jsonl"
    parts = [whole[start : start + 6000] for start in range(0, len(whole), 6000)]
    file.write_text("".join(json.dumps({"text": part}, ensure_ascii=False) + "\n" for part in parts), encoding="utf-8")
    return file


def random_parts(folder: Path, device: torch.device) -> None:
    """Let the layers' weights be drawn instead of read: the same names and shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}

    def read(self: Parts, number: int) -> dict[str, torch.Tensor]:
        own, edge = f"{self.prefix}.{number}.", number in (0, len(self.layers) - 1)
        drawn = torch.Generator(device).manual_seed(number)
        found = {}
        for name, shape in shapes.items():
            if name.startswith(own) or (edge and not name.startswith(f"{self.prefix}.")):
                empty = torch.empty(shape, device=device)
                found[name] = empty.fill_(1.0) if len(shape) == 1 else empty.normal_(0, 0.02, generator=drawn)
        for name, (module, kept) in self.owners.items():  # rotary tables
            if kept in module._buffers and edge:
                found[name] = module._buffers[kept].to(device)
        return found

    Parts.read = read  # type: ignore[method-assign]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Some steps of one point; its row."""
    work, watch = args.work, Watch()
    work.mkdir(parents=True, exist_ok=True)
    folder, shape = outline_of(args, work)
    hardware = probe()
    on_gpu = bool(hardware.devices)
    limits: dict[str, Any] = {"variant": "offload", "checkpointing": True}
    if on_gpu and args.cap:
        limits["memory_gb"] = args.cap
    if args.micro:
        limits["micro_batch_tokens"] = args.micro
    if not on_gpu:
        limits |= {"device": "cpu", "devices": 1}
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"train": str(texts(work)), "seq_len": min(2048, args.tokens), "workers": 1},
            "method": "full",
            "strategy": "single",
            "train": {
                "max_steps": 1000, "global_batch_tokens": args.tokens, "learning_rate": 1e-5,
                "optimizer": args.optimizer,
            },
            "limits": limits,
        }
    )  # fmt: skip
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe, tokenizer, seq_len=min(2048, args.tokens), bad_rows=None)
    plan = make_plan(recipe, hardware, shape, data.facts)
    chosen, speed = plan.chosen, plan.chosen.speed
    print(*chosen.why, sep="\n", flush=True)
    events: list[Event] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step | Notice | Preflight):
            print(f"{time.strftime('%X')} RAM {own_bytes() / 1e9:.1f} GB  {event}"[:300], flush=True)

    random_parts(folder, torch.device("cuda" if on_gpu else "cpu"))
    began = time.perf_counter()
    trainee = build(plan, tokenizer, hear, lambda title: print(time.strftime("%X"), title, flush=True))
    built = time.perf_counter()
    loop = Loop(trainee, data.train, None, work, {})
    preflight(loop)
    tried = time.perf_counter()
    updates: list[float] = []
    trainee.optimizer.register_step_pre_hook(lambda *_: updates.append(-time.perf_counter()))
    trainee.optimizer.register_step_post_hook(lambda *_: updates.append(updates.pop() + time.perf_counter()))
    times, peak = [], 0
    while loop.progress.step < args.steps:
        begin = time.perf_counter()
        loop._step()
        times.append(time.perf_counter() - begin)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    steps = [event for event in events if isinstance(event, Step)]
    times = times[2:] or times  # in the first two every gradient is looked at
    best = sorted(times)[len(times) // 2]
    tokens = sorted(step.tokens for step in steps)[len(steps) // 2]
    ours = chosen.host_bytes if on_gpu else sum(chosen.memory.values())
    assert speed is not None
    return {
        "shape": args.shape, "layers": shape.layers, "parameters": shape.parameters(),
        "device": hardware.devices[0].name if on_gpu else hardware.cpu_name, "cores": hardware.cpu_cores,
        "cap_gb": args.cap if on_gpu else "", "layout": chosen.layout.name,
        "optimizer": plan.recipe.train.optimizer, "tokens_per_step": args.tokens, "steps": len(steps),
        "tokens_per_second": round(tokens / best, 1), "planned_tokens_per_second": round(speed.tokens_per_second, 1),
        "planned_low": round(speed.low, 1), "planned_high": round(speed.high, 1), "seconds_per_step": round(best, 2),
        "optimizer_seconds": round(sorted(updates)[len(updates) // 2], 2), "peak_gb": round(peak / 1e9, 2),
        "planned_peak_gb": round(chosen.peak_bytes / 1e9, 2), "ram_gb": round(watch.most / 1e9, 2),
        "planned_ram_gb": round(ours / 1e9, 2), "build_seconds": round(built - began, 1),
        "preflight_seconds": round(tried - built, 1), "losses": " ".join(f"{step.loss:.4f}" for step in steps),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def update(millions: int) -> None:
    """Seconds of one step of each optimizer, and the rate at which it moves the bytes it must."""
    count = millions * 10**6
    print(f"{count:,} weights, {torch.get_num_threads()} threads")
    ways = [("adamw", 28), ("adamw_16bit", 20)]
    weight = torch.nn.Parameter(torch.randn(count))
    weight.grad = torch.randn(count) * 1e-3
    for _ in range(2):
        began = time.perf_counter()
        weight.grad.add_(weight.data, alpha=1e-9)
        seconds = time.perf_counter() - began
    print(f"adding in place: {12 * count / seconds / 1e9:.1f} GB/s")
    for name, moved in ways:
        section = TrainSection(optimizer=name)  # type: ignore[arg-type]
        made = build_optimizer(
            [("weight", weight)], section, learning_rate=1e-5, lora_plus_ratio=None, device_type="cpu"
        )
        _timed(name, made, count, moved)
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        _timed("deepspeed", DeepSpeedCPUAdam([weight], lr=1e-5), count, 28)
    except Exception as error:  # it is compiled when first used
        print(f"deepspeed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _timed(name: str, optimizer: torch.optim.Optimizer, count: int, moved: int) -> None:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    best = min(times[1:])
    rate = moved * count / best / 1e9
    print(f"{name}: {best:.3f} s, {best / count * 1e9:.3f} ns a weight, {rate:.1f} GB/s at {moved} bytes a weight")
    optimizer.state.clear()


def main() -> None:
    """Measure and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/full-from-ram"))
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--cap", type=float, default=24.0, help="GB of the device")
    parser.add_argument("--tokens", type=int, default=16384, help="of one step")
    parser.add_argument("--micro", type=int, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optimizer", default="auto")
    parser.add_argument("--update", type=int, metavar="MILLIONS")
    args = parser.parse_args()
    quiet_libraries()
    if args.update:
        update(args.update)
        return
    print(f"{host_memory()[1] / 1e9:.0f} GB of RAM are free", flush=True)
    row = train(args)
    print(json.dumps(row, indent=1))
    if args.out:
        append(args.out, [row], FIELDS)


if __name__ == "__main__":
    main()
