"""Rates of one device, measured hot: products, attention, memory, unpacking, copies, launches.

What is timed is what training runs: torch's products, kitaeru's packed attention, chains of eager kernels,
bitsandbytes' unpacking. A kind of arithmetic that the device or this torch does not have is left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kitaeru.kernels.packed_attention import attend, packed_attention
from kitaeru.machine.nvml import NoDriver, ask, opened
from kitaeru.plan.calibrate import ATTENTION, AttentionKind, DeviceProfile, Products

TERA, GIGA = 1e12, 1e9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
RANK = 16
# Rows of a product that an adapter, an expert and a chain of small kernels are measured with.
GPU_ROWS, CPU_ROWS = 8192, 512
# Rows and widths of the products measured.
GPU_SIZES: tuple[tuple[int, ...], tuple[int, ...]] = (512, 2048, 8192), (1024, 2048, 4096, 8192)
CPU_SIZES: tuple[tuple[int, ...], tuple[int, ...]] = (64, 512), (512, 1024)
VIEWS = ("view", "reshape", "transpose", "t.", "unsqueeze", "squeeze", "expand", "detach", "slice", "select", "permute")


@dataclass(frozen=True)
class Bench:
    """A device to measure, and how thoroughly: seconds for each number."""

    device: torch.device
    seconds: float
    quick: bool

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def rows(self) -> int:
        """Rows (tokens) that keep it busy."""
        return GPU_ROWS if self.on_gpu else CPU_ROWS

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of training on it: 16 bits on a GPU, 32 on a CPU."""
        if not self.on_gpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(self.device) >= (8, 0) else torch.float16

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds of one call: the median of blocks of calls, each long enough for the clock."""
        function()
        self._wait()
        once = max(1e-7, self._block(function, 1))
        count = max(1, int(self.seconds / 5 / once))
        blocks = max(1, min(5, int(self.seconds / (count * once))))
        return statistics.median(self._block(function, count) / count for _ in range(blocks))

    def _block(self, function: Callable[[], Any], count: int) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            for _ in range(count):
                function()
            return time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            first.record()
            for _ in range(count):
                function()
            last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers on the device: a GPU is slower with them than with zeros."""
        return torch.randn(*shape, device=self.device).to(dtype)


def _short(value: float) -> float:
    """Four digits: more are noise."""
    return float(f"{value:.4g}")


# --- products ---------------------------------------------------------------------------------------------------------


def products(bench: Bench) -> dict[str, Any]:
    """TFLOP/s of products by arithmetic, rows and width; of an adapter's; of experts'."""
    kinds = ("bf16", "fp16", "tf32", "fp32", "fp8", "int8") if bench.on_gpu else ("bf16", "fp32")
    rows, widths = GPU_SIZES if bench.on_gpu else CPU_SIZES
    usual = _usual(bench)
    found: dict[str, dict[tuple[float, ...], float]] = {}
    for kind in kinds:
        # One size is all that an arithmetic gets in which nothing is trained by default, when time is short.
        few = bench.quick and kind not in usual
        for m in rows[-1:] if few else rows:
            for width in widths[-2:-1] if few else widths:
                rate = _product(bench, kind, m, width)
                if rate:
                    found.setdefault(kind, {})[float(m), float(width)] = _short(rate)
    return {"products": found, "skinny_tflops": _skinny(bench), "grouped_tflops": _grouped(bench)}


def _usual(bench: Bench) -> tuple[str, ...]:
    """The arithmetic of training on the device, and its 8 bits."""
    if not bench.on_gpu:
        return ("fp32", "bf16")
    capability = torch.cuda.get_device_capability(bench.device)
    return ("bf16" if bench.dtype == torch.bfloat16 else "fp16", "fp8" if (9, 0) <= capability < (12, 0) else "int8")


def _product(bench: Bench, kind: str, m: int, width: int) -> float:
    flops = 2 * m * width * width
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        return flops / bench.time(_multiply(bench, kind, m, width)) / TERA
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):  # not on this device or in this torch
        return 0.0
    finally:
        torch.set_float32_matmul_precision(before)


