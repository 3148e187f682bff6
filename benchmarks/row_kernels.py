"""Time the fused layer's row kernels and its expanding kernel, in FP8 and INT8, beside a copy on the same GPU.

    python benchmarks/row_kernels.py --tiles --out benchmarks/results/row-kernels.csv

Shapes are those of a Llama-3-8B layer. Microseconds are the GPU's own, from torch's profiler; bytes are what each
kernel must read and write once; `of_copy` is how near its bytes a second come to those of a large copy. `off` is how
far its 8-bit numbers lie from the reference's, as a share of their size, over 64 tokens. `--tiles` also tries other
tiles of the gate. Runs on a CPU too (the references, with `--tokens 16`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from table import append
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kitaeru.kernels import frozen, gated, norm, rotary, rows
from kitaeru.kernels.rows import Rows

HIDDEN, WIDE, HEADS, KV, SIZE = 4096, 14336, 32, 8, 128
TILES = ((1024, 2), (2048, 4), (4096, 8), (8192, 16), (8192, 8), (16384, 32), (16384, 16))


def microseconds(work: Callable[[], object], device: str) -> float:
    """Mean of 10 after 3 on a GPU; on a CPU of one."""
    if device == "cpu":
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e6
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(10):
            work()
        torch.cuda.synchronize()
    return float(sum(event.device_time_total for event in seen.key_averages())) / 10


def copy_speed(device: str) -> float:
    """Bytes a microsecond that a copy reads and writes."""
    source = torch.empty(1 << (28 if device != "cpu" else 22), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / microseconds(lambda: target.copy_(source), device)


def tensors(results: Any) -> list[Tensor]:
    """The 8-bit numbers of a kernel's results, without an adapter's columns."""
    if isinstance(results, Rows):
        return [results.data[:, : results.width]] if results.scale is not None else []
    if isinstance(results, gated.Kept):
        return tensors((results.gate, results.up))
    if isinstance(results, norm.Normed):
        return tensors(results.rows)
    if isinstance(results, tuple):
        return [tensor for each in results for tensor in tensors(each)]
    return [results] if isinstance(results, Tensor) and results.dtype.itemsize == 1 else []


def off(ours: Any, theirs: Any) -> float:
    """The largest distance between two kernels' 8-bit numbers."""
    pairs = zip(tensors(ours), tensors(theirs), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)) for a, b in pairs)


