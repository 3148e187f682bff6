"""One decoder layer of a real shape: the fused operation against PEFT's, in time, memory and numbers; and its kernels.

    python benchmarks/fused_layer.py --shape llama-3-8b --tokens 8192 --out benchmarks/results/fused-layer-h100.csv

Weights are random in NF4. Times are medians of CUDA events over whole passes of 4 layers, divided by 4; kernel times
come from torch's profiler over one of these passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from table import append
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from kitaeru.kernels import flash
from kitaeru.machine.measure import Bench
from kitaeru.model import attention
from kitaeru.model.fused import fused_layer, install

SHAPES = {
    "llama-3-8b": ("llama", 4096, 14336, 32, 8, 128),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 128),
    "codellama-34b": ("llama", 8192, 22016, 64, 8, 128),
    "qwen3-4b": ("qwen3", 2560, 9728, 32, 8, 128),
    "gemma-2-9b": ("gemma2", 3584, 14336, 16, 8, 256),
    "gemma-3-4b": ("gemma3_text", 2560, 10240, 8, 4, 256),
    "tiny": ("llama", 256, 704, 8, 4, 32),
    "tiny-gemma": ("gemma3_text", 256, 704, 8, 4, 32),
}
LAYERS = 4


def quantised(model: Any) -> None:
    """Turn every linear layer of the decoder into bitsandbytes' NF4, in place."""
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(child.weight.device))


def build(shape: str, device: str) -> tuple[Any, Any]:
    kind, hidden, wide, heads, kv, size = SHAPES[shape]
    config = AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=LAYERS, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=size, vocab_size=1024, max_position_embeddings=131072,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    quantised(model)
    model.requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.005)
    return model, adapted