def _multiply(bench: Bench, kind: str, m: int, width: int) -> Callable[[], Tensor]:
    if kind == "int8":
        a = torch.randint(-99, 99, (m, width), dtype=torch.int8, device=bench.device)
        b = torch.randint(-99, 99, (width, width), dtype=torch.int8, device=bench.device)
        return lambda: torch._int_mm(a, b.t())
    if kind == "fp8":
        x, w = (bench.numbers(*size, dtype=torch.float8_e4m3fn) for size in ((m, width), (width, width)))
        rows, columns = torch.ones(m, 1, device=bench.device), torch.ones(1, width, device=bench.device)
        return lambda: torch._scaled_mm(
            x, w.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    left, right = (bench.numbers(*size, dtype=DTYPES[kind]) for size in ((m, width), (width, width)))
    return lambda: F.linear(left, right)


def _skinny(bench: Bench) -> float:
    """An adapter's two products."""
    width = 4096 if bench.on_gpu else 512
    x = bench.numbers(bench.rows, width, dtype=bench.dtype)
    a, b = (bench.numbers(*size, dtype=bench.dtype) for size in ((RANK, width), (width, RANK)))
    return _short(4 * bench.rows * RANK * width / bench.time(lambda: F.linear(F.linear(x, a), b)) / TERA)


def _grouped(bench: Bench) -> float:
    """Eight experts' product of equal shares of the rows; 0 where torch has none for this device."""
    if not bench.on_gpu or not hasattr(torch, "_grouped_mm"):
        return 0.0
    experts, width = 8, 4096
    try:
        x = bench.numbers(bench.rows, width, dtype=torch.bfloat16)
        w = bench.numbers(experts, width, width, dtype=torch.bfloat16).transpose(-2, -1)
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=bench.device) * (bench.rows // experts)
        seconds = bench.time(lambda: torch._grouped_mm(x, w, offs=ends))
    except RuntimeError:
        return 0.0
    return _short(2 * bench.rows * width * width / seconds / TERA)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(bench: Bench) -> dict[str, Any]:
    """TFLOP/s of packed causal attention by the examples' length, forward and backward: of a model's own layers, of
    fused ones, and of these with examples of one length.
    """
    lengths = (512, 2048, 8192) if bench.on_gpu else (128, 512)
    found: dict[str, dict[tuple[float, ...], float]] = {}
    for kind in ATTENTION if bench.on_gpu else ATTENTION[:1]:
        for length in lengths:
            forward, backward = _attention(bench, kind, length, max(lengths[-1], bench.rows))
            found.setdefault(f"{kind}_forward", {})[float(length),] = _short(forward)
            found.setdefault(f"{kind}_backward", {})[float(length),] = _short(backward)
    return found


def _attention(bench: Bench, kind: AttentionKind, length: int, tokens: int) -> tuple[float, float]:
    heads, size = (32, 128) if bench.on_gpu else (8, 64)
    row = (tokens, heads, size)
    q, k, v = (bench.numbers(*row, dtype=bench.dtype).requires_grad_() for _ in range(3))
    bounds = list(range(0, tokens, length))
    if kind == "fused" and len(bounds) > 1:  # the first example a token longer, the second one shorter
        bounds[1] += 1
    starts = torch.tensor([*bounds, tokens], dtype=torch.int32, device=bench.device)
    longest = length + (kind == "fused")

    def ahead() -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and the leaves of the graph behind it."""
        if kind == "attention":
            own = (t.transpose(0, 1)[None] for t in (q, k, v))
            return packed_attention(next(own), next(own), next(own), starts, longest), (q, k, v)
        done = attend(q, k, v, starts, longest, size**-0.5)
        return done.output, done.inputs

    output, leaves = ahead()
    upstream = torch.randn_like(output)
    flops = 4 * heads * size * (length / 2) * tokens
    backward = bench.time(lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True))
    return flops / bench.time(ahead) / TERA, 2.5 * flops / backward / TERA


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> dict[str, Any]:
    """GB/s of one large kernel and of a chain of small ones, counted as each reading its inputs and writing its result;
    of the host's memory under an optimizer.
    """
    count = (1 << 27) if bench.on_gpu else (1 << 23)
    a, b = bench.numbers(count), bench.numbers(count)
    stream = 12 * count / bench.time(lambda: torch.add(a, b, out=a))
    width = 4096 if bench.on_gpu else 512
    x, y = (bench.numbers(bench.rows, width, dtype=bench.dtype) for _ in range(2))
    weight = bench.numbers(width, dtype=bench.dtype)

    def chain() -> Tensor:
        wide = x.float()
        squares = wide.pow(2)
        scaled = wide * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6)
        normed = weight * scaled.to(x.dtype)
        return x + F.silu(normed) * y

    # Bytes a number: square 4+4, mean 4, scale 4+4; in its own width w weight, silu, product and sum; two casts.
    w = x.element_size()
    eager = (20 + 10 * w + (2 * (4 + w) if w == 2 else 0)) * x.numel() / bench.time(chain)
    return {
        "stream_gb_s": _short(stream / GIGA),
        "eager_gb_s": _short(eager / GIGA),
        "host_memory_gb_s": host_memory_gb_s(bench),
    }


def host_memory_gb_s(bench: Bench) -> float:
    """GB/s of RAM while AdamW updates weights there: 28 bytes a number (weight, gradient, moments)."""
    count = 1 << 24 if bench.on_gpu else 1 << 20
    weight = nn.Parameter(torch.zeros(count))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    return _short(28 * count / Bench(torch.device("cpu"), bench.seconds, bench.quick).time(optimizer.step) / GIGA)


def unpacking(bench: Bench) -> dict[str, Any]:
    """GB/s of bitsandbytes' NF4 unpacking; nothing where bitsandbytes does not work."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        rows, columns = (14336, 4096) if bench.on_gpu else (512, 1024)
        weight = bench.numbers(rows, columns, dtype=bench.dtype)
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        seconds = bench.time(lambda: dequantize_4bit(packed, state))
    except Exception:  # no library, or one without a kernel for this device: the table's rate stays
        return {}
    return {"dequantise_gb_s": _short(2.5 * rows * columns / seconds / GIGA)}


def copies(bench: Bench, together: int = 1) -> dict[str, Any]:
    """GB/s one way of pinned copies, the slower of the two ways: of this GPU alone, and of `together` GPUs at once."""
    if not bench.on_gpu:
        return {}
    alone = _copied(bench, [bench.device])
    every = _copied(bench, [torch.device("cuda", index) for index in range(together)]) if together > 1 else alone
    return {"host_copy_alone_gb_s": alone, "host_copy_gb_s": every}


def _copied(bench: Bench, devices: list[torch.device]) -> float:
    size = 256 << 20
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in devices]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for device in devices]

    def go(down: bool) -> None:
        for host, on_device in zip(pinned, there, strict=True):
            (host if down else on_device).copy_(on_device if down else host, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)

    slowest = 0.0
    for down in (False, True):
        go(down)
        started, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - started < bench.seconds:
            go(down)
            count += 1
        slowest = max(slowest, (time.perf_counter() - started) / count)
    return _short(size / slowest / GIGA)


