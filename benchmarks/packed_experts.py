"""One mixture's experts of a real shape: packed in 4 or 8 bits against transformers' in 16: time, memory, numbers.

    python benchmarks/packed_experts.py --shape mixtral-8x7b --tokens 4096 --out benchmarks/results/experts-h100.csv

Weights are random, and so is the choice of experts. `loop` computes one expert after the other, `grouped` uses torch's
grouped product where this device has it, `whole` is transformers' own module with 16-bit weights and PEFT's adapters.
Times are medians of both passes; `expanding` is what the four expansions of a step take alone; kept is what autograd
holds between the passes, peak what both passes take beside the weights (GPUs only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from table import append
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.kernels import experts as kernels
from kitaeru.model.experts import STACKS, Bits, PackedExperts, adapt_packed, fill

# E, k, f, h
SHAPES = {
    "mixtral-8x7b": (8, 2, 14336, 4096),
    "qwen3-30b-a3b": (128, 8, 768, 2048),
    "tiny": (4, 2, 128, 64),
}
REPEATS = 8


class Block(nn.Module):
    """What PEFT needs around a module of experts."""

    def __init__(self, experts: nn.Module, config: Any) -> None:
        super().__init__()
        self.experts, self.config = experts, config

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = self.experts(x, index, weights)
        return result


def whole_experts(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Transformers' module, with random weights."""
    count, k, f, h = SHAPES[shape]
    config = AutoConfig.for_model(
        "mixtral", hidden_size=h, intermediate_size=f, num_local_experts=count, num_experts_per_tok=k, vocab_size=64,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts: nn.Module = model.model.layers[0].mlp.experts
    experts.to_empty(device=device)
    for parameter in experts.parameters():
        parameter.data.normal_(0, parameter.shape[2] ** -0.5)
        parameter.requires_grad_(False)
    return experts


def packed_experts(whole: Any, bits: Bits) -> PackedExperts:
    """The same in few bits."""
    count, double, h = whole.gate_up_proj.shape
    with torch.device(whole.gate_up_proj.device):
        packed = PackedExperts(count, (double // 2, h), "silu", bits, whole.gate_up_proj.dtype)
    for name in STACKS:
        fill(packed, name, getattr(whole, name).data)
    return packed


def adapted(experts: nn.Module, r: int) -> Any:
    """With PEFT's adapters on both stacks; as it is with r = 0."""
    block: Any = Block(experts, {"model_type": "none"})
    if not r:
        return block
    config = LoraConfig(r=r, target_modules=[], target_parameters=[f"experts.{name}" for name in STACKS])
    tuned: Any = get_peft_model(block, adapt_packed(config))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.005)
    return tuned


def measured(block: Any, x: Tensor, index: Tensor, weights: Tensor, up: Tensor) -> dict[str, Any]:
    """Times of both passes, what they hold, the output and the gradient of x."""
    device, seconds, kept, peak = x.device, [], 0, 0
    output = gradient = x
    for _ in range(REPEATS):
        leaf = x.clone().requires_grad_()
        _wait(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            output = block(leaf, index, weights)
        _wait(device)
        middle = time.perf_counter()
        if device.type == "cuda":
            kept = torch.cuda.memory_allocated() - before
        output.backward(up)
        _wait(device)
        seconds.append((middle - start, time.perf_counter() - middle))
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        assert leaf.grad is not None
        gradient = leaf.grad
        block.zero_grad()
    ahead, back = (1e3 * statistics.median(side[i] for side in seconds[2:]) for i in (0, 1))
    return {
        "forward_ms": ahead,
        "backward_ms": back,
        "kept": kept,
        "peak": peak,
        "output": output,
        "gradient": gradient,
    }


def expanding(packed: PackedExperts) -> float:
    """Milliseconds for all experts of both stacks, in both passes, one after the other."""
    times, device = [], packed.stack(STACKS[0]).data.device
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        for name in STACKS:
            stack = packed.stack(name)
            for expert in range(packed.num_experts):
                stack.expanded(expert, 1, packed.compute)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2e3 * statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def apart(a: Tensor, b: Tensor) -> float:
    """The distance as a share of b's size."""
    return float((a - b).float().norm() / b.float().norm())


def main() -> None:
    """Measure and print; add to the CSV if one is named."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    ask.add_argument("--tokens", type=int, default=4096)
    ask.add_argument("--rank", type=int, default=16, help="of the adapters on the experts; 0: none")
    ask.add_argument("--out", type=Path)
    asked = ask.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count, k, _, h = SHAPES[asked.shape]
    torch.manual_seed(0)
    whole = whole_experts(asked.shape, device, dtype)
    x = torch.randn(asked.tokens, h, device=device, dtype=dtype)
    index = torch.rand(asked.tokens, count, device=device).argsort(1)[:, :k].contiguous()
    weights = torch.rand(asked.tokens, k, device=device).softmax(1)
    up = torch.randn_like(x) * 1e-3
    stored: dict[str, PackedExperts] = {bits: packed_experts(whole, bits) for bits in ("nf4", "int8")}
    found: dict[str, dict[str, Any]] = {}
    grouped: Callable[..., bool] = kernels._grouped
    for bits, module in stored.items():
        takes = expanding(module)
        kernels._grouped = lambda *_: False
        found[f"{bits} loop"] = measured(adapted(module, asked.rank), x, index, weights, up) | {"expanding_ms": takes}
        kernels._grouped = grouped
        if grouped(x, count, h, 2 * SHAPES[asked.shape][2]):
            found[f"{bits} grouped"] = measured(
                adapted(packed_experts(whole, "nf4" if bits == "nf4" else "int8"), asked.rank), x, index, weights, up
            )
    found["whole"] = measured(adapted(whole, asked.rank), x, index, weights, up)
    rows = []
    for name, row in found.items():
        held: Any = whole if name == "whole" else stored[name.split()[0]]
        size = sum(t.nbytes for n, t in (*held.named_parameters(), *held.named_buffers()) if "lora" not in n)
        row |= {
            "output": apart(row["output"], found["whole"]["output"]),
            "gradient": apart(row["gradient"], found["whole"]["gradient"]),
        }
        numbers = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        rows.append({"device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "torch": torch.__version__,
                     "shape": asked.shape, "tokens": asked.tokens, "rank": asked.rank, "way": name, "weights": size,
                     "expanding_ms": "", **numbers})  # fmt: skip
        print(rows[-1])
    if asked.out is not None:
        append(asked.out, rows)


if __name__ == "__main__":
    main()
