"""What the host does for one fused layer of a pass: launches, torch's operations, and the time of its thread.

    python benchmarks/host_cost.py --arithmetic fp8 16bit [--out host.csv]

Needs the `triton` package and no GPU: kernels are compiled, asked for and looked up as ever, and then not run, nor are
cuBLAS's and attention's. So the time is that of Python and of torch's and Triton's own code, without the driver's part
of a launch (4 to 6 microseconds each). Compare versions of the code on one machine, several times in turn.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from table import write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import autotuner, driver

from kitaeru.kernels import adapter, copies, frozen, gated, norm, packed_attention, product, rotary, rows
from kitaeru.kernels.rows import Arithmetic
from kitaeru.model import fused
from kitaeru.model.fused import FusedLayer, Place
from kitaeru.model.site import Member, Site

FIELDS = ("arithmetic", "pass", "launches", "operations", "views_and_memory", "milliseconds")
LAYERS, TOKENS, HIDDEN, WIDE, HEADS = 4, 64, 256, 512, 4
# Operations of torch that launch nothing.
QUIET = ("view", "detach", "slice", "select", "t.default", "permute", "unsqueeze", "split", "alias", "expand", "empty")
launched: Counter[str] = Counter()


class _Driver:
    """An H100 that loads every kernel and runs none."""

    class utils:
        load_binary = staticmethod(lambda *_: (1, 2, 40, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    @staticmethod
    def launcher_cls(source: Any, _: Any) -> Any:
        name = source.fn.__name__
        return lambda *_: launched.update([name])

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def _first(self: Any, *arguments: Any, **options: Any) -> Any:
    self.best_config = self.configs[0]
    return self.fn.run(*arguments, **options, **self.best_config.all_kwargs())


def _scaled(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, **_: Any) -> Tensor:
    launched["product"] += 1
    return torch.empty((a.shape[0], b.shape[1]), dtype=out_dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        launched["attention"] += 1
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        launched["attention_backward"] += 1
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> packed_attention.Attended:
    inputs = (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_())
    with torch.enable_grad():
        return packed_attention.Attended(_Attention.apply(*inputs), inputs)  # type: ignore[no-untyped-call]


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(op)] += 1
        return op(*args, **(kwargs or {}))


def _member(n: int, k: int) -> Member:
    byte, single = torch.uint8, torch.float32
    stored = frozen.Stored(
        "nf4", (n, k), torch.zeros(n * k // 2, dtype=byte), torch.zeros(n * k // 64, dtype=byte), torch.zeros(16),
        torch.zeros(256), torch.ones(n * k // 64 // 256 + 1), 0.1,
    )  # fmt: skip
    return Member(stored, None, *(nn.Parameter(torch.zeros(size, dtype=single)) for size in ((16, k), (n, 16))), 1.0)


def _layer(arithmetic: Arithmetic) -> FusedLayer:
    def site(*sizes: tuple[int, int]) -> Site:
        made = Site(tuple(_member(*size) for size in sizes), arithmetic, torch.bfloat16)
        made.holds = False
        return made

    weight = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return FusedLayer(
        qkv=site((HIDDEN, HIDDEN), (128, HIDDEN), (128, HIDDEN)), out=site((HIDDEN, HIDDEN)),
        both=site((WIDE, HIDDEN), (WIDE, HIDDEN)), down=site((HIDDEN, WIDE)), norm1=weight, norm2=weight, eps=1e-5,
        heads=rotary.Heads(HEADS, 2, 64, None, None, 1e-6), scale=0.1, activation="silu", keep=arithmetic,
    )  # fmt: skip


def measure(arithmetic: Arithmetic, tries: int) -> list[dict[str, object]]:
    """Both passes, for one layer of `LAYERS`: counts, and the least time of `tries`."""
    layers = [_layer(arithmetic) for _ in range(LAYERS)]
    angles = torch.zeros(TOKENS, HIDDEN // HEADS)
    place = Place(angles, angles, torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)
    upstream = torch.ones((TOKENS, HIDDEN), dtype=torch.bfloat16)

    def forward() -> Tensor:
        hidden = torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16, requires_grad=True)
        for layer in layers:
            hidden = layer(hidden, place)
        return hidden

    found = []
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(3):
            forward().backward(upstream)
        for name in ("forward", "backward"):
            best = float("inf")
            for _ in range(tries):
                result = None if name == "forward" else forward()
                started = time.thread_time()
                _ = forward() if result is None else result.backward(upstream)
                best = min(best, time.thread_time() - started)
            result = None if name == "forward" else forward()
            launched.clear()
            with _Count() as count:
                _ = forward() if result is None else result.backward(upstream)
            quiet = sum(n for op, n in count.found.items() if any(word in op for word in QUIET))
            numbers = (launched.total(), count.found.total() - quiet, quiet, 1000 * best)
            each = [round(number / LAYERS, 2) for number in numbers]
            found.append(dict(zip(FIELDS, (arithmetic, name, *each), strict=True)))
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arithmetic", nargs="+", default=["fp8"], choices=["16bit", "fp8"])
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    driver.set_active(_Driver())
    with ExitStack() as stack:
        for module in (adapter, copies, frozen, gated, norm, product, rotary, rows):
            stack.enter_context(mock.patch.object(module, "use_triton", return_value=True))
        stack.enter_context(mock.patch.object(autotuner.Autotuner, "run", _first))
        stack.enter_context(mock.patch.object(gated, "_caches", return_value=True))
        stack.enter_context(mock.patch.object(torch, "_scaled_mm", _scaled))
        stack.enter_context(mock.patch.object(torch, "mm", lambda a, b: _scaled(a, b, out_dtype=a.dtype)))
        stack.enter_context(mock.patch.object(fused, "attend", _attend))
        found = [row for arithmetic in arguments.arithmetic for row in measure(arithmetic, arguments.tries)]
    if arguments.out:
        write(arguments.out, found, FIELDS)


if __name__ == "__main__":
    main()