def passes(
    model: Any, tokens: int, seq: int, device: str
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None], Tensor]:
    count = max(1, tokens // seq)
    length = min(seq, tokens)
    starts = torch.arange(count + 1, device=device, dtype=torch.int32) * length
    positions = torch.arange(length, device=device).repeat(count)[None]
    hidden = (torch.randn(1, count * length, model.config.hidden_size, device=device)).to(torch.bfloat16)
    hidden.requires_grad_()
    up = torch.randn_like(hidden) * 1e-3

    def forward() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            turns, config = model.model.rotary_emb, model.config
            kinds = config.layer_types if config.model_type == "gemma3_text" else [None] * LAYERS
            more = {kind: {"layer_type": kind} if kind else {} for kind in kinds}
            angles = {kind: turns(hidden, position_ids=positions, **more[kind]) for kind in more}
            x = hidden
            for kind, layer in zip(kinds, model.model.layers, strict=True):
                x = layer(
                    x, position_embeddings=angles[kind], position_ids=positions, cu_seq_lens_q=starts,
                    cu_seq_lens_k=starts, max_length_q=length, max_length_k=length,
                )  # fmt: skip
        return x

    return forward, lambda x: x.backward(up), hidden


def timed(forward: Callable[[], Tensor], backward: Callable[[Tensor], None], device: str) -> tuple[float, float]:
    """Median ms of the two passes of one layer."""
    ahead, back = [], []
    for _ in range(8):
        if device == "cpu":
            t0 = time.perf_counter()
            x = forward()
            t1 = time.perf_counter()
            backward(x)
            ahead.append((t1 - t0) * 1e3)
            back.append((time.perf_counter() - t1) * 1e3)
            continue
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        x = forward()
        marks[1].record()
        backward(x)
        marks[2].record()
        torch.cuda.synchronize()
        ahead.append(marks[0].elapsed_time(marks[1]))
        back.append(marks[1].elapsed_time(marks[2]))
    return statistics.median(ahead[3:]) / LAYERS, statistics.median(back[3:]) / LAYERS


def gradients(
    adapted: Any, hidden: Tensor, forward: Callable[[], Tensor], backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    hidden.grad = None
    adapted.zero_grad()
    x = forward()
    backward(x)
    assert hidden.grad is not None
    found = {n: p.grad.float().clone() for n, p in adapted.named_parameters() if p.grad is not None}
    return {"output": x.detach().float(), "input": hidden.grad.float().clone(), **found}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def attention_times(shape: str, tokens: int, seq: int) -> None:
    """cuDNN and flash with variable lengths, and cuDNN as a dense batch: ms of both passes, and how far apart."""
    _, _, _, heads, kv, size = SHAPES[shape]
    count = max(1, tokens // seq)
    qkv = torch.randn(count * seq, (heads + 2 * kv) * size, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.view(len(qkv), -1, size) for t in qkv.split([heads * size, kv * size, kv * size], 1))
    starts = torch.arange(count + 1, device="cuda", dtype=torch.int32) * seq
    up, scale = torch.randn(len(qkv), heads, size, device="cuda", dtype=torch.bfloat16), size**-0.5
    aten = torch.ops.aten

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [t.view(count, seq, -1, size).transpose(1, 2) for t in (q, k, v)]
        out = aten._cudnn_attention_forward(*parts, None, None, None, seq, seq, True, 0.0, True, False, scale=scale)[0]
        return out.transpose(1, 2).reshape(q.shape)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [t.view(count, seq, -1, size).transpose(1, 2) for t in (q, k, v)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)

    ways = {
        "flash": lambda *t: aten._flash_attention_forward(
            *t, starts, starts, seq, seq, 0.0, True, False, scale=scale
        )[0],
        "cudnn dense": dense,
        "cudnn dense, contiguous": lambda *t: dense(*(x.contiguous() for x in t)),
        "cudnn sdpa, contiguous": lambda *t: sdpa(*(x.contiguous() for x in t)),
        "cudnn dense, repeated": lambda q, k, v: dense(
            q, *(x.repeat_interleave(heads // kv, 1) for x in (k, v))),
    }  # fmt: skip
    first: tuple[Tensor, ...] | None = None
    for name, way in ways.items():
        try:
            for _ in range(6):
                leaves = [t.detach().requires_grad_() for t in (q, k, v)]
                a, b, c = (torch.cuda.Event(enable_timing=True) for _ in range(3))
                a.record()
                output = way(*leaves)
                b.record()
                seen = (output.detach(), *torch.autograd.grad(output, leaves, up))
                c.record()
                torch.cuda.synchronize()
            first = first or seen
            errors = [
                f"{float((x.float() - y.float()).norm() / y.float().norm()):.1e}"
                for x, y in zip(seen, first, strict=True)
            ]
            print(
                f"attention {name}: {a.elapsed_time(b):.3f} + {b.elapsed_time(c):.3f} ms, apart {errors}",
                [g.stride() for g in seen],
            )
        except Exception as error:
            print(f"attention {name}: {type(error).__name__}: {str(error)[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arithmetic", nargs="+", default=["peft", "16bit", "fp8", "int8"])
    parser.add_argument("--top", type=int, default=28, help="kernels shown")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    attention.register()
    device = arguments.device
    if device == "cuda":
        attention_times(arguments.shape, arguments.tokens, arguments.seq)
    model, adapted = build(arguments.shape, device)
    model.train()
    sights = tuple({attention.sight_of(model.config, layer): None for layer in range(LAYERS)})
    _, _, _, heads, kv, size = SHAPES[arguments.shape]
    shape, where = flash.Shape(heads, kv, size, size**-0.5, sights), torch.device(device)
    for tried in flash.settle(shape, where, Bench(where, 0.05, quick=True).time):
        print(f"{tried.title}: {1000 * tried.seconds:.2f} ms {tried.why}")
    reference, found = None, []
    for name in arguments.arithmetic:
        remove = []
        for layer in model.model.layers if name != "peft" else ():
            fused = fused_layer(layer, model.config, name, torch.bfloat16)
            fused.keep = name
            remove.append(install(layer, fused))
        torch.manual_seed(1)
        forward, backward, hidden = passes(model, arguments.tokens, arguments.seq, device)
        got = gradients(adapted, hidden, forward, backward)
        reference = reference or got
        row: dict[str, Any] = {
            "shape": arguments.shape, "tokens": arguments.tokens, "seq": arguments.seq, "arithmetic": name,
            "cosine_output": round(cosine(got["output"], reference["output"]), 5),
            "cosine_input": round(cosine(got["input"], reference["input"]), 5),
            "lowest_cosine": round(min(cosine(got[n], reference[n]) for n in reference), 5),
        }  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            kept = forward()
            row["kept_bytes_per_token"] = round((torch.cuda.memory_allocated() - before) / arguments.tokens / LAYERS)
            del kept
        row["forward_ms"], row["backward_ms"] = (round(t, 3) for t in timed(forward, backward, device))
        total = row["forward_ms"] + row["backward_ms"]
        row["microseconds_per_token_layer"] = round(total * 1e3 / arguments.tokens, 4)
        found.append(row)
        print(row, flush=True)
        if device == "cuda" and name != "peft":
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                backward(forward())
                torch.cuda.synchronize()
            events = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)
            print(f"  {name}: GPU busy {sum(e.device_time_total for e in events) / LAYERS / 1e3:.3f} ms a layer")
            for event in events[: arguments.top]:
                print(f"  {event.device_time_total / LAYERS:9.1f} us {event.count / LAYERS:5.1f} x  {event.key[:90]}")
        for take_off in remove:
            take_off()
    if arguments.out:
        append(arguments.out, found, found[-1])


if __name__ == "__main__":
    main()