def kernels(dtype: torch.dtype, tokens: int, device: str) -> dict[str, tuple[Callable[..., Any], Any, int]]:
    """By name: kernel and reference (as functions of how many tokens), and bytes a token (of a weight: in all)."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, delta, along, weight = draw(tokens, HIDDEN), draw(tokens, HIDDEN), draw(tokens, HIDDEN), draw(HIDDEN)
    both, up = draw(tokens, 2 * WIDE), draw(tokens, WIDE)
    heads = rotary.Heads(HEADS, KV, SIZE)
    qkv, gradients = draw(tokens, heads.width), heads.split(draw(tokens, heads.width))
    angles = torch.randn(tokens, SIZE // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    _, y, rstd = norm.norm(x, None, weight, 1e-5, dtype, 0)
    _, kept = gated.gated(both, "silu", dtype, 0, dtype)
    packed = torch.randint(256, (WIDE * HIDDEN // 2, 1), device=device).byte()
    absmax, code = torch.rand(WIDE * HIDDEN // 64, device=device), torch.linspace(-1, 1, 16, device=device)
    stored = frozen.Weights((frozen.Stored("nf4", (WIDE, HIDDEN), packed, absmax, code),))
    scales = frozen.scales_of(stored, dtype)

    def rounded(values: Tensor) -> Rows:
        return rows.put_rows(values, rows.empty_rows(len(values), values.shape[1], 0, dtype, values))

    def part(n: int) -> gated.Kept:
        return gated.Kept(kept.gate.part(slice(n)), kept.up.part(slice(n)))

    def expanding(way: Callable[..., Tensor], transposed: bool) -> Callable[[int], Tensor]:
        scale = scales.backward if transposed else scales.forward
        return lambda _: way(stored, scale, None, 0, dtype, transposed=transposed)

    def pair(way: Any, reference: Any, *arguments: Any) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
        def run(function: Any) -> Callable[[int], Any]:
            return lambda n: function(*(a(n) if callable(a) else a for a in arguments))

        return run(way), run(reference)

    def cut(tensor: Tensor) -> Callable[[int], Tensor]:
        return lambda n: tensor[:n]

    whole = WIDE * HIDDEN * 25 // 16
    return {
        "round": (*pair(rows.round_rows, lambda v, _: rounded(v), cut(x), dtype), 3 * HIDDEN),
        "norm": (*pair(norm.norm, norm.norm_reference, cut(x), cut(delta), weight, 1e-5, dtype, 0), 7 * HIDDEN),
        "norm_backward": (
            *pair(norm.norm_backward, norm.norm_backward_reference, cut(delta), lambda n: y.part(slice(n)), cut(rstd),
                  weight, cut(along), dtype, 0), 8 * HIDDEN),
        "norm_sandwich": (
            *pair(norm.sandwich, norm.sandwich_reference, cut(x), cut(delta), weight, dtype, weight, 1e-5, dtype, 0),
            8 * HIDDEN),
        "norm_backward_sandwich": (
            *pair(norm.norm_backward, norm.norm_backward_reference, cut(delta), lambda n: y.part(slice(n)), cut(rstd),
                  weight, None, dtype, 0), 4 * HIDDEN),
        "gated": (*pair(gated.gated, gated.gated_reference, cut(both), "silu", dtype, 0, dtype), 7 * WIDE),
        "gated_gelu": (*pair(gated.gated, gated.gated_reference, cut(both), "gelu_tanh", dtype, 0, dtype), 7 * WIDE),
        "gated_backward": (
            *pair(gated.gated_backward, gated.gated_backward_reference, cut(up), part, "silu", dtype, 0), 7 * WIDE),
        "rotate_backward": (
            *pair(rotary.rotate_backward, rotary.rotate_backward_reference, *(cut(g) for g in gradients), cut(qkv),
                  None, cut(cos), cut(sin), heads, dtype, 0), 3 * heads.width),
        "expand": (expanding(frozen.expand, False), expanding(frozen.expand_reference, False), whole),
        "expand_transposed": (expanding(frozen.expand, True), expanding(frozen.expand_reference, True), whole),
    }  # fmt: skip


def tiled(tile: tuple[int, int], _: int, **__: bool) -> dict[str, int]:
    """In place of `gated.tile`."""
    return {"BLOCK": tile[0], "num_warps": tile[1], "num_stages": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--arithmetic", nargs="+", choices=("fp8", "int8"))
    parser.add_argument("--tiles", action="store_true", help="try other tiles of the gate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, tokens = arguments.device, arguments.tokens
    cuda = device != "cpu"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    capable = not cuda or torch.cuda.get_device_capability() >= (8, 9)
    copied = copy_speed(device)
    print(f"{name}: a copy moves {copied / 1e3:.0f} GB/s")
    found = []
    chosen = gated.tile
    for arithmetic in arguments.arithmetic or (("fp8", "int8") if capable else ("int8",)):
        dtype = rows.storage(arithmetic, torch.bfloat16)
        for kernel, (work, reference, each) in kernels(dtype, tokens, device).items():
            gate = kernel.startswith("gated")
            few, size = min(64, tokens), each * (1 if kernel.startswith("expand") else tokens)
            expected = reference(few)
            for tile in (None, *(TILES if arguments.tiles and gate and cuda else ())):
                if tile:
                    gated.tile = partial(tiled, tile)
                spent = microseconds(partial(work, tokens), device)
                row = {
                    "device": name, "kernel": kernel, "arithmetic": arithmetic, "tokens": tokens,
                    "tile": "x".join(map(str, tile)) if tile else "chosen", "microseconds": round(spent, 1),
                    "gb_per_second": round(size / spent / 1e3), "of_copy": round(size / spent / copied, 2),
                    "off": float(f"{off(work(few), expected):.1e}"),
                }  # fmt: skip
                found.append(row)
                print(row, flush=True)
            gated.tile = chosen
    if arguments.out:
        append(arguments.out, found, found[-1])


if __name__ == "__main__":
    main()