# --- launches ---------------------------------------------------------------------------------------------------------


def launches(bench: Bench) -> dict[str, Any]:
    """Seconds of the host for one operation of a model: of a tiny one, forward and backward, with no work in it."""
    model = nn.Sequential(*(_Block() for _ in range(4))).to(bench.device)
    x = bench.numbers(1, 16, 64)

    def step() -> None:
        model(x).sum().backward()

    with _Counted() as counted:
        step()
    started, count = time.perf_counter(), 0
    while count < 5 or time.perf_counter() - started < 2 * bench.seconds:
        step()
        count += 1
    if bench.on_gpu:
        torch.cuda.synchronize(bench.device)
    return {"operation_seconds": _short((time.perf_counter() - started) / count / counted.count)}


class _Block(nn.Module):
    """What a layer is made of, in the way that a model's code writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.qkv = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))
        self.mlp = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))

    def norm(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).view(1, 16, 4, 16).transpose(1, 2) for layer in list(self.qkv)[:3])
        q, k = q * 0.5 + q.roll(1, -1) * 0.5, k * 0.5 + k.roll(1, -1) * 0.5
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.qkv[3](seen.transpose(1, 2).reshape(1, 16, 64))
        h = self.norm(x)
        return x + self.mlp[2](F.silu(self.mlp[0](h)) * self.mlp[1](h))  # type: ignore[no-any-return]


class _Counted(TorchDispatchMode):
    """Counts operations, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(str(func).startswith(f"aten.{name}") for name in VIEWS):
            self.count += 1
        return func(*args, **(kwargs or {}))


# --- the whole --------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "products": products,
    "attention": attention,
    "memory": memory,
    "unpacking": unpacking,
    "copies": copies,
    "launches": launches,
}


def heat(bench: Bench, seconds: float) -> dict[str, float]:
    """Keep the device busy until its clock is what hours of training leave it; the clocks before and after."""
    width = 8192 if bench.on_gpu else 512
    a, b = (bench.numbers(width, width, dtype=bench.dtype) for _ in range(2))
    cold = clocks(bench)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(8):
            F.linear(a, b)
        bench._wait()
    return {f"cold_{k}": v for k, v in cold.items()} | {f"hot_{k}": v for k, v in clocks(bench).items()}


def clocks(bench: Bench) -> dict[str, float]:
    """MHz, degrees and watts of a GPU now; nothing where the driver does not say."""
    if not bench.on_gpu:
        return {}
    found: dict[str, float] = {}
    with suppress(NoDriver), opened() as nvml:
        uuid = f"GPU-{torch.cuda.get_device_properties(bench.device).uuid}"
        handle = ask(nvml, "nvmlDeviceGetHandleByUUID", uuid.encode(), default=None) or ask(
            nvml, "nvmlDeviceGetHandleByUUID", uuid, default=None
        )
        if handle is not None:
            found["mhz"] = float(ask(nvml, "nvmlDeviceGetClockInfo", handle, 1, default=0))
            found["degrees"] = float(ask(nvml, "nvmlDeviceGetTemperature", handle, 0, default=0))
            found["watts"] = float(ask(nvml, "nvmlDeviceGetPowerUsage", handle, default=0)) / 1e3
    return found


def profile_of(measured: Mapping[str, Any]) -> DeviceProfile:
    """What the groups found, as the planner takes it."""
    table: dict[str, Products] = measured.get("products", {})
    return DeviceProfile(**{**measured, "products": table})
